"""make gpu-check without a GPU: one line and exit code 2; a dry run that reaches every case; and that what fails, ends
or hangs is a row of a file that is whole after every row, with everything behind it done."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_check_kernels
from bench.gpu import cases

ROOT = Path(__file__).resolve().parents[1]
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def whole_ledger(tmp_path, monkeypatch) -> Path:
    """With a row of every case."""
    path = tmp_path / "gpu_ledger.json"
    rows = [{"op": c.op, "case": c.name, "by": "engine", "dtype": "bfloat16"} for c in cases()]
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(gpu_check_kernels, "LEDGER", path)
    return path


NO_GPU_SAID = r"python -m bench\.gpu_check: no GPU: torch \S+ sees none; --dry_run .*\n"


@NO_GPU
def test_without_a_gpu_it_is_one_line():
    done = gpu_check.ran([sys.executable, "-m", "bench.gpu_check"])
    assert done.returncode == gpu_check.EXIT_NO_GPU == 2
    assert not done.stdout
    assert re.fullmatch(NO_GPU_SAID, done.stderr)


@NO_GPU
@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_finds_a_python_and_says_the_same():
    """That of `make setup` where it is there; a python without torch is named."""
    ours = ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # the latter of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        ["make", "-s", "gpu-check"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.match(rf"{NO_GPU_SAID}|python -m bench\.gpu_check: \S+ has no torch; ", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--dry_run"]])
def test_without_torch_it_is_one_line(arguments, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "torch" else find(n))
    assert gpu_check.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{sys.executable} has no torch; make gpu-check PYTHON" in said


@TRITON
def test_a_dry_run_launches_every_case_on_paper(whole_ledger, capsys):
    """Nothing runs: a case's full shape would not fit into this memory."""
    assert gpu_check.main(["--dry_run"]) == 0
    said = capsys.readouterr().out
    for case in cases():
        for name in case.dtypes:
            line = next(
                x
                for x in said.splitlines()
                if x.startswith(f"{case.op}, {case.name} (") and f" {name})" in x
            )
            assert re.search(r"\): (\w+(, \w+)*)$", line), line
    assert "\nworkloads: model, decode 1, decode 16, decode 64, decode 256, train" in said
    assert "\nCUDA C++ (kl_reward_gae, ranking_loss): " in said


@TRITON
def test_only_some_ops(whole_ledger, capsys):
    assert gpu_check.main(["--dry_run", "--only", "swiglu"]) == 0
    said = capsys.readouterr().out
    assert "swiglu, forward (N=" in said and "rmsnorm" not in said
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry_run", "--only", "no_such_op"])


@TRITON
def test_a_case_that_the_ledger_lacks_is_named(whole_ledger, tmp_path, capsys):
    rows = json.loads(whole_ledger.read_text())["rows"]
    kept = [row for row in rows if (row["op"], row["case"]) != ("swiglu", "forward")]
    whole_ledger.write_text(json.dumps({"rows": kept}))
    assert gpu_check.main(["--dry_run", "--only", "swiglu"]) == gpu_check.EXIT_NOT_WELL == 1
    assert "not in gpu_ledger.json: swiglu, forward; run" in capsys.readouterr().out
    assert gpu_check_kernels.ledger(tmp_path / "none.json") == {}


def test_the_ledger_knows_every_case():
    ledger = gpu_check_kernels.ledger(gpu_check_kernels.LEDGER)
    assert gpu_check_kernels.missing(list(cases()), ledger) == []


def test_what_is_tested_on_the_device():
    """CUDA C++ alone: the emulated launchers beside it register the same names, which ends the process."""
    found = gpu_check.targets()
    assert all((ROOT / path).exists() for path in found)
    kernels = {f"tests/triton/{path.name}" for path in (ROOT / "tests/triton").glob("test_*.py")}
    alone = {"tests/ops", "tests/cuda/test_cuda_device.py", "tests/generate/test_graph.py"}
    assert set(found) == kernels | alone and len(found) == len(set(found))


