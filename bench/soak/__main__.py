"""`python -m bench.soak [--minutes 60] [--seed N] [--output_dir DIR] [--results DIR]`: never lose a run, for an hour.

PPO of a tiny model runs twice with one config: undisturbed, and disturbed for about so many minutes: killed at any
moment, asked to stop, refused by the disk, its newest checkpoint damaged, its reward function failing, a second run
started beside it; each time the start must end as documented and the next one goes on. At the end both folders must
hold the same bytes; memory, open files and threads of the undisturbed run must be flat, and nothing may be left of any
run.

The first violated expectation ends it with exit code 1, and the folder stays as it was. Otherwise all but soak.json is
removed from the folder, and with --results the same goes to DIR/soak-<class>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine, records
from bench.soak import SoakError, verdict
from bench.soak.faults import AT_THE_END, FAULTS
from bench.soak.play import LOST, Play
from bench.soak.setting import Setting, make_inputs
from bench.soak.start import Start
from bench.soak.system import Sample, shared_memory
from engine import ops
from engine.errors import EngineError

RESULT = "soak.json"
CALIBRATION = 60  # iterations
SAVE_STEPS, FEW_SAVE_STEPS = 8, 2
SHORT = 40  # iterations below which checkpoints come more often


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [fault.name for fault in (*FAULTS, AT_THE_END)]
    parser.add_argument("--minutes", type=float, default=60.0, help="of the disturbed side; the other takes about half")
    parser.add_argument("--iterations", type=int, help="so many instead, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of what befalls them")
    parser.add_argument("--faults", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--results", type=Path, help="folder for soak-<class>.json")
    args = parser.parse_args(words)
    if args.minutes <= 0 or (args.iterations is not None and args.iterations < 6):
        parser.error(f"got --minutes {args.minutes:g} --iterations {args.iterations}, want above 0 and at least 6")
    args.output_dir = args.output_dir.resolve()
    if args.output_dir.exists() and {p.name for p in args.output_dir.iterdir()} - {RESULT}:
        parser.error(f"--output_dir: {args.output_dir} is not empty; remove it or give another folder")
    return args


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run from beginning to end: CPU seconds to its first iteration and an iteration since then, and its samples."""

    start_s: float
    iteration_s: float
    samples: list[Sample]


def undisturbed(setting: Setting, out: Path) -> Undisturbed:
    """Runs it.

    Raises:
        SoakError: it fails by itself.
    """
    with Start(setting, out, out.name) as start:
        code, samples = start.sampled()
    if code:
        raise SoakError(f"the undisturbed run ended with exit code {code}: {start.log}")
    verdict.no_processes(setting.mark)
    verdict.no_temporary_files(setting.temporary)
    if len(samples) < 2 or samples[-1].step == samples[0].step:
        raise SoakError(f"the undisturbed run was over before two iterations were seen: {start.log}")
    first, last = samples[0], samples[-1]
    a_step = (last.cpu_s - first.cpu_s) / (last.step - first.step)
    return Undisturbed(first.cpu_s - a_step * first.step, a_step, samples)


def calibrated(folder: Path, args: argparse.Namespace) -> int:
    """Iterations for the asked minutes, half of which go by with starting, from a short run."""
    setting = Setting(folder, CALIBRATION, SAVE_STEPS, args.seed)
    setting.write()
    found = undisturbed(setting, folder / "calibration")
    pace = paced(found)
    starts = 60 * args.minutes / (found.start_s + pace * found.iteration_s)
    iterations = max(CALIBRATION, round(starts * (pace - LOST * SAVE_STEPS)))
    print(
        f"a start takes {found.start_s:.1f} s, an iteration {1000 * found.iteration_s:.0f} ms: {iterations} iterations",
        flush=True,
    )
    return iterations


