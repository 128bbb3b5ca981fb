"""N processes of one run, as torchrun would start them: started here, in one process each for several runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Job = tuple[str, dict[str, Any]]  # stage or "module:function", arguments of `train` or of the function


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"PYTHONPATH": paths, "ENGINE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def flags(config: dict[str, Any]) -> list[str]:
    """The config as words of the command line."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    return [word for key, value in values.items() for word in (f"--{key}", value)]


def start(count: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """python `arguments` in `count` processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        env = environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        command = [sys.executable, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 600) -> None:
    """Waits; what the failed ones printed is the assertion's message."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    failed = {
        rank: output[-3000:]
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True))
        if process.returncode
    }
    assert not failed, "\n".join(f"rank {rank}: {output}" for rank, output in failed.items())


def run_jobs(count: int, jobs: Sequence[Job], folder: Path) -> None:
    """Each job by `count` processes together, one after another."""
    file = folder / f"jobs-{count}.json"
    file.write_text(json.dumps(jobs))
    finish(start(count, [str(Path(__file__)), str(file)]))


def reward_of_length(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """Not of one completion alone: it must be called with all of them."""
    longest = max(map(len, completions), default=1) or 1
    return [len(text) / longest if index % 3 else None for index, text in enumerate(completions)]


class Cut(BaseException):
    """Stands for a kill: nothing of the engine may catch it."""


def train(stage: str, config: dict[str, Any], saves: int | None = None) -> None:
    """One run, in this process; with `saves` it is cut off after so many checkpoints."""
    import engine
    from engine.run.session import Session

    stages: dict[str, tuple[Any, Any]] = {
        "sft": (engine.train_sft, engine.SFTConfig),
        "rm": (engine.train_reward_model, engine.RMConfig),
        "ppo": (engine.train_ppo, engine.PPOConfig),
    }
    function, kind = stages[stage]
    whole, done = Session.save, []

    def save(self: Session, *arguments: Any, **options: Any) -> None:
        whole(self, *arguments, **options)
        self.wait_for_save()
        done.append(1)
        if len(done) == saves:
            raise Cut

    Session.save = save  # type: ignore[method-assign]
    rewards = [engine.RewardSource(**source) for source in config.get("rewards", [])]
    try:
        function(kind(**config | ({"rewards": rewards} if rewards else {})))
    except Cut:
        pass
    finally:
        Session.save = whole  # type: ignore[method-assign]


def main(file: str) -> None:
    import importlib

    from engine.run.distributed import leave

    for name, arguments in json.loads(Path(file).read_text()):
        if ":" in name:  # a check of its own
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)(**arguments)
        else:
            train(name, **arguments)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
