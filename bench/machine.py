"""`python -m bench.machine [--threads N] [--output FILE]`: this machine's own limits.

FMA and AMX peak, read and copy bandwidth by size, the cost of a barrier: what every other figure is a distance from.
They are measured by machine.cpp, compiled here for exactly this processor. A limit is a limit, so the best counts: of
five timings in each of several runs, since on a shared machine one run may fall into somebody else's busy second.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
RUNS = 3
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-Wno-psabi")


def cores() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def limits(threads: int) -> dict[str, Any]:
    """`fma_gflops`, `amx_bf16_gflops` where there is AMX, `read_gb_per_s` and `copy_gb_per_s` by size, `barrier_us`.

    Raises `CalledProcessError` or `FileNotFoundError` without a C++ compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "machine"
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(program)], check=True)
        runs = []
        for _ in range(RUNS):
            done = subprocess.run(
                [str(program), str(threads)], check=True, capture_output=True, text=True
            )
            runs.append(json.loads(done.stdout))
    return functools.reduce(best, runs)


def best(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The better figure of two runs: the lower cost of a barrier, the higher rate of all else."""
    out: dict[str, Any] = {}
    for name, value in one.items():
        if isinstance(value, dict):
            out[name] = best(value, other[name])
        else:
            out[name] = (min if name == "barrier_us" else max)(value, other[name])
    return out


def rate(by_size: dict[str, float], size: float) -> float:
    """Bytes a second at the largest measured size that is no larger than `size` bytes: the nearest faster one."""
    rates = {int(label.split()[0]) << 10: value for label, value in by_size.items()}
    below = [measured for measured in rates if measured <= size]
    return rates[max(below) if below else min(rates)] * 1e9


def read_rate(found: dict[str, Any], size: float) -> float:
    """Bytes a second that both cores together read from a working set of `size` bytes."""
    return rate(found["read_gb_per_s"], size)


def copy_rate(found: dict[str, Any], size: float) -> float:
    """Bytes a second, read and written ones together, of copying where `size` bytes are touched in all."""
    return rate(found["copy_gb_per_s"], size / 2)


def memory_copy_rate(found: dict[str, Any]) -> float:
    """The same of memory: the better of the two largest sizes, which no cache holds."""
    return max(list(found["copy_gb_per_s"].values())[-2:]) * 1e9


def product_rate(found: dict[str, Any]) -> float:
    """FLOP a second of the fastest products that this machine has."""
    return float(found.get("amx_bf16_gflops", found["fma_gflops"])) * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = json.dumps(limits(args.threads), indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
