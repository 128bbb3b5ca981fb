"""What the suites have in common: the work of a case, and rows that say how far ours is from the others and the limit.

A suite's parameter `name` is an implementation: "engine" is ours, every other one an alternative; the other parameters
are the case. Times are each one's best round: what disturbs a round on a shared machine only adds to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine

OURS = "engine"
COMPILED_ROWS = 2048  # torch.compile takes seconds a shape, so it runs in this one

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One benchmark: its best round in seconds, and the work that nobody can do without."""

    op: str
    case: str
    name: str
    seconds: float
    work: dict[str, Any] = field(default_factory=dict)


def work(benchmark: Any, size: float = 0, flop: float = 0, bf16: bool = False) -> None:
    """Notes bytes that must be read or written, FLOP, and whether products may take bfloat16 operands."""
    benchmark.extra_info.update(bytes=size, flop=flop, bf16=bf16)


def skip_most_compiled(name: str, rows: int, *others: bool) -> None:
    """torch.compile only at one size, and only where all `others` hold."""
    if name == "compiled" and not (rows == COMPILED_ROWS and all(others)):
        pytest.skip("torch.compile takes seconds a shape: one size only")


def least_seconds(found: Row, limits: Row) -> float:
    """The limit of this work: bytes at the faster of reading and copying, FLOP at the peak; 0 without any."""
    size, flop = found.get("bytes", 0), found.get("flop", 0)
    memory = max(machine.read_rate(limits, size), machine.copy_rate(limits, size))
    peak = machine.product_rate(limits) if found.get("bf16") else limits["fma_gflops"] * 1e9
    return max(size / memory, flop / peak)


def rows_of(measured: Iterable[Measured], limits: Row) -> list[Row]:
    """A row a case that has ours: microseconds of all, the fastest other one over ours, ours over the limit."""
    cases: dict[tuple[str, str], dict[str, Measured]] = {}
    for one in measured:
        cases.setdefault((one.op, one.case), {})[one.name] = one
    rows = []
    for (op, case), by_name in cases.items():
        if OURS not in by_name:
            continue
        own = by_name.pop(OURS)
        row: Row = {"op": op, "case": case, "ours_us": own.seconds * 1e6}
        if by_name:
            other = min(by_name.values(), key=lambda one: one.seconds)
            row["alternative"] = other.name
            row["alternatives_us"] = {name: one.seconds * 1e6 for name, one in by_name.items()}
            row["ratio"] = other.seconds / own.seconds
        least = least_seconds(own.work, limits)
        if least:
            row["floor_ratio"] = own.seconds / least
        rows.append(row)
    return rows


def lines(rows: list[Row]) -> list[str]:
    """A table for the terminal."""
    head = ("op", "case", "ours us", "best other us", "other", "ratio", "times limit")
    cells = [head]
    for row in rows:
        other = row.get("alternative", "")
        theirs = f"{row['alternatives_us'][other]:.1f}" if other else ""
        ratio = f"{row['ratio']:.2f}" if other else ""
        limit = f"{row['floor_ratio']:.2f}" if "floor_ratio" in row else ""
        cells.append((row["op"], row["case"], f"{row['ours_us']:.1f}", theirs, other, ratio, limit))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells]


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """By op and case; a newer row takes the older one's place."""
    rows = {(row["op"], row["case"]): row for row in old}
    rows.update(((row["op"], row["case"]), row) for row in new)
    return list(rows.values())


def write(path: Path, rows: list[Row], limits: Row) -> None:
    """One row a line: the file is read in diffs."""
    from bench.records import header, rounded

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    text = json.dumps({**header(limits), "threads": torch.get_num_threads()}, indent=1)[:-2]
    body = ",\n".join("  " + json.dumps(row) for row in merged(old, [rounded(r) for r in rows]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "rows": [\n{body}\n ]\n}}\n')