CHILD = """
import json, os, sys
def say(**row): os.write(1, (json.dumps(row) + "\\n").encode())
for piece in sys.argv[3:]:
    if piece == "environment":
        chosen = [name for name in os.environ if name.startswith(("ENGINE_", "TRITON_INT"))]
        say(row={"gpu": "Some GPU, 80GB", "chosen": chosen})
    elif piece == "aborts":
        say(row={"op": "a", "by": "engine", "ms": 1.0})
        os.write(2, b"CUDA error: an illegal memory access\\n")
        os.abort()
    elif piece == "ends":
        sys.exit("it ends before it is done")
    elif piece == "half a row":
        os.write(1, b'{"row": {"op"')
        os._exit(5)
    elif piece == "error":
        say(row={"op": "a", "case": "forward", "dtype": "float32", "by": "engine", "error": "ValueError: no"})
    else:
        say(row={"op": piece, "by": "engine", "ms": 1.0})
    say(done=piece)
if "ends late" in sys.argv: sys.exit(9)
"""


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Path:
    """A GPU whose pieces a program pretends, a build and tests that pass, and a folder for the file."""
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    monkeypatch.setattr(gpu_check, "CHILD", (sys.executable, str(program)))
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "build", lambda: {"exit_code": 0})
    monkeypatch.setattr(gpu_check, "run_tests", lambda target: {"exit_code": 0})
    return tmp_path / "gpu-some-gpu-80gb.json"


PARTS = {"build": ["build"], "tests": ["x.py"], "kernels": ["fine"], "workloads": ["train"]}


def run(parts: dict[str, list[str]]) -> tuple[int, gpu_check.Record]:
    record = gpu_check.check(parts, Path("model"), False)
    return gpu_check.tell(record), record


def test_all_is_well(setting, monkeypatch, capsys):
    """And whoever asked for other kernels gets those that a run takes by itself."""
    for name in gpu_check.CHOICES:
        monkeypatch.setenv(name, "1")
    code, record = run(PARTS)
    assert code == 0 and record.path == setting
    found = json.loads(setting.read_text())
    assert found.pop("failed") == found.pop("not_run") == []
    assert found == {
        "environment": {"gpu": "Some GPU, 80GB", "chosen": []},
        "build": [{"piece": "build", "exit_code": 0}],
        "tests": [{"piece": "x.py", "exit_code": 0}],
        "kernels": [{"op": "fine", "by": "engine", "ms": 1.0}],
        "workloads": [{"op": "train", "by": "engine", "ms": 1.0}],
    }
    assert capsys.readouterr().out.endswith(f"written: {setting}; please send it back\n")


@pytest.mark.parametrize(
    ("piece", "named"),
    [
        ("aborts", "kernels: aborts: its process ended with -6: CUDA error: an illegal memory"),
        ("ends", "kernels: ends: its process ended with 1: it ends before it is done"),
        ("half a row", 'kernels: half a row: half a row: {"row": {"op"'),
        ("error", "kernels: a, forward, float32, engine: ValueError: no"),
        ("ends late", "kernels: after: its process ended with 9: "),
    ],
)
def test_what_ends_a_process_is_a_row_and_the_rest_is_done(piece, named, setting, capsys):
    code, _ = run({**PARTS, "kernels": ["before", piece, "after"]})
    found = json.loads(setting.read_text())
    done = [row["op"] for row in found["kernels"] if "ms" in row]
    assert done[0] == "before" and done[-1] == "after" and found["workloads"][0]["ms"] == 1.0
    assert code == gpu_check.EXIT_NOT_WELL and found["not_run"] == []
    assert found["failed"][0].startswith(named)
    assert f"failed: {named}" in capsys.readouterr().out
    assert ("a" in done) == (piece == "aborts"), "a row that was given before the end is kept"


@pytest.mark.parametrize("part", ["build", "tests", "child"])
def test_what_does_not_start_is_a_row_and_the_rest_is_done(part, setting, monkeypatch):
    def fails(*_: str) -> dict[str, object]:
        raise RuntimeError(f"no {part}")

    if part == "child":
        monkeypatch.setattr(gpu_check, "CHILD", (str(setting.parent / "no such program"),))
        setting = setting.with_name("gpu-unknown.json")
    else:
        monkeypatch.setattr(gpu_check, "build" if part == "build" else "run_tests", fails)
    code, _ = run(PARTS)
    found = json.loads(setting.read_text())
    assert code == gpu_check.EXIT_NOT_WELL and not found["not_run"]
    if part == "child":
        assert [line.partition(":")[0] for line in found["failed"]] == [
            "environment",
            "kernels",
            "workloads",
        ]
        assert all("it did not start: FileNotFoundError" in line for line in found["failed"])
    else:
        piece = PARTS[part][0]
        assert found["failed"] == [f"{part}: {piece}: RuntimeError: no {part}"]
        assert found["kernels"][0]["ms"] == found["workloads"][0]["ms"] == 1.0


def test_the_file_is_whole_after_every_row(setting, monkeypatch):
    """At each print of a row, which comes before it is written, the file has all rows before it."""
    sizes = []

    def look(*_: object, **__: object) -> None:
        if setting.exists():
            sizes.append(len(json.loads(setting.read_text())["kernels"]))
            assert [p.name for p in setting.parent.glob("gpu-*")] == [setting.name]

    monkeypatch.setattr("builtins.print", look)
    run({"kernels": ["one", "two", "aborts", "three"]})
    assert sizes[:5] == [0, 1, 2, 3, 4]


