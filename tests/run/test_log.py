"""The records of a run: lines, resume, samples, the journal, the terminal."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.errors import EngineError
from engine.run import console
from engine.run.console import Display, number, printable, trend
from engine.run.log import RunLog, read_records
from engine.run.silent_log import SilentLog


def _records(folder: Path) -> list[dict[str, Any]]:
    records, broken = read_records(folder / "metrics.jsonl")
    assert broken == 0
    return records


def _timeless(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "time"} for r in _records(folder)]


def _write(log: RunLog, steps: range) -> None:
    """What a stage writes: metrics each step, an evaluation and samples at some."""
    for step in steps:
        log.metrics(step, {"loss": 1 / (step + 1), "lr": 1e-5})
        if step % 2 == 0:
            log.metrics(step, {"eval/loss": step * 0.5})
            log.samples(step, [{"step": step, "completion": "ä"}])


def test_a_line_holds_step_time_and_metrics(tmp_path: Path) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        log.metrics(3, {"loss": 0.1, "count": 7, "numpy": np.float32(0.5), "big": np.int64(2**40)})
        log.metrics(4, {"other": 1e-300})
    first, second = _records(tmp_path)
    assert first.pop("time") > 1.6e9
    assert first == {"step": 3, "loss": 0.1, "count": 7, "numpy": 0.5, "big": 2**40}
    assert second.keys() == {"step", "time", "other"} and second["other"] == 1e-300


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        log.metrics(1, {"loss": math.nan, "kl": -math.inf, "lr": 1.0})
    (record,) = _records(tmp_path)
    assert record["loss"] is None and record["kl"] is None and record["lr"] == 1.0
    assert record["non_finite"] == ["loss", "kl"]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "values", [{"step": 1.0}, {"x": "1"}, {"x": torch.tensor(1.0)}, {"x": None}]
)
def test_bad_metrics_are_refused_whole(tmp_path: Path, values: dict[str, Any]) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        with pytest.raises(EngineError, match="metrics: "):
            log.metrics(1, {"good": 1.0, **values})
        with pytest.raises(EngineError, match="step -1"):
            log.metrics(-1, {})
        with pytest.raises(EngineError, match="samples"):
            log.samples(1, [], name="../x")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("cut", [0, 7])
def test_resumed_equals_never_stopped(tmp_path: Path, cut: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with RunLog(whole, quiet=True) as log:
        _write(log, range(8))
    with RunLog(stopped, quiet=True) as log:
        _write(log, range(7))  # the checkpoint is at step 4
    if cut:  # a kill in the middle of the last line
        path = stopped / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
    with RunLog(stopped, quiet=True) as log:
        log.resume(4)
        _write(log, range(5, 8))
    assert _timeless(stopped) == _timeless(whole)
    names = sorted(p.name for p in (whole / "samples").iterdir())
    assert names == sorted(p.name for p in (stopped / "samples").iterdir())
    assert {"step-4.jsonl", "step-6.jsonl"} <= set(names)
    for folder in (whole, stopped):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [e.step for e in events.Scalars("loss")] == list(range(8))
        assert [e.value for e in events.Scalars("eval/loss")] == [0.0, 1.0, 2.0, 3.0]


def test_resume_names_a_broken_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "x": 1}\nbroken\n{"step": 2, "x": 2}\n[1]\n'
    )
    with RunLog(tmp_path, quiet=True) as log:
        log.resume(2)
    assert [r["step"] for r in _records(tmp_path)] == [1, 2]
    events, _ = read_records(tmp_path / "events.jsonl")
    assert [e["text"].split("metrics.jsonl:")[1][:2] for e in events] == ["2:", "4:"]


def test_a_new_run_in_a_used_folder_moves_the_old_records_aside(tmp_path: Path) -> None:
    for run in range(3):
        with RunLog(tmp_path, quiet=True) as log:
            log.metrics(1, {"run": float(run)})
            log.samples(1, [{"run": run}], name="before")
    assert [r["run"] for r in _records(tmp_path)] == [2.0]
    assert [r["run"] for r in _records(tmp_path / "previous-1")] == [0.0]
    assert json.loads((tmp_path / "previous-2/samples/before-1.jsonl").read_text()) == {"run": 1}
    events, _ = read_records(tmp_path / "events.jsonl")
    assert [e["text"][-10:] for e in events] == ["previous-1", "previous-2"]


def test_resume_comes_first(tmp_path: Path) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        log.metrics(1, {})
        with pytest.raises(RuntimeError, match="resume comes first"):
            log.resume(0)


def test_read_records_counts_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n3\n{"a": ')
    assert read_records(path) == ([{"a": 1}], 2)


EVIL = "a\x1b[2J\x9b31m\rb\u202ec\u2028d\ud800e\x00f\x7fé日\n"


def test_files_hold_no_control_characters_and_read_back_equal(tmp_path: Path) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        path = log.samples(2, [{"completion": EVIL}, {"completion": ""}], name="after")
        log.event(EVIL)
    text = path.read_bytes().decode()
    assert not any(c in text for c in "\x1b\x9b\r\u202e\u2028\x00\x7f") and "é日" in text
    assert [json.loads(line)["completion"] for line in text.splitlines()] == [EVIL, ""]
    assert read_records(tmp_path / "events.jsonl")[0][0]["text"] == EVIL


def test_samples_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        path = log.samples(
            1, [{"reward": math.nan, "kl": [0.5, math.inf], "deep": {"x": -math.inf}}]
        )
    assert json.loads(path.read_text()) == {"reward": None, "kl": [0.5, None], "deep": {"x": None}}


def test_printable() -> None:
    shown = printable(EVIL)
    assert shown == "a\\x1b[2J\\x9b31m\\x0db\\u202ec\\u2028d\\ud800e\\x00f\\x7fé日\n"
    assert printable("plain\ttext 日本 🙂\n") == "plain\ttext 日本 🙂\n"


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, total_steps=9, live=("loss", "kl", "absent"), title="sft") as log:
        log.metrics(1, {"kl": 0.123456, "hidden": 5.0, "loss": 1234.5})
        log.metrics(2, {"eval/loss": math.nan})
        log.event("saved \x1b[31m[red]checkpoint-2[/red]")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "sft 1/9  loss 1,234  kl 0.1235",
        "sft 2/9  eval/loss nan",
        "saved \\x1b[31m[red]checkpoint-2[/red]",
    ]


def test_plain_lines_in_a_terminal_of_another_encoding() -> None:
    code = (
        "import sys; from engine.run.console import Display;Display('sft', None, ()).event('日 é')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout == b"\\u65e5 \\xe9\n"


def test_quiet_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        log.metrics(1, {"loss": 1.0})
        log.event("something")
    assert capsys.readouterr().out == ""
    assert read_records(tmp_path / "events.jsonl")[0][0]["text"] == "something"


def test_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**options: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=100, **options)

    monkeypatch.setattr(console, "Console", terminal)
    display = Display("ppo", 10, ("objective/kl", "absent"))
    display.start()
    for step in range(4):
        display.metrics(step, {"objective/kl": step / 3, "unlisted": 1.0})
    display.event("[bold]not markup[/bold] \x1b[2J")
    display.stop()
    shown = screen.getvalue()
    assert "4/10" not in shown and "3/10" in shown
    assert "objective/kl" in shown and trend([0.0, 1 / 3, 2 / 3, 1.0]) in shown
    assert "unlisted" not in shown and "absent" not in shown
    assert "[bold]not markup[/bold] \\x1b[2J" in shown


def test_numbers_and_trends() -> None:
    assert [number(x) for x in (0.0, 1e-7, 0.12345678, 12345.6, -4000.0, 1e12, math.inf)] == [
        "0",
        "1e-07",
        "0.1235",
        "12,346",
        "-4,000",
        "1e+12",
        "inf",
    ]
    assert trend([1.0, math.nan, 2.0, 1.5]) == "▁█▅"
    assert trend([1.0]) == trend([2.0, 2.0]) == trend([]) == ""


def test_an_event_of_a_signal_in_the_middle_of_a_write(tmp_path: Path) -> None:
    with RunLog(tmp_path, quiet=True) as log:

        def handler(*_: object) -> None:
            log.event("asked to stop")

        class Interrupting(dict[str, float]):
            """Metrics during whose writing the signal arrives."""

            def items(self) -> Any:
                os.kill(os.getpid(), signal.SIGUSR1)
                return super().items()

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with log._writing():
                os.kill(os.getpid(), signal.SIGUSR1)
                assert not (tmp_path / "events.jsonl").exists()
            log.metrics(1, Interrupting(loss=1.0))
        finally:
            signal.signal(signal.SIGUSR1, before)
    events, _ = read_records(tmp_path / "events.jsonl")
    assert [e["text"] for e in events] == ["asked to stop"] * 2
    assert _records(tmp_path)[0]["loss"] == 1.0


def test_the_silent_log_says_nothing_whatever_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that a log can be asked, so that a new record is not one that the other processes trip over."""
    public = {name for name, member in vars(RunLog).items() if callable(member) and not name.startswith("_")}
    assert public | {"__init__", "__enter__", "__exit__"} <= vars(SilentLog).keys()
    with SilentLog(tmp_path / "run") as log:
        log.resume(1)
        log.metrics(1, {"loss": 1.0})
        log.event("begins")
        assert log.samples(1, [{"text": "a"}]) == tmp_path / "run" / "samples" / "step-1.jsonl"
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
