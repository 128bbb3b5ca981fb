"""The log of every process but the first: nothing is written or shown, since the first writes the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.run.log import SAMPLES, RunLog


class SilentLog(RunLog):
    """`RunLog` that leaves no trace."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def resume(self, step: int) -> None:
        return None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        return None

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], name: str = "step") -> Path:
        return self.folder / SAMPLES / f"{name}-{step}.jsonl"

    def event(self, text: str) -> None:
        return None
