"""The records of a run, and what the terminal shows of it.

    metrics.jsonl          one JSON object a line: step, time (seconds since 1970), then the metrics
    samples/<name>-N.jsonl one sampled answer a line, written at step N
    events.jsonl           what happened and when: a journal, which a resumed run continues
    tensorboard/           the metrics again, for TensorBoard

A metric that is not finite is null in its line and named in the line's list `non_finite`. On resume
everything after the resumed step is dropped: the files end as if the run had never stopped.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.run import files
from engine.run.console import Display, printable

if TYPE_CHECKING:  # imports torch, which engine.report does without
    from torch.utils.tensorboard import SummaryWriter

METRICS, SAMPLES, EVENTS, TENSORBOARD = "metrics.jsonl", "samples", "events.jsonl", "tensorboard"
RESERVED = frozenset({"step", "time", "non_finite"})
_SAMPLE = re.compile(r"([A-Za-z0-9_]+)-(\d+)\.jsonl")


class RunLog:
    """Writes a run folder's records; a context manager around the stage's loop.

    `live` names the metrics that the terminal follows, `total_steps` is the length of its bar and
    `title` its name; `quiet` shows nothing and records all the same. Call `resume` before the first
    record to go on with an earlier run; else earlier records are moved aside to `previous-K/`.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        total_steps: int | None = None,
        live: Sequence[str] = (),
        quiet: bool = False,
        title: str = "run",
    ) -> None:
        self.folder = Path(folder)
        with files.refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._display = Display(title, total_steps, tuple(live)) if not quiet else None
        self._tensorboard: SummaryWriter | None = None  # open from the first record on
        self._pending: deque[str] = deque()
        self._is_writing = False

    def __enter__(self) -> RunLog:
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._writing():  # an event that a signal left behind
            if self._tensorboard is not None:
                self._close_tensorboard()
        if self._display is not None:
            self._display.stop()

    def _close_tensorboard(self) -> None:
        assert self._tensorboard is not None
        writer, self._tensorboard = self._tensorboard, None
        with files.refusals_named(self.folder / TENSORBOARD):
            writer.close()

    def resume(self, step: int) -> None:
        """Go on after `step`: metrics and samples of later steps are dropped, TensorBoard's too.

        A last line that a kill cut off is dropped with them.
        """
        if self._tensorboard is not None:
            raise RuntimeError("RunLog.resume: records were written already; resume comes first")
        self._truncate_metrics(step)
        for path in self._sample_files():
            match = _SAMPLE.fullmatch(path.name)
            if match and int(match[2]) > step:
                path.unlink()
        self._open(purge_step=step + 1)
        if self._display is not None:
            self._display.advance(step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record one line. Several lines of one step, and other names each time, are fine.

        Raises `EngineError` for a reserved name or a value that is not a number.
        """
        record = self._record(step, values)
        with self._writing():
            writer = self._opened()
            files.append(self.folder / METRICS, _line(record))
            with files.refusals_named(self.folder / TENSORBOARD):
                for name, value in record.items():
                    if value is not None and name not in RESERVED:
                        writer.add_scalar(name, value, step, walltime=record["time"])
            if self._display is not None:
                self._display.metrics(step, {name: float(v) for name, v in values.items()})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], name: str = "step") -> Path:
        """Write rows to `samples/<name>-<step>.jsonl`, whole or not at all.

        Numbers in them that are not finite become null.
        """
        file_name = f"{name}-{step}.jsonl"
        if not _SAMPLE.fullmatch(file_name):
            raise EngineError(
                f"samples: got name {name!r} at step {step}, want letters, digits and _, step >= 0"
            )
        path = self.folder / SAMPLES / file_name
        with self._writing():
            self._opened()
            with files.refusals_named(path):
                path.parent.mkdir(exist_ok=True)
            files.replace(path, "".join(_line(_finite(row)) for row in rows))
        return path

    def event(self, text: str) -> None:
        """Record a sentence in the journal and show it. Safe in a signal handler of this thread."""
        self._pending.append(text)
        if not self._is_writing:  # else whoever is writing shows it when done
            with self._writing():
                pass

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A signal may interrupt a write, and a second one to the same file would then fail."""
        self._is_writing = True
        try:
            yield
            while self._pending:
                text = self._pending.popleft()
                files.append(self.folder / EVENTS, _line({"time": round(time.time(), 3), "text": text}))
                if self._display is not None:
                    self._display.event(text)
        finally:
            self._is_writing = False

    def _record(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        if step < 0:
            raise EngineError(f"metrics: got step {step}, want a step >= 0")
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        non_finite: list[str] = []
        for name, value in values.items():
            if name in RESERVED:
                raise EngineError(f"metrics: the name {name!r} is the log's own; want another one")
            if not isinstance(value, Real):
                raise EngineError(
                    f"metrics: {name} is {value!r} ({type(value).__name__}), want a number; "
                    "call .item() on a tensor"
                )
            if not math.isfinite(value):
                non_finite.append(name)
                record[name] = None
            else:
                record[name] = int(value) if isinstance(value, Integral) else float(value)
        if non_finite:
            record["non_finite"] = non_finite
        return record

    def _opened(self) -> SummaryWriter:
        if self._tensorboard is None:
            self._move_earlier_records()
            self._open(purge_step=None)
        assert self._tensorboard is not None
        return self._tensorboard

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with files.refusals_named(self.folder / TENSORBOARD):
            self._tensorboard = SummaryWriter(
                str(self.folder / TENSORBOARD), purge_step=purge_step, flush_secs=10
            )

    def _sample_files(self) -> list[Path]:
        folder = self.folder / SAMPLES
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def _move_earlier_records(self) -> None:
        """A new run in a used folder: what was there stays readable and is mixed with nothing."""
        there = [n for n in (METRICS, SAMPLES, TENSORBOARD) if (self.folder / n).exists()]
        if not there:
            return
        aside = next_previous(self.folder)
        aside.mkdir()
        for name in there:
            (self.folder / name).rename(aside / name)
        self._pending.append(f"records of an earlier run were moved to {aside}")

    def _truncate_metrics(self, step: int) -> None:
        path = self.folder / METRICS
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = []
        for count, line in enumerate(lines, start=1):
            if not line:  # after the last newline
                continue
            try:
                written_at = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                self.event(f"{path}:{count}: not a record, dropped ({line[:60]!r})")
                continue
            if written_at <= step:
                kept.append(line + "\n")
        files.replace(path, "".join(kept))


def next_previous(folder: Path) -> Path:
    """Where to move what is of an earlier run or attempt: the first `previous-K/` that is not there yet."""
    number_of_earlier = 1
    while (folder / f"previous-{number_of_earlier}").exists():
        number_of_earlier += 1
    return folder / f"previous-{number_of_earlier}"


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a `.jsonl` file, and how many of its lines are none (a cut last line)."""
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    return records, broken


def _finite(value: Any) -> Any:
    """The same JSON value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Mapping[str, Any]) -> str:
    """One line of JSON, readable in any language and harmless in a terminal."""
    return printable(json.dumps(record, ensure_ascii=False, allow_nan=False), as_json=True) + "\n"
