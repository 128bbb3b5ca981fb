"""What the terminal shows of a run: a bar, the live metrics with their trend; or plain lines.

Everything printed goes through `printable`: text of a model or of a data set may hold control
characters that a terminal would obey.
"""

from __future__ import annotations

import math
import re
import sys
from collections import deque
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

TREND_LENGTH = 24
LEVELS = "▁▂▃▄▅▆▇█"
# Controls (C0 but newline and tab, delete, C1), marks that reorder text, separators that some
# readers take for line ends, lone surrogates (not encodable), the byte-order mark.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: str, as_json: bool = False) -> str:
    """`text` with control characters written out, as \\x1b or \\u202e.

    `as_json`: `text` is JSON, where they only occur inside strings; written as JSON writes them.
    """

    def written(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\u{code:04x}" if as_json or code > 0xFF else f"\\x{code:02x}"

    return _CONTROL.sub(written, text)


def number(value: float) -> str:
    """A number in few characters: four digits, thousands with commas."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def trend(values: Mapping[int, float] | list[float]) -> str:
    """The finite values as a row of small bars, lowest to highest."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2 or min(finite) == max(finite):
        return ""
    low, high = min(finite), max(finite)
    return "".join(LEVELS[round((v - low) / (high - low) * (len(LEVELS) - 1))] for v in finite)


class Display:
    """A live display on a terminal, plain lines anywhere else."""

    def __init__(self, title: str, total_steps: int | None, live: tuple[str, ...]) -> None:
        self._title, self._total, self._names = title, total_steps, live
        self._history = {name: deque[float](maxlen=TREND_LENGTH) for name in live}
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(title, total=total_steps)
        self._live: Live | None = None

    def start(self) -> None:
        if self._console.is_terminal:
            self._live = Live(self._body(), console=self._console, refresh_per_second=4)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.update(self._body())
            self._live.stop()
            self._live = None

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name in self._names:
            if name in values:
                self._history[name].append(values[name])
        self.advance(step)
        if self._live is not None:
            self._live.update(self._body())
            return
        shown = [n for n in self._names if n in values] or list(values)[:6]
        of = f"/{self._total}" if self._total is not None else ""
        parts = [f"{self._title} {step}{of}", *(f"{n} {number(values[n])}" for n in shown)]
        self._print("  ".join(parts))

    def event(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(printable(text)))
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        line = printable(text) + "\n"
        encoding = sys.stdout.encoding or "utf-8"
        # A terminal of another encoding shows what it cannot write as \u escapes.
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()

    def _body(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name in self._names:
            history = self._history[name]
            if history:
                table.add_row(
                    Text("  " + name, style="dim"),
                    Text(number(history[-1]), style="bold"),
                    Text(trend(list(history)), style="cyan"),
                )
        return Group(self._progress, table)
