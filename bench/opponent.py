"""Peers of bench.rollout, each a process that is stopped while the engine runs.

They lie in one folder: hf/bin/python and vllm/bin/python with the peer installed, llama/ with llama.cpp's
llama-batched-bench and the model as f16.gguf or bf16.gguf somewhere in it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import served
from bench.workloads import Case
from engine import ops

NAMES = ("hf", "vllm", "llama")
# Classes whose peers are fastest in float32: without bf16 instructions, or with ones of half its rate, as those that
# Sapphire Rapids has beside its tiles. Where `avx512` is another CPU, --peer_dtype says so.
FLOAT32_FIRST = ("plain", "avx2", "avx512")
DTYPES = ("float32", "bfloat16")


def best_dtype(cpu_class: str) -> str:
    """What peers on this class are measured in, unless told."""
    return "float32" if cpu_class in FLOAT32_FIRST else "bfloat16"


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer_dtype",
        choices=DTYPES,
        default=best_dtype(ops.cpu_class()),
        help="the peers'; by default their best on this class",
    )


class Missing(Exception):
    """The peer is not in the folder; says what is wanted."""


class Opponent(ABC):
    """A peer: `run(case)` gives its seconds and its new tokens."""

    name = ""
    dtype = ""
    versions: dict[str, str] = {}

    def can(self, case: Case) -> bool:
        """Whether the peer knows this workload."""
        return True

    @abstractmethod
    def run(self, case: Case) -> tuple[float, int]:
        """Seconds and new tokens."""

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Running only inside the block."""
        yield

    def __enter__(self) -> Opponent:
        return self

    def __exit__(self, *error: object) -> None:
        return


class Served(served.Served, Opponent):
    """Hugging Face or vLLM in its own environment (peer.py)."""

    def __init__(self, name: str, python: Path, model: str, dtype: str, threads: int) -> None:
        self.dtype = dtype
        program = Path(__file__).with_name("peer.py")
        command = [str(python), str(program), name, "--model", model, "--dtype", dtype]
        command += ["--threads", str(threads)]
        super().__init__(name, command, served.peer_environment(threads))

    def run(self, case: Case) -> tuple[float, int]:
        order = {
            "prompts": case.prompts,
            "max_new_tokens": case.max_new_tokens,
            "stop": list(case.stop),
        }
        answer = self.ask(order)
        return float(answer["seconds"]), int(answer["tokens"])


class Llama(Opponent):
    """llama.cpp's own batched benchmark, which does not sample: its best case."""

    name = "llama"

    def __init__(self, program: Path, gguf: Path, threads: int) -> None:
        self.dtype = gguf.stem
        self.versions = {"llama.cpp": llama_version(program)}
        self._command = [str(program), "-m", str(gguf), "-c", "9000", "-b", "2048", "-ub", "512"]
        self._command += ["-t", str(threads), "-tb", str(threads)]

    def can(self, case: Case) -> bool:
        return not case.stop

    def run(self, case: Case) -> tuple[float, int]:
        sizes = (len(case.prompts[0]), case.max_new_tokens, case.sequences)
        words = [
            w
            for flag, n in zip(("-npp", "-ntg", "-npl"), sizes, strict=True)
            for w in (flag, str(n))
        ]
        done = subprocess.run([*self._command, *words], check=True, capture_output=True, text=True)
        return llama_seconds(done.stdout), case.sequences * case.max_new_tokens


def llama_seconds(table: str) -> float:
    """Prefill and decode of the last row of llama-batched-bench's table: its columns T_PP and T_TG."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    numbers = [row for row in rows if row[0].isdigit()]
    if not numbers:
        raise RuntimeError(f"llama-batched-bench: no row of numbers in:\n{table}")
    named = dict(zip(rows[0], numbers[-1], strict=True))
    return float(named["T_PP s"]) + float(named["T_TG s"])


def llama_version(program: Path) -> str:
    """The package that the source came in; without one, what the program says of itself."""
    packages = [part for part in program.parts if re.fullmatch(r"llama_cpp_python-[\d.]+", part)]
    if packages:
        return packages[-1]
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False)
    said = re.findall(r"version: (.+)", done.stdout + done.stderr)
    return said[0] if said else "unknown"


def opponent(name: str, peers: Path, model: str, dtype: str, threads: int) -> Opponent:
    """The peer in a dtype; llama.cpp's weights are of 16 bits, float16 for float32.

    Raises Missing where it is not in `peers`.
    """
    if name != "llama":
        python = peers / name / "bin" / "python"
        if not python.exists():
            raise Missing(f"no {python}; want an environment with the peer installed")
        return Served(name, python, model, dtype, threads)
    folder, wanted = peers / "llama", "f16.gguf" if dtype == "float32" else "bf16.gguf"
    programs = sorted(folder.rglob("llama-batched-bench"))
    models = sorted(folder.rglob(wanted))
    programs = [p for p in programs if p.is_file() and os.access(p, os.X_OK)]
    if not programs or not models:
        raise Missing(
            f"{folder}: got {len(programs)} llama-batched-bench and {len(models)} {wanted}, want one of each"
        )
    return Llama(programs[0], models[0], threads)