def test_an_interrupted_run_says_what_was_not_run(setting, monkeypatch, capsys):
    def stop(target: str) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run_tests", stop)
    code, _ = run(PARTS)
    found = json.loads(setting.read_text())
    assert code == gpu_check.EXIT_NOT_WELL and found["build"] == [
        {"piece": "build", "exit_code": 0}
    ]
    assert found["not_run"] == ["tests: x.py", "kernels: fine", "workloads: train"]
    assert "not run: kernels: fine\n" in capsys.readouterr().out


@TRITON
@NO_GPU
def test_where_every_piece_breaks_the_gpu(tmp_path, monkeypatch, capsys):
    """The true processes, told that there is a GPU: each piece is a row with torch's error, in a process of its own."""
    monkeypatch.setattr(gpu_check, "without_gpu", lambda: "")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.main(["--only", "ranking_loss"]) == gpu_check.EXIT_NOT_WELL
    found = json.loads((tmp_path / "gpu-unknown-only.json").read_text())
    assert "AssertionError: Torch not compiled with CUDA" in found["environment"]["error"]
    first, second = found["kernels"][:2]
    assert first["by"] == "engine" and "Torch not compiled with CUDA" in first["error"]
    assert "ended with 3: after" in second["error"] and "does nothing more" in second["error"]
    named = [row["dtype"] for row in found["kernels"] if row.get("by") == "engine"]
    assert named == ["float32", "bfloat16"] and not found["not_run"]


SETUPS = {
    "fine": "Path('engine/_cuda.x86.so').touch()",
    "no nvcc": "print('engine: installing without CUDA C++ kernels: no nvcc')",
    "fails": "sys.exit(3)",
    "says nothing": "",
    "optional": textwrap.dedent("""
        from setuptools import Extension, setup
        from setuptools.command.build_ext import build_ext
        from setuptools.errors import CompileError
        class Build(build_ext):
            def build_extension(self, extension):
                raise CompileError("nvcc: no")
        Path('engine/_cuda.x86.so').touch()  # of an earlier build
        extensions = [Extension("engine._cuda", [], optional=True)]
        setup(name="x", ext_modules=extensions, cmdclass={"build_ext": Build})
    """),
}


@pytest.mark.parametrize("kind", SETUPS)
def test_build(kind, tmp_path):
    (tmp_path / "engine").mkdir()
    program = f"import sys\nfrom pathlib import Path\n{SETUPS[kind]}\nprint('end', sys.argv[1:])\n"
    (tmp_path / "setup.py").write_text(program)
    row = gpu_check.build(tmp_path)
    errors = {
        "fails": "setup.py ended with 3",
        "says nothing": "the CUDA C++ kernels were not built, though nvcc is here",
        "optional": "the CUDA C++ kernels were not built, though nvcc is here",
    }
    assert row.get("error") == errors.get(kind)
    assert row["said"] == (
        ["installing without CUDA C++ kernels: no nvcc"] if kind == "no nvcc" else []
    )
    assert kind == "fails" or "end ['build_ext', '--inplace']" in row["end"]


def test_build_by_the_engines_own_setup(tmp_path, monkeypatch):
    """Beside no sources and with no compiler, so that nothing of this checkout is made anew."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    row = gpu_check.build(tmp_path)
    assert row["exit_code"] == 0 and "error" not in row
    assert "no C++ compiler found: installing without C++ kernels" in row["said"][0]


def test_tests_that_fail_and_are_skipped_are_named(tmp_path):
    """Under the options of pyproject.toml."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest\ndef test_fine(): pass\ndef test_not(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('x')\ndef test_error(broken): pass\n"
    )
    row = gpu_check.run_tests(str(path))
    assert row["exit_code"] == 1 and row["error"].startswith("pytest ended with 1: 1 failed, 1 pas")
    assert "test_it.py::test_not - assert 1 == 2" in row["failed"][0] and len(row["failed"]) == 1
    assert "test_it.py::test_error - OSError: x" in row["errors"][0] and len(row["errors"]) == 1
    assert row["skipped"][0].endswith("no GPU")
    fine = gpu_check.run_tests(f"{path}::test_fine")
    assert fine["exit_code"] == 0 and fine["summary"].startswith("1 passed in")
    assert "error" not in fine and fine["seconds"] > 0
    assert gpu_check.run_tests(str(tmp_path / "none.py"))["error"].startswith("pytest ended with 4")
