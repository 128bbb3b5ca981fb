"""What must hold during a soak and at its end. Each check raises SoakError, which says what was found and wanted.

Memory. The peak of a process never falls, and on a heap of small tensors it goes on creeping for a while: rare lengths
make rare sizes. So the least-squares slope is taken after a warm-up, and what is refused is a rise over all iterations
seen that `NOISE_MB` and `MB_PER_1000` together do not cover. One kilobyte leaked an iteration is 1 MB per 1,000.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from same_run import differences

from bench.soak import SoakError
from bench.soak.start import Start
from bench.soak.system import Sample, in_use, marked, shared_memory
from engine.run import checkpoint

WARM_UP = 0.2  # of the iterations
NOISE_MB = 4.0
MB_PER_1000 = 0.5
LOOKS, LOOK_S = 240, 0.25  # for what is just ending
SHOWN = 5


@dataclass(frozen=True)
class Course:
    """A quantity over iterations: its slope per 1,000, the iterations it is taken over, its first and last value."""

    per_1000: float
    iterations: int
    first: float
    last: float


def course(steps: Sequence[int], values: Sequence[float]) -> Course:
    """Least squares over what comes after the warm-up.

    Raises:
        SoakError: fewer than three values are left.
    """
    start = steps[0] + WARM_UP * (steps[-1] - steps[0]) if steps else 0
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if step >= start]
    if len(kept) < 3:
        raise SoakError(f"memory: {len(kept)} iterations seen after the warm-up, want 3 or more: give more minutes")
    x, y = zip(*kept, strict=True)
    slope = statistics.linear_regression(x, y).slope * 1000
    return Course(slope, x[-1] - x[0], y[0], y[-1])


def memory_is_flat(name: str, found: Course) -> None:
    allowed = NOISE_MB + MB_PER_1000 * found.iterations / 1000
    rise = found.per_1000 * found.iterations / 1000
    if rise > allowed:
        raise SoakError(
            f"{name} rises by {found.per_1000:.3g} MB per 1,000 iterations, {rise:.3g} MB over {found.iterations};"
            f" want at most {NOISE_MB:g} MB and {MB_PER_1000:g} MB per 1,000 iterations"
        )


def peaks(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and peaks of the resident memory in MB, as the run itself recorded them after each iteration."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "perf/peak_memory_gb" in row]
    return [int(row["step"]) for row in rows], [1000 * float(row["perf/peak_memory_gb"]) for row in rows]


def counts_are_flat(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Open files and threads: the fewest in the first fifth after the warm-up and in the last fifth, since a checkpoint
    that is being written opens files and has a thread for a moment.

    Raises:
        SoakError: there are more at the end.
    """
    kept = samples[round(WARM_UP * len(samples)) :]
    part = max(3, len(kept) // 5)
    found = {}
    for name, values in (("open files", [s.files for s in kept]), ("threads", [s.threads for s in kept])):
        first, last = min(values[:part]), min(values[-part:])
        if last > first:
            raise SoakError(f"{name}: {first} after the warm-up, {last} at the end; want no more")
        found[name] = (first, last)
    return found


def same_bytes(out: Path, whole: Path) -> None:
    """The models, checkpoints, samples and metrics of both runs; of metrics.jsonl all but times."""
    found = differences(out, whole)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise SoakError(f"not the bytes of the undisturbed run: {'; '.join(found[:SHOWN])}{more}")


def went_on_from(start: Start, damaged: Path | None) -> None:
    """Where a start came as far as saying what it goes on from, that is the newest whole checkpoint there was."""
    events = start.events()
    wanted = f"going on from {start.came_from}" if start.came_from else "no checkpoint in"
    said = [text for text in events if text.startswith(("going on from", "no checkpoint in"))]
    if said and not said[0].startswith(wanted):
        raise SoakError(f"a start says {said[0]!r}, want {wanted!r}: {start.log}")
    if said and damaged is not None:
        passed_over = [t for t in events if t.startswith("passed over") and f"/{damaged.name}" in t]
        if not passed_over:
            raise SoakError(f"{damaged} was damaged, but no event says that it is passed over: {start.log}")


def broken_checkpoints(out: Path) -> dict[str, str]:
    """Name -> what is wrong, of those that are not whole."""
    found = {}
    for path in checkpoint.kept(out):
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError as error:
            found[plain_name(path)] = str(error)
    return found


def plain_name(path: Path) -> str:
    """Of a checkpoint that a kill caught between two renames, the name that it had."""
    return path.name[path.name.index("checkpoint-") :]


def no_processes(mark: str, looks: int = LOOKS) -> None:
    """A command that a killed run had just begun may take a moment to end."""
    for look in range(looks):
        left = marked(mark)
        if not left:
            return
        if look < looks - 1:
            time.sleep(LOOK_S)
    raise SoakError(f"processes outlive the run that started them: {', '.join(left)}")


def no_temporary_files(temporary: Path) -> None:
    left = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*"))
    if left:
        raise SoakError(f"{temporary}: files are left in the runs' TMPDIR: {', '.join(left[:SHOWN])}")


def no_shared_memory(before: frozenset[str]) -> None:
    """Nothing new but what another program is using."""
    new = shared_memory() - before
    left = sorted(new - in_use(new)) if new else []
    if left:
        raise SoakError(f"shared memory is left: {', '.join(left)}")