def paced(found: Undisturbed) -> int:
    """Iterations a start, so that half of the time is iterations."""
    return max(2, round(found.start_s / found.iteration_s))


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides and the verdict, as plain values. Raises SoakError at the first violated expectation."""
    folder, shared = args.output_dir, shared_memory()
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder, args.seed)
    iterations = args.iterations or calibrated(folder, args)
    setting = Setting(folder, iterations, SAVE_STEPS if iterations > SHORT else FEW_SAVE_STEPS, args.seed)
    setting.write()
    whole, out = folder / "undisturbed", folder / "disturbed"
    began = time.monotonic()
    found = undisturbed(setting, whole)
    seconds = time.monotonic() - began
    print(f"undisturbed: {iterations} iterations in {seconds:.0f} s", flush=True)
    faults = [fault for fault in FAULTS if fault.name in args.faults]
    pace = min(paced(found), max(1, iterations // (4 * max(1, len(faults)))))
    budget = None if args.iterations else 60 * args.minutes
    play = Play(setting, out, faults, pace, budget, found.start_s, found.iteration_s, lambda t: print(t, flush=True))
    play.at_the_end = AT_THE_END.name in args.faults
    play.run()
    verdict.same_bytes(out, whole)
    verdict.no_shared_memory(shared)
    return {
        "iterations": iterations,
        "seed": args.seed,
        "minutes": round((time.monotonic() - play.began) / 60, 1),
        "undisturbed_minutes": round(seconds / 60, 1),
        "starts": play.count,
        "faults": dict(sorted(play.counts.items())),
        "ends": dict(sorted(play.ends.items())),
        **flatness(whole, found.samples),
    }


def flatness(whole: Path, samples: list[Sample]) -> dict[str, Any]:
    """Memory, open files and threads of the undisturbed run, each refused where it rises."""
    peak = verdict.course(*verdict.peaks(whole))
    resident = verdict.course([s.step for s in samples], [s.resident for s in samples])
    counts = verdict.counts_are_flat(samples)
    print(
        f"peak memory: slope {peak.per_1000:.3g} MB per 1,000 iterations over {peak.iterations}, {peak.first:.1f} to"
        f" {peak.last:.1f} MB; resident: slope {resident.per_1000:.3g}, {resident.first:.1f} to {resident.last:.1f} MB"
    )
    verdict.memory_is_flat("peak memory", peak)
    verdict.memory_is_flat("resident memory", resident)
    return {
        "peak_memory_mb": dataclasses.asdict(peak),
        "resident_memory_mb": dataclasses.asdict(resident),
        "memory_bound_mb": {"noise": verdict.NOISE_MB, "per_1000": verdict.MB_PER_1000},
        **{name.replace(" ", "_"): list(pair) for name, pair in counts.items()},
        "median_resident_mb": statistics.median(s.resident for s in samples),
    }


def told(found: dict[str, Any]) -> str:
    """The result in plain words."""
    faults = ", ".join(f"{count} x {name}" for name, count in found["faults"].items())
    return (
        f"{found['iterations']} iterations of PPO in {found['starts']} starts and {found['minutes']:g} minutes ended"
        f" with the bytes of a run that was never disturbed ({found['undisturbed_minutes']:g} minutes). {faults}."
        f" Peak memory rises by {found['peak_memory_mb']['per_1000']:.3g} MB per 1,000 iterations; open files"
        " and threads stay; no process, temporary file or shared memory is left."
    )


def main(words: list[str] | None = None) -> int:
    args = parsed(words)
    head = records.header({"cores": machine.cores()})
    head["date"] = datetime.now(UTC).date().isoformat()
    kept = args.output_dir / RESULT
    try:
        found = soak(args)
    except (SoakError, EngineError) as failed:
        kept.write_text(json.dumps({**head, "verdict": f"failed: {failed}"}, indent=1) + "\n")
        sys.stderr.write(f"bench.soak: {failed}\nkept: {args.output_dir}\n")
        return 1
    text = json.dumps({**head, **records.rounded(found), "verdict": "passed"}, indent=1) + "\n"
    kept.write_text(text)
    for path in args.output_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != kept:
            path.unlink()
    print(told(found))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"soak-{ops.cpu_class()}.json").write_text(text)
        print(f"written: {args.results / f'soak-{ops.cpu_class()}.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
