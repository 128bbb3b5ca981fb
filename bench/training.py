"""One training workload on both sides, in turns: what bench.ppo and bench.train have in common.

Each side is a process of its own, stopped while the other one runs, so that its peak memory is its own. Before
anything is timed both are warmed up and must agree: on losses and gradient norms of the same rows, or, where each side
samples its own answers, on the log-probs of the answers that the peer has sampled. A ratio is of seconds a token, real
tokens only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, records
from bench.opponent import Missing, add_dtype_flag
from bench.served import Served, peer_environment
from bench.training_cases import Case
from bench.workloads import spread

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """What a run is made with, on both sides."""

    model: str
    dtype: str  # the engine's storage
    peer_dtype: str
    threads: int


@contextmanager
def work_file(case: Case) -> Iterator[Path]:
    """The work as a file that both sides read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(case.work))
        yield path


def own_side(case: Case, work: Path, setting: Setting) -> Served:
    """The engine in a process of its own."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, "-m", "bench.training_engine", case.name, "--work", str(work)]
    command += ["--model", setting.model, "--dtype", setting.dtype]
    command += ["--threads", str(setting.threads)]
    return Served("engine", command, {**environment, "OMP_NUM_THREADS": str(setting.threads)})


def peer_side(case: Case, work: Path, setting: Setting, python: Path) -> Served:
    """The peer in its own environment."""
    program = str(HERE / "training_peer.py")
    command = [str(python), program, case.peer, case.name, "--work", str(work)]
    command += ["--model", setting.model, "--dtype", setting.peer_dtype]
    command += ["--threads", str(setting.threads)]
    return Served(case.peer, command, peer_environment(setting.threads))


def python_of(peer: str, args: argparse.Namespace) -> Path:
    """The peer's interpreter: --peer_python, or peers/<name>/bin/python. Raises Missing where there is none."""
    if args.peer_python is not None:
        path = args.peer_python
    elif args.peers is not None:
        path = args.peers / peer / "bin" / "python"
    else:
        raise Missing("no --peers DIR")
    if not path.exists():
        raise Missing(f"no {path}; want an environment with the peer installed")
    return Path(path)


def differing(
    ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]], near: Mapping[str, float]
) -> str:
    """What is further apart than `near` allows, relative to the peer's number; empty where nothing is."""
    for name, tolerance in near.items():
        if len(ours[name]) != len(theirs[name]):
            return f"{name}: got {len(ours[name])} numbers from the engine, {len(theirs[name])} from the peer"
        for own, other in zip(ours[name], theirs[name], strict=True):
            if not math.isclose(own, other, rel_tol=tolerance, abs_tol=1e-6):
                return f"{name}: the engine has {own:.6g}, the peer {other:.6g}, want {tolerance:g} relative"
    return ""


def warm_up(case: Case, ours: Served, theirs: Served) -> dict[str, list[float]]:
    """Warms both sides up; the engine's numbers that the peer agrees with. Raises RuntimeError where it does not."""
    found = theirs.turn({"warm_up": True})
    if "sampled" in found:  # before the engine's own first step changes its policy
        own = ours.turn({"score": found["sampled"]})
        ours.turn({"warm_up": True})
    else:
        own = ours.turn({"warm_up": True})
    wrong = differing(own["checks"], found["checks"], case.agree)
    if wrong:
        raise RuntimeError(f"{case.name}: the two sides do not do the same work: {wrong}")
    agreed: dict[str, list[float]] = own["checks"]
    return agreed


def compared(case: Case, ours: Served, theirs: Served, repeats: int) -> Row:
    """Both sides in turns: ratios of seconds a token, peak memory, what was agreed on before."""
    checks = warm_up(case, ours, theirs)
    pairs = [(ours.turn({}), theirs.turn({})) for _ in range(repeats)]
    if not case.work.get("stop") and any(a["tokens"] != b["tokens"] for a, b in pairs):
        raise RuntimeError(f"{case.name}: the two sides had different numbers of tokens")
    costs = [[side["seconds"] / side["tokens"] for side in pair] for pair in pairs]
    columns: Row = {}
    for at, prefix in enumerate(("", "peer_")):
        side = [pair[at] for pair in pairs]
        columns[f"{prefix}seconds"] = statistics.median(x["seconds"] for x in side)
        columns[f"{prefix}tokens"] = statistics.median(x["tokens"] for x in side)
        columns[f"{prefix}peak_memory_gb"] = max(x["peak_memory_gb"] for x in side)
    return {
        **spread([other / own for own, other in costs]),
        "memory_ratio": columns["peak_memory_gb"] / columns["peer_peak_memory_gb"],
        **columns,
        "repeats": repeats,
        "checked": {name: values[0] for name, values in checks.items() if name in case.agree},
    }


def against(case: Case, python: Path, setting: Setting, repeats: int) -> Row:
    """A row of one workload against one peer."""
    with (
        work_file(case) as work,
        peer_side(case, work, setting, python) as theirs,
        own_side(case, work, setting) as ours,
    ):
        row = compared(case, ours, theirs, repeats)
        return {
            "workload": case.name,
            "sequences": case.sequences,
            "peer": case.peer,
            "peer_dtype": setting.peer_dtype,
            "peer_versions": theirs.versions,
            **row,
        }


def add_flags(
    parser: argparse.ArgumentParser, workloads: tuple[str, ...], peers: tuple[str, ...]
) -> None:
    """What both programs are told."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--peers", type=Path, help="folder with NAME/bin/python of each peer")
    parser.add_argument("--peer", choices=peers, help="this one only, which then has to be there")
    parser.add_argument("--peer_python", type=Path, help="its python, instead of --peers")
    parser.add_argument("--only", nargs="+", choices=workloads, default=workloads, metavar="NAME")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="the engine's storage"
    )
    add_dtype_flag(parser)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, *counts: str) -> None:
    """Ends the program on what says nothing."""
    for name in ("repeats", "threads", *counts):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, want 1 or more")
    if args.peer_python is not None and args.peer is None:
        parser.error("--peer_python: got it without --peer, want the name of the peer that it has")


def rows_against(
    program: str, cases: Iterator[Case], args: argparse.Namespace, setting: Setting
) -> Iterator[Row]:
    """Every case whose peer is there. Raises SystemExit where the peer was asked for by its name and is not."""
    for case in cases:
        if args.peer is not None and case.peer != args.peer:
            continue
        try:
            python = python_of(case.peer, args)
        except Missing as reason:
            told = f"{program}: {case.name} against {case.peer} is skipped: {reason}"
            if args.peer is not None:
                sys.exit(told)
            print(told)
            continue
        yield against(case, python, setting, args.repeats)


def keep(rows: Iterator[Row], path: Path, dtype: str, limits: Row) -> None:
    """Shows each row and writes it at once: what is measured outlives a stop."""
    for row in rows:
        row = {**row, "dtype": dtype}
        hidden = ("peer_versions", "dtype")
        shown = {k: v for k, v in records.rounded(row).items() if k not in hidden}
        print(json.dumps(shown), flush=True)
        records.write(path, [row], limits)
