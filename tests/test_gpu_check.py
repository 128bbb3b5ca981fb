"""make gpu-check without a GPU: one line and exit code 2; and a dry run that reaches every case."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.gpu import cases

ROOT = Path(__file__).resolve().parents[1]
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture
def whole_ledger(tmp_path, monkeypatch) -> Path:
    """With a row of every case."""
    path = tmp_path / "gpu_ledger.json"
    rows = [{"op": c.op, "case": c.name, "by": "engine", "dtype": "bfloat16"} for c in cases()]
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(gpu_check, "LEDGER", path)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == gpu_check.EXIT_NO_GPU == 2
    assert not done.stdout
    assert re.fullmatch(
        r"python -m bench\.gpu_check: no GPU: torch \S+ sees none; --dry_run .*\n", done.stderr
    )


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


@TRITON
def test_only_some_ops(whole_ledger, capsys):
    assert gpu_check.main(["--dry_run", "--only", "swiglu"]) == 0
    said = capsys.readouterr().out
    assert "swiglu, forward (N=" in said and "rmsnorm" not in said.split("tests:")[0]
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry_run", "--only", "no_such_op"])


@TRITON
def test_a_case_that_the_ledger_lacks_is_named(whole_ledger, tmp_path, capsys):
    rows = json.loads(whole_ledger.read_text())["rows"]
    kept = [row for row in rows if (row["op"], row["case"]) != ("swiglu", "forward")]
    whole_ledger.write_text(json.dumps({"rows": kept}))
    assert gpu_check.main(["--dry_run", "--only", "swiglu"]) == gpu_check.EXIT_NOT_WELL == 1
    assert "not in gpu_ledger.json: swiglu, forward; run" in capsys.readouterr().out
    assert gpu_check.ledger(tmp_path / "none.json") == {}


@TRITON
def test_the_ledger_knows_every_case():
    assert gpu_check.missing(list(cases()), gpu_check.ledger(gpu_check.LEDGER)) == []


def test_a_measured_time_stands_beside_its_prediction():
    prediction = {"dtype": "bfloat16", "predicted_ms": 2.0}
    row = gpu_check.beside({"ms": 3.0}, prediction, "bfloat16")
    assert row["predicted_ms"] == 2.0 and row["measured_to_predicted"] == 1.5
    assert gpu_check.beside({"ms": 3.0}, prediction, "float32") == {"ms": 3.0}
    assert gpu_check.beside({"error": "x"}, prediction, "bfloat16") == {"error": "x"}


@pytest.mark.parametrize("change", ["kernel", "replay", "test"])
def test_what_is_not_well_is_not_well(change):
    result = {
        "kernels": [{"by": "engine", "ms": 1.0}, {"by": "eager torch", "error": "out of memory"}],
        "workloads": [{"equal_to_the_bit": True}],
        "tests": {"exit_code": 0},
    }
    assert gpu_check.is_well(result)
    if change == "kernel":
        result["kernels"][0] = {"by": "engine", "error": "x"}
    elif change == "replay":
        result["workloads"][0]["equal_to_the_bit"] = False
    else:
        result["tests"]["exit_code"] = 1
    assert not gpu_check.is_well(result)


def test_what_goes_wrong_says_why_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    row = gpu_check.attempted(lambda: {}["ms"])
    assert row == {"error": "KeyError: 'ms'"}
