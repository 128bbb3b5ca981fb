"""Tunes the Triton kernels' tables (engine/kernels/configs) on the GPU at hand: block sizes, warps and stages.

    python -m engine.tune                      every table, on the shapes of bench/gpu
    python -m engine.tune --op rmsnorm gae     the tables that these ops read
    python -m engine.tune --dry_run            what would be timed; needs no GPU

Each row of a table that a case reads is changed one value at a time, doubled, halved or one stage more or less, and
the fastest change is kept until none helps. A candidate that does not compile, does not fit, or gives another result
than the row did is left out. A row's bucket stays whole: a block that covers it is not made smaller. The column of
this GPU is rewritten, the others stay; run the tests of tests/triton afterwards. Exit codes: 0 done, 2 it cannot run.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels import _backend

CASES = "bench.gpu"  # a checkout's; the wheel has no benches
LEAST_GAIN = 0.02  # of the time: less is noise
ROUNDS = 6  # changes of one row, at most
NOT_BLOCKS = ("up_to", "num_warps", "num_stages")
EXIT_CANNOT = 2

Timer = Callable[[Callable[[], object]], float]  # -> milliseconds


class CannotTune(Exception):
    """What is missing, in one line."""


class Row(dict[str, Any]):
    """A row of a table that remembers whether a launch read it."""

    was_read = False

    def items(self) -> Any:  # what `config` makes a Config of
        self.was_read = True
        return super().items()


@dataclass(frozen=True)
class Workload:
    """One case in one dtype: `make(device)` gives its arguments, `run(*arguments)` is what is timed."""

    op: str
    name: str
    make: Callable[[str], tuple[Any, ...]]
    run: Callable[..., object]


@dataclass
class Entry:
    """One row of a table and the workloads that read it."""

    table: str
    row: Row
    workloads: list[Workload]

    def __str__(self) -> str:
        bound = "any size" if self.row["up_to"] is None else f"up to {self.row['up_to']}"
        return f"{self.table} ({bound})"


def load_workloads(module: str, ops: Sequence[str]) -> list[Workload]:
    """The cases of `module`, those of `ops` only where any are named. Raises CannotTune."""
    try:
        bench = importlib.import_module(module)
    except ImportError as error:
        raise CannotTune(
            f"the shapes to time are in {module}: {error}; run it in a checkout"
        ) from error
    cases = bench.cases()
    known = sorted({case.op for case in cases})
    for op in ops:
        if op not in known:
            near = difflib.get_close_matches(op, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CannotTune(f"--op: got {op!r}, want one of {', '.join(known)}{hint}")

    def make(case: Any, dtype: str) -> Callable[[str], tuple[Any, ...]]:
        return lambda device: tuple(case.make(device, getattr(torch, dtype), **case.full))

    return [
        Workload(case.op, f"{case.op}: {case.name}, {dtype}", make(case, dtype), case.run)
        for case in cases
        if not ops or case.op in ops
        for dtype in case.dtypes
    ]


@contextmanager
def reading(column: str) -> Iterator[dict[str, list[Row]]]:
    """Inside, launches read this column, whose rows are ours to change; table -> rows, filled as tables are met."""
    from engine.kernels.triton import _launch

    tables: dict[str, list[Row]] = {}
    for path in sorted(_launch.TABLES.glob("*.json")):
        loaded = _launch.table(path.stem)
        rows = [Row(row) for row in loaded[column]]
        tables[path.stem] = rows
        loaded[column] = rows  # type: ignore[assignment]
    token = _launch.column.set(column)
    try:
        yield tables
    finally:
        _launch.column.reset(token)
        _launch.table.cache_clear()


def entries(workloads: Sequence[Workload], tables: dict[str, list[Row]]) -> list[Entry]:
    """Every row that a workload reads, found on shapes alone: nothing is launched."""
    from engine.kernels.triton import _launch

    found: dict[tuple[str, int], Entry] = {}
    token = _launch.observer.set(lambda launch: False)
    try:
        for workload in workloads:
            for rows in tables.values():
                for row in rows:
                    row.was_read = False
            workload.run(*workload.make("meta"))
            for table, rows in tables.items():
                for index, row in enumerate(rows):
                    if row.was_read:
                        entry = found.setdefault((table, index), Entry(table, row, []))
                        entry.workloads.append(workload)
    finally:
        _launch.observer.reset(token)
    return [found[key] for key in sorted(found)]


def neighbours(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with one value changed: powers of two doubled or halved, warps up to 16, stages one off, 1 to 6."""
    changed = []
    for name, value in row.items():
        if name == "up_to" or not isinstance(value, int):
            continue
        if name == "num_stages":
            values = [n for n in (value - 1, value + 1) if 1 <= n <= 6]
        elif value < 1 or value & (value - 1):
            values = []
        else:
            values = [value // 2] if value > 1 else []
            values += [2 * value] if name != "num_warps" or value < 16 else []
        covers = name not in NOT_BLOCKS and row["up_to"] is not None and value >= row["up_to"]
        changed += [{**row, name: n} for n in values if not covers or n >= row["up_to"]]
    return changed


def tensors(result: object) -> list[Tensor]:
    """The floating tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, tuple | list):
        return [t for part in result for t in tensors(part)]
    return []


def agree(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Equal but for the rounding of sums in another order. A block that no longer covers a row is far off."""
    for o, w in zip(ours, wanted, strict=True):
        finite = torch.isfinite(w)
        if not torch.equal(torch.isfinite(o), finite):
            return False
        o, w = o[finite].float(), w[finite].float()
        if w.numel() and float((o - w).abs().max()) > 0.02 * float(w.abs().max()):
            return False
    return True


def improve(row: Row, measure: Callable[[], float | None], tell: Callable[[str], None]) -> None:
    """Changes `row` in place while that makes `measure()` smaller; None is a candidate that cannot be."""
    best = measure()
    if best is None:
        raise RuntimeError(f"the row itself cannot run: {dict(row)}")
    for _ in range(ROUNDS):
        here, fastest = dict(row), dict(row)
        for candidate in neighbours(here):
            row.update(candidate)
            time = measure()
            if time is not None and time < best * (1 - LEAST_GAIN):
                best, fastest = time, candidate
        row.update(fastest)
        if fastest == here:
            return
        changed = {name: value for name, value in fastest.items() if here[name] != value}
        tell(
            f"  {', '.join(f'{name} {here[name]} -> {value}' for name, value in changed.items())}: {best:.4g} ms"
        )


def measured(entry: Entry, device: str, timer: Timer) -> Callable[[], float | None]:
    """The geometric mean of the workloads' times on the row as it is now; None where one fails or is wrong.

    The first call, on the row as the table has it, gives the results that later ones must give too.
    """
    arguments = [workload.make(device) for workload in entry.workloads]
    wanted: list[list[Tensor]] = []

    def measure() -> float | None:
        logs, first = 0.0, not wanted
        for i, (workload, given) in enumerate(zip(entry.workloads, arguments, strict=True)):
            try:
                result = tensors(workload.run(*given))
                if first:
                    wanted.append([t.clone() for t in result])
                elif not agree(result, wanted[i]):
                    return None
                logs += math.log(timer(lambda: workload.run(*given)))  # noqa: B023
            except Exception:  # of the compiler, of the launch, of the launcher's checks
                if first:
                    raise
                return None
        return math.exp(logs / len(arguments))

    return measure


def format_table(table: dict[str, list[dict[str, Any]]]) -> str:
    """As the files of kernels/configs are written: a line a row."""
    columns = []
    for name, rows in table.items():
        columns.append(
            f'  "{name}": [' + ",\n    ".join(json.dumps(dict(row)) for row in rows) + "]"
        )
    return "{\n" + ",\n".join(columns) + "\n}\n"


def tune(
    workloads: Sequence[Workload],
    column: str,
    device: str,
    timer: Timer,
    tell: Callable[[str], None],
) -> None:
    """Rewrites the column of each table that the workloads read."""
    from engine.kernels.triton import _launch

    with reading(column) as tables:
        for entry in entries(workloads, tables):
            tell(f"{entry}: {', '.join(w.name for w in entry.workloads)}")
            before = dict(entry.row)
            improve(entry.row, measured(entry, device, timer), tell)
            if dict(entry.row) != before:
                path = _launch.TABLES / f"{entry.table}.json"
                whole = json.loads(path.read_text())
                whole[column] = tables[entry.table]
                path.write_text(format_table(whole))


def show(workloads: Sequence[Workload], column: str, tell: Callable[[str], None]) -> None:
    """What `tune` would time first."""
    with reading(column) as tables:
        for entry in entries(workloads, tables):
            names = ", ".join(w.name for w in entry.workloads)
            tell(
                f"{entry}: {dict(entry.row)} and {len(neighbours(entry.row))} changes of it, on {names}"
            )
    tell(f"column {column}; a row that no case reads is left as it is")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--op", nargs="+", default=[], metavar="OP", help="ops to tune (default: all)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be timed, then stop"
    )
    parser.add_argument(
        "--cases",
        default=CASES,
        metavar="MODULE",
        help=f"module with the shapes to time (default: {CASES})",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse(argv)
    try:
        if _backend.why_no_triton():
            raise CannotTune(_backend.why_no_triton())
        workloads = load_workloads(args.cases, args.op)
        from engine.kernels.triton import _launch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if args.dry_run:
            show(workloads, _launch.architecture(device), print)
            return 0
        if device.type != "cuda":
            raise CannotTune(
                f"no GPU: torch {torch.__version__} sees none; --dry_run lists what would be timed"
            )
        import triton

        timer: Timer = lambda run: float(triton.testing.do_bench(run, return_mode="median"))  # noqa: E731
        tell: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
        tell(f"{torch.cuda.get_device_name(device)}: column {_launch.architecture(device)}")
        tune(workloads, _launch.architecture(device), "cuda", timer, tell)
    except CannotTune as error:
        sys.stderr.write(f"python -m engine.tune: {error}\n")
        return EXIT_CANNOT
    return 0


if __name__ == "__main__":
    sys.exit(main())
