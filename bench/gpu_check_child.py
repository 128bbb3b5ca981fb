"""A process of `make gpu-check`: pieces of the work, one after the other, a line of JSON a row.

    python -m bench.gpu_check_child --model DIR PIECE ...

An error inside a kernel leaves a process whose GPU does nothing more, and a kernel can hang. So this process ends where
the GPU answers no more or a piece takes too long, and bench/gpu_check.py starts another for the pieces behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench import gpu_check_kernels, gpu_check_workloads
from bench.gpu_check import Row, failure
from bench.gpu_check_kernels import Place, attempted

LIMIT = 1800  # seconds a piece
EXIT_BROKEN = 3


def environment() -> Row:
    """Of the GPU, the driver and the packages."""
    from engine.run.session import versions

    properties = torch.cuda.get_device_properties(0)
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        **versions(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton,
        "platform": platform.platform(),
        "driver": driver(),
    }


def driver() -> str:
    """Its version, the highest clock and the power limit."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown: no nvidia-smi"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown: nvidia-smi says nothing"


def workload(piece: str, model: Path, place: Place) -> Iterator[Row]:
    """A piece that is no case of a kernel."""
    kind, _, number = piece.partition(" ")
    if kind == "decode":
        row = attempted(lambda: gpu_check_workloads.decode(model, int(number), place.device))
        yield {"workload": "rollout", "sequences": int(number), "by": "engine", **row}
    elif kind == "train":
        row = attempted(lambda: gpu_check_workloads.train(model, place.device))
        yield {"workload": "training step", "by": "engine", **row}
    elif kind == "vllm":
        yield from gpu_check_workloads.vllm(model)
    elif kind == "model":
        yield gpu_check_workloads.random_model(model)
    elif kind == "environment":
        yield environment()
    else:
        raise ValueError(f"piece: got {piece!r}, want a case of bench/gpu or a workload")


def rows_of(piece: str, model: Path, place: Place) -> Iterator[Row]:
    """All that a piece has to say; what stops it is its last row."""
    try:
        if "," in piece:
            yield from gpu_check_kernels.time_kernels(piece, place)
        else:
            yield from workload(piece, model, place)
    except Exception as error:
        yield {"piece": piece, **failure(error)}


def why_broken(device: str) -> str:
    """Empty where the device still answers; gives its memory back."""
    if device != "cuda":
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return str(failure(error)["error"])
    return ""


def work(pieces: Sequence[str], model: Path, place: Place, say: Callable[[Row], None]) -> int:
    """Says {"row": ...} for each row and {"done": piece} after each piece."""
    try:
        for piece in pieces:
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
            for row in rows_of(piece, model, place):
                say({"row": row})
                reason = why_broken(place.device)
                if reason:
                    sys.stderr.write(
                        f"after {json.dumps(row)} the GPU does nothing more: {reason}\n"
                    )
                    return EXIT_BROKEN
            say({"done": piece})
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_check_child", None, __doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("pieces", nargs="+")
    args = parser.parse_args(argv)
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no row

    def say(row: Row) -> None:
        rows.write(json.dumps(row) + "\n")
        rows.flush()

    return work(args.pieces, args.model, Place(), say)


if __name__ == "__main__":
    sys.exit(main())
