"""What the README shows is executed: its commands parse, its tree exists, its names are there."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_layout import tracked

import engine
from bench import training_table
from bench.table import render
from engine.config import STAGES
from engine.demo import closing
from engine.train import parse, preset_names

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("python -m engine.train")])
def test_commands_of_stages_parse(line):
    words = [w for w in shlex.split(line)[3:] if w != "..."]
    stage = words[words.index("--stage") + 1]
    if "--help" in words:
        return
    for key, value in (("--model_name_or_path", "m"), ("--output_dir", "o")):
        words += [] if key in words else [key, value]
    assert isinstance(parse(words)[1], STAGES[stage])


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


PROGRAMS = ("sample", "report", "demo", "data", "ops", "plan")
# As `python -m engine.NAME --help` for each, in one process: torch takes seconds to import.
HELP = """
import contextlib, io, json, runpy, sys
said = {}
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_module(f"engine.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            assert not ended.code, (name, ended.code)
    said[name] = text.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    command = [sys.executable, "-c", HELP, *PROGRAMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_it_names_have_help(name, helps):
    assert "usage" in helps[name].lower()
    for line in COMMANDS:
        if f"-m engine.{name} " in line:
            for flag in re.findall(r"--\w+", line):
                assert flag in helps[name], f"{flag} of: {line}"


def test_every_flag_in_the_text_exists():
    helps = " ".join(field for stage in STAGES.values() for field in stage.__dataclass_fields__)
    own = {"config", "dry_run", "print_config", "preset", "stage", "help", "rank_with", "num_samples",
           "output", "overwrite", "data_dir",
           "nproc_per_node", "max_restarts", "model", "gpus", "gpu_memory"}  # fmt: skip
    for flag in set(re.findall(r"--(\w+)", TEXT)):
        assert flag in helps.split() or flag in own, flag


def test_presets_that_it_names_exist():
    named = set(re.findall(r"`(?:--preset )?((?:paper|small|human)[\w.-]*)`", TEXT))
    assert named and named <= set(preset_names())
    assert set(preset_names()) - {"demo"} <= named


def test_python_names_exist():
    for name in re.findall(r"engine\.(\w+)\(", "\n".join(blocks("python"))):
        assert hasattr(engine, name), name
    for name in re.findall(
        r"`(\w+)`", TEXT.split("The kernels are `engine.ops`")[1].split("`python")[0]
    ):
        assert hasattr(engine.ops, name), name


def tree_paths() -> list[str]:
    """Paths of the tree block: two spaces a level, a name, then what it is."""
    block = re.findall(r"```\n(engine/ .*?)```", TEXT, flags=re.DOTALL)[0]
    stack: list[str] = []
    paths = []
    for line in block.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        stack[depth:] = [name]
        paths.append("".join(stack))
    return paths


def test_the_tree_is_the_tree():
    paths = tree_paths()
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"the README's tree names what is not there: {missing}"
    files = {str(p.relative_to(ROOT)) for p in tracked("engine/*.py", "kernels/*.py")}
    mirrors = ("/demo/", "kernels/triton/")  # one line each; the latter's files are those above it
    files = {f for f in files if not f.endswith("__init__.py") and not any(m in f for m in mirrors)}
    shown = [path for path in paths if not path.endswith("/")]
    unseen = sorted(f for f in files if f not in shown)
    assert not unseen, f"not in the README's tree: {unseen}"


def excerpt() -> str:
    """The demo's closing tables, of the recorded run, as a terminal of 92 columns shows them."""
    found = json.loads((ROOT / "bench/results/demo.json").read_text())
    console = Console(file=io.StringIO(), width=92, color_system=None, legacy_windows=False)
    for table in (closing.outcome(found), closing.times(found), closing.examples(found)):
        console.print(table)
    shown = console.file.getvalue()
    return "\n".join(line.rstrip() for line in shown.splitlines())


def test_what_comes_out_is_the_recorded_run():
    assert f"```\n{excerpt()}\n```" in TEXT


def test_the_other_class_of_cpu_is_the_recorded_run():
    found = json.loads((ROOT / "bench/results/demo-avx2.json").read_text())
    minutes, rate = found["seconds_total"] / 60, found["win_rate"]
    assert found["machine"]["cpu_class"] == "avx2"
    said = " ".join(TEXT.split())
    assert f"with AVX2 only {minutes:.0f} minutes, win rate {rate:.3f}" in said


def test_the_tables_of_rollouts_are_the_recorded_runs():
    assert f"\n{render(ROOT / 'bench/results')}\n" in TEXT, (
        "paste what `python -m bench.table` prints"
    )


def test_the_tables_of_training_are_the_recorded_runs():
    assert f"\n{training_table.render(ROOT / 'bench/results')}\n" in TEXT, (
        "paste what `python -m bench.table` prints"
    )


def test_the_line_on_human_data_is_the_recorded_run():
    run = json.loads((ROOT / "bench/results/human-avx2.json").read_text())
    found = run["reward_model"]
    said = re.search(r"orders (0\.\d+) ± (0\.\d+) of held-out pairs as people did", TEXT)
    assert said, "the README does not say where the reward model stands"
    assert [float(x) for x in said.groups()] == [
        round(found["accuracy"], 3),
        round(found["accuracy_stderr"], 3),
    ]
    course = r"(-0\.\d+) → (-0\.\d+) at KL (\d\.\d)"
    for name, (first, last, kl) in zip(("ppo_ptx", "ppo"), re.findall(course, TEXT), strict=True):
        begin, *_, end = run[name]["validation"]
        want = [round(begin["score"], 2), round(end["score"], 2), round(end["kl"], 1)]
        assert [float(first), float(last), float(kl)] == want
