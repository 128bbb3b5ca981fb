"""engine.tune: what it would time, what it changes, and how it writes; its clock here is a formula."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import tune
from engine.kernels import _backend

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "kernels" / "configs"

pytestmark = pytest.mark.skipif(bool(_backend.why_no_triton()), reason="triton is not installed")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.tune", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr and "--dry_run" in done.stderr


def test_a_dry_run_lists_rows_and_the_cases_that_read_them():
    done = command("--dry_run", "--op", "swiglu", "adamw")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [
        "adamw (any size)",
        "swiglu (any size)",
    ] and len(lines) == 3
    assert "'BLOCK': 1024" in lines[1] and "5 changes" in lines[1]
    assert "swiglu: forward, bfloat16" in lines[1] and "swiglu: backward, float32" in lines[1]
    assert "column sm_" in lines[2]


def test_what_is_missing_is_named(capsys, monkeypatch):
    assert tune.main(["--op", "swigl"]) == 2
    assert "--op: got 'swigl', want one of" in capsys.readouterr().err
    assert tune.main(["--op", "swigl"]) == 2 and "did you mean 'swiglu'?" in capsys.readouterr().err
    assert tune.main(["--cases", "no_such_bench"]) == 2
    assert "the shapes to time are in no_such_bench" in capsys.readouterr().err
    monkeypatch.setattr(_backend, "why_no_triton", lambda: "triton is not installed")
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "python -m engine.tune: triton is not installed\n"


def test_every_case_reads_a_row_on_shapes_alone():
    workloads = tune.load_workloads("bench.gpu", [])
    with tune.reading("gfx942") as tables:
        read = {w.name for entry in tune.entries(workloads, tables) for w in entry.workloads}
    assert read == {w.name for w in workloads}


def test_neighbours():
    row = {"up_to": 1024, "ROWS": 1, "BLOCK": 1024, "DEPTH": 48, "num_warps": 16, "num_stages": 1}
    changes = [{k: v for k, v in new.items() if v != row[k]} for new in tune.neighbours(row)]
    # ROWS cannot halve, BLOCK covers the bucket, 48 is no power of two, warps and stages end
    assert changes == [{"ROWS": 2}, {"BLOCK": 2048}, {"num_warps": 8}, {"num_stages": 2}]
    anywhere = [new["BLOCK"] for new in tune.neighbours({"up_to": None, "BLOCK": 64})]
    assert anywhere == [32, 128]


def test_results_that_agree():
    a = [torch.tensor([1.0, -torch.inf, 100.0])]
    assert tune.agree(a, [torch.tensor([1.5, -torch.inf, 101.0])])
    assert not tune.agree(a, [torch.tensor([1.0, -torch.inf, 110.0])])
    assert not tune.agree(a, [torch.tensor([1.0, 0.0, 100.0])])
    assert not tune.agree([torch.full((3,), torch.nan)], a)
    tokens, logprob = torch.tensor([3]), torch.ones(1)
    assert tune.tensors((tokens, (logprob, None))) == [logprob] and tune.tensors(None) == []


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_tables_survive_being_written(path):
    text = path.read_text()
    assert json.loads(tune.format_table(json.loads(text))) == json.loads(text)


@pytest.mark.parametrize("name", ["adamw", "linear", "swiglu"])
def test_tables_are_written_as_they_are(name):
    text = (TABLES / f"{name}.json").read_text()
    assert tune.format_table(json.loads(text)) == text


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """Copies of two tables in place of the tables."""
    from engine.kernels.triton import _launch

    for name in ("swiglu", "adamw"):
        shutil.copy(TABLES / f"{name}.json", tmp_path)
    monkeypatch.setattr(_launch, "TABLES", tmp_path)
    _launch.table.cache_clear()
    yield tmp_path
    _launch.table.cache_clear()


def tiny(wrong_below: int = 0, fails_at: int = 0) -> tuple[list[tune.Workload], tune.Timer]:
    """swiglu on 16 elements, and a clock whose fastest row is BLOCK 128 and one warp. Blocks below `wrong_below` give
    another result, and launches with `fails_at` warps an error."""
    from engine.kernels.triton import _launch
    from engine.kernels.triton.swiglu import swiglu

    def launched(run):
        seen = []
        token = _launch.observer.set(lambda launch: seen.append(launch.config) is None)
        try:
            result = run()
        finally:
            _launch.observer.reset(token)
        return seen[0], result

    def run(gate, up):
        if gate.device.type == "meta":
            return swiglu(gate, up)
        config, out = launched(lambda: swiglu(gate, up))
        if config.num_warps == fails_at:
            raise RuntimeError("out of resource")
        return out * 0 if config.blocks["BLOCK"] < wrong_below else out

    def timer(work):
        config = _launch.config("swiglu", 16, torch.device("cpu"))
        work()
        return 1.0 + abs(config.blocks["BLOCK"].bit_length() - 8) + 0.2 * config.num_warps

    make = lambda device: tuple(torch.ones(2, 8, device=device) for _ in range(2))  # noqa: E731
    return [tune.Workload("swiglu", "swiglu: tiny", make, run)], timer


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
@pytest.mark.parametrize(
    "limits,want", [({}, (128, 1)), ({"wrong_below": 512}, (512, 1)), ({"fails_at": 2}, (128, 4))]
)
def test_the_column_becomes_the_fastest_row_that_is_right(copied, limits, want):
    before, adamw = (
        json.loads((copied / "swiglu.json").read_text()),
        (copied / "adamw.json").read_text(),
    )
    workloads, timer = tiny(**limits)
    told: list[str] = []
    tune.tune(workloads, "sm_90", "cpu", timer, told.append)
    after = json.loads((copied / "swiglu.json").read_text())
    assert after.pop("sm_90") == [
        {"up_to": None, "BLOCK": want[0], "num_warps": want[1], "num_stages": 1}
    ]
    before.pop("sm_90")
    assert after == before and (copied / "adamw.json").read_text() == adamw
    assert told[0] == "swiglu (any size): swiglu: tiny" and "BLOCK 1024 -> 512" in told[1]
    from engine.kernels.triton import _launch

    assert _launch.config("swiglu", 1, torch.device("cpu")).blocks["BLOCK"] == want[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_a_row_that_is_the_fastest_stays_and_no_file_is_written(copied):
    workloads, _ = tiny()
    path = copied / "swiglu.json"
    path.write_text(path.read_text() + "\n")
    text = path.read_text()
    tune.tune(workloads, "sm_90", "cpu", lambda work: 1.0, lambda line: None)
    assert path.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_a_row_that_cannot_run_is_an_error(copied):
    workloads, timer = tiny(fails_at=4)
    with pytest.raises(RuntimeError, match="out of resource"):
        tune.tune(workloads, "sm_90", "cpu", timer, lambda line: None)
