"""Train a language model on human feedback by the three stages of InstructGPT.

    python -m engine.train --stage sft    demonstrations -> a model that answers
    python -m engine.train --stage rm     rankings of answers -> a reward model
    python -m engine.train --stage ppo    prompts and a reward -> the policy

                           [--preset name] [--config file.yaml] [--key value ...] [--print_config] [--dry_run]

    torchrun --nproc_per_node N -m engine.train --stage ...     several processes, weights sharded over them

A preset's values are overridden by those of --config, and these by --key value. --dry_run checks config, data and
model, says what the run takes, and stops. Exit codes: 0 done, 3 stopped on request and resumable, others failed
(1 with a message, 2 bad usage).
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from engine.config import STAGES, PPOConfig, RMConfig, RunConfig, SFTConfig
from engine.errors import ConfigError, EngineError

PRESETS = Path(__file__).parent / "presets"
EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 3


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse with one habit more: an unknown key is answered with the nearest one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [action.dest for action in self._actions]
        unknown = re.findall(
            r"--([\w.]+)|(?:[Kk]ey|Option) [\"']([\w.]+)[\"'] is not (?:expected|accepted)", message
        )
        hints = []
        for name in {a or b for a, b in unknown} - set(known):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hints.append(f"unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        text = "\n".join([*sorted(hints), message])
        sys.stderr.write(f"{self.prog}: {text}\nHelp: {self.prog} --help\n")
        raise SystemExit(EXIT_USAGE)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def about_preset(name: str) -> str:
    """The first sentence of its file."""
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    about = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(lambda x: x.startswith("#"), lines))
    return re.split(r"[:;] |\. (?=[A-Z])|\.$", about)[0]


def preset_values(name: str, stage: str) -> dict[str, Any]:
    """A preset's values for one stage."""
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"preset: got {name!r}, want one of {', '.join(preset_names())}{hint}")
    text = (PRESETS / f"{name}.yaml").read_text()
    stages = yaml.safe_load(text)
    if stage not in stages:
        raise ConfigError(
            f"preset {name!r} has no values for stage {stage!r}, only for {', '.join(stages)}"
        )
    return dict(stages[stage] or {})


def stage_parser() -> argparse.ArgumentParser:
    """Reads --stage and --preset; the rest belongs to the stage's own parser."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.train", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--stage", choices=sorted(STAGES))
    parser.add_argument("--preset")
    return parser


def build_parser(stage: str, preset: str | None) -> jsonargparse.ArgumentParser:
    """All keys of a stage, with the preset's values as defaults."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        allow_abbrev=False,
        prog=f"python -m engine.train --stage {stage}",
        description=STAGES[stage].__doc__,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    names = ", ".join(preset_names())
    parser.add_argument("--stage", choices=sorted(STAGES), help="which stage to run")
    parser.add_argument("--preset", type=str | None, help=f"ready values: {names}")
    parser.add_argument(
        "--dry_run", action="store_true", help="check config, data and model, then stop"
    )
    parser.add_class_arguments(STAGES[stage])
    if preset:
        values = preset_values(preset, stage)
        known = {action.dest for action in parser._actions}
        for name in values:
            if name not in known:
                raise ConfigError(f"preset {preset!r}: unknown key {name!r} for stage {stage!r}")
        parser.set_defaults(values)
    return parser


def parse(argv: Sequence[str]) -> tuple[str, RunConfig, bool]:
    """argv -> (stage, its config, dry run?). Exits with a message on bad usage."""
    first, rest = stage_parser().parse_known_args(argv)
    if first.stage is None:
        width = max(map(len, preset_names()))
        print(__doc__, "Presets:", *(f"    {name:{width}}  {about_preset(name)}" for name in preset_names()), sep="\n")
        print("\nThe keys of a stage: python -m engine.train --stage ppo --help")
        raise SystemExit(0 if {"-h", "--help"} & set(argv) else EXIT_USAGE)
    parser = build_parser(first.stage, first.preset)
    kind = STAGES[first.stage]
    try:
        found = parser.parse_args(appending(rest))
        values = parser.instantiate(found).as_dict()
    except EngineError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        parser.error(f"not a config: {type(error).__name__}: {error}")
    for key in ("stage", "preset"):  # of a --config file: the words of argv are not in `rest`
        check_as_given(key, values.get(key), getattr(first, key))
    for key in ("config", "stage", "preset", "dry_run"):
        values.pop(key, None)
    values.pop("__path__", None)
    for field in fields(kind):  # jsonargparse lets null pass for any type
        if values.get(field.name, field) is None and "None" not in str(field.type):
            raise ConfigError(f"{field.name}: got null, want a value of type {field.type}")
    config = kind(**values)
    if isinstance(config, PPOConfig):
        config.check_rewards()
    return first.stage, config, bool(found.dry_run)


def check_as_given(key: str, in_file: str | None, given: str | None) -> None:
    """What a --config file says of the stage or the preset comes too late to choose by: it may only repeat argv.

    Raises:
        ConfigError: it says something else.
    """
    if in_file is not None and in_file != given:
        said = f"--{key} {given}" if given else f"no --{key}"
        raise ConfigError(
            f"{key}: got {in_file!r} in the --config file and {said} on the command line, want it on the command line:"
            f" give --{key} {in_file}, or take the key out of the file"
        )


def appending(argv: Sequence[str]) -> list[str]:
    """argv in which every --allow_config_change adds to the list, as jsonargparse writes it."""
    name = "--allow_config_change"
    return [re.sub(rf"^{name}(?==|$)", f"{name}+", word) for word in argv]


def run(config: RunConfig) -> None:
    """Runs one stage; the import waits until the CPU class is settled."""
    import engine

    if isinstance(config, SFTConfig):
        engine.train_sft(config)
    elif isinstance(config, RMConfig):
        engine.train_reward_model(config)
    elif isinstance(config, PPOConfig):
        engine.train_ppo(config)


def settle_machine(config: RunConfig) -> None:
    """Before torch starts its threads: which CPU kernels, how many threads, memory in large pages.

    OpenMP's waiting stays at its default, spinning for a bounded time: threads that sleep at once made a step
    twice as long on a virtual machine, where waking one takes long (bench/LOG.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.cpu_class:
        os.environ["ENGINE_CPU_CLASS"] = config.cpu_class
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; errors of the engine's own are one message, not a traceback."""
    try:
        stage, config, dry_run = parse(sys.argv[1:] if argv is None else argv)
    except EngineError as error:
        failed(error)
        return EXIT_USAGE
    settle_machine(config)
    from engine.run.console import printable
    from engine.run.distributed import leave
    from engine.run.session import Stopped
    from engine.stages.out_of_memory import is_out_of_memory, out_of_memory

    try:
        if dry_run:
            from engine.stages.dry_run import print_plan

            print_plan(stage, config)
        else:
            run(config)
        leave()
    except Stopped as stopped:
        leave()
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process has stopped
            print(printable(str(stopped)))
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return failed("stopped at once; what was saved stays, --resume_from_checkpoint true goes on from there")
    except (EngineError, OSError) as error:
        return failed(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return failed(out_of_memory(config, error))
    return 0


def failed(why: object) -> int:
    """Says why, with control characters written out, since a row or a path may hold some."""
    from engine.run.console import printable

    sys.stderr.write(f"python -m engine.train: {printable(str(why))}\n")
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
