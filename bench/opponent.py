"""Peers of bench.rollout, each a process that is stopped while the engine runs.

They lie in one folder: hf/bin/python and vllm/bin/python with the peer installed, llama/ with llama.cpp's
llama-batched-bench and the model as f16.gguf or bf16.gguf somewhere in it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.workloads import Case

NAMES = ("hf", "vllm", "llama")
NO_BF16 = (
    "avx2",
    "plain",
)  # classes without bf16 instructions: every peer's bf16 is far slower there


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


class Served(Opponent):
    """Hugging Face or vLLM in its own environment (peer.py)."""

    def __init__(self, name: str, python: Path, model: str, dtype: str, threads: int) -> None:
        self.name, self.dtype = name, dtype
        program = Path(__file__).with_name("peer.py")
        command = [str(python), str(program), name, "--model", model, "--dtype", dtype]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        # Else a file of this folder could hide a package of the peer.
        environment["PYTHONSAFEPATH"] = "1"
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # its helpers are stopped with it
        )
        try:
            self.versions = dict(self._answer()["versions"])
        except BaseException:  # also when this program is stopped: a start can take minutes
            self.__exit__()
            raise
        self._signal(signal.SIGSTOP)

    def run(self, case: Case) -> tuple[float, int]:
        assert self._process.stdin is not None
        order = {
            "prompts": case.prompts,
            "max_new_tokens": case.max_new_tokens,
            "stop": list(case.stop),
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return float(answer["seconds"]), int(answer["tokens"])

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def __exit__(self, *error: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended: the next answer says so
            os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the peer {self.name} ended with code {self._process.wait()}; its words are above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


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


def opponent(name: str, peers: Path, model: str, cpu_class: str, threads: int) -> Opponent:
    """The peer in the dtype that is its best on this class.

    Raises Missing where it is not in `peers`.
    """
    slow = cpu_class in NO_BF16
    if name != "llama":
        python = peers / name / "bin" / "python"
        if not python.exists():
            raise Missing(f"no {python}; want an environment with the peer installed")
        return Served(name, python, model, "float32" if slow else "bfloat16", threads)
    folder, wanted = peers / "llama", "f16.gguf" if slow else "bf16.gguf"
    programs = sorted(folder.rglob("llama-batched-bench"))
    models = sorted(folder.rglob(wanted))
    programs = [p for p in programs if p.is_file() and os.access(p, os.X_OK)]
    if not programs or not models:
        raise Missing(
            f"{folder}: got {len(programs)} llama-batched-bench and {len(models)} {wanted}, want one of each"
        )
    return Llama(programs[0], models[0], threads)
