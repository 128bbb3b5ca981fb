"""The report on damaged copies of run folders: what cannot be read is a note on the page, and the rest is shown."""

import json
from pathlib import Path

import pytest

from engine import report
from engine.report import main, write_report
from engine.run.log import RunLog


@pytest.fixture(autouse=True)
def short_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "get_plotlyjs", lambda: "")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with RunLog(folder, quiet=True) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"loss": 1 / step, "grad_norm": 1.0 + step})
        log.samples(3, [{"prompt": "p", "completion": "whole answer", "tokens": ["whole answer"], "kl": [0.5]}])
    (folder / "versions.json").write_text(json.dumps({"stage": "sft", "torch": "2.13.0"}))
    (folder / "config.yaml").write_text("learning_rate: 0.25\n")
    return folder


def notes(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The notes on the page that the command writes."""
    assert main([str(folder)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert "whole answer" in page and "grad_norm" in page
    return [part.split("</span>")[0] for part in page.split('<span class="note">')[1:]]


@pytest.mark.parametrize(
    "line",
    [
        {"time": 1.0, "loss": 9.0},
        {"step": None, "time": 1.0, "loss": 9.0},
        {"step": "4", "time": 1.0, "loss": 9.0},
        {"step": 10**30, "time": 1.0, "loss": 9.0},
        {"step": 4, "loss": 9.0},
    ],
)
def test_a_line_without_step_or_time_is_left_out(line, run, capsys) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert notes(run, capsys) == ["metrics.jsonl: 1 lines have no step or no time and were left out"]


def test_values_that_are_no_numbers_of_a_curve_are_not_drawn(run, capsys) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time": 1.0, "loss": 10**400, "grad_norm": 2.0, "non_finite": None}) + "\n")
        file.write(json.dumps({"step": 5, "time": 1.0, "loss": float("nan"), "non_finite": ["loss", 7]}) + "\n")
    assert notes(run, capsys) == ["values that are not finite are not drawn: 7 (1), loss (1)"]


@pytest.mark.parametrize("step", [None, "3", -1])
def test_a_sample_without_a_step_is_left_out(step, run, capsys) -> None:
    with (run / "samples" / "step-3.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "prompt": "p", "completion": "lost"}) + "\n")
    (run / "samples" / "of no step.jsonl").write_text(json.dumps({"prompt": "p", "completion": "lost"}) + "\n")
    assert notes(run, capsys) == ["samples: 2 rows are not samples and were left out"]


def test_a_token_whose_kl_is_no_number_has_none(run, capsys) -> None:
    with (run / "samples" / "step-3.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p", "completion": "odd", "tokens": ["odd"], "kl": ["x"]}) + "\n")
    assert notes(run, capsys) == []
    assert '<span title="no KL">odd</span>' in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("versions.json", b"", "cannot be read and was left out (Expecting value: "),
        ("versions.json", b'{"stage": "sf', "cannot be read and was left out (Unterminated string"),
        ("versions.json", b"\xff\xfe", "cannot be read and was left out (&#x27;utf-8&#x27; codec"),
        ("versions.json", b"[1]", "holds no keys and values and was left out"),
        ("config.yaml", b"", "holds no keys and values and was left out"),
        ("config.yaml", b"a: [1, 2", "cannot be read and was left out (while parsing a flow sequence"),
        ("config.yaml", b"a: 1\x00\x00", "cannot be read and was left out (unacceptable character"),
        ("config.yaml", b"cut", "holds no keys and values and was left out"),
    ],
)
def test_a_damaged_file_of_settings_is_a_note(name, content, message, run, capsys) -> None:
    (run / name).write_bytes(content)
    (note,) = notes(run, capsys)
    assert note.startswith(f"{name}: {message}") and "\n" not in note


def test_one_run_may_be_given_without_a_list(run) -> None:
    assert write_report(str(run)) == write_report(run) == write_report([run]) == run / "report.html"
