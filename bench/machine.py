"""`python -m bench.machine [--threads N] [--output FILE]`: this machine's own limits.

FMA and AMX peak, read and copy bandwidth by size, the cost of a barrier: what every other figure is a distance from.
They are measured by machine.cpp, compiled here for exactly this processor; best of five, since a limit is a limit.
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
        done = subprocess.run(
            [str(program), str(threads)], check=True, capture_output=True, text=True
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def memory_rate(found: dict[str, Any]) -> float:
    """Bytes a second from memory: the largest size read."""
    return float(list(found["read_gb_per_s"].values())[-1]) * 1e9


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
