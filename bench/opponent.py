"""Peers of bench.rollout, each a process that is stopped while the engine runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.workloads import Case


class Opponent:
    """A peer: `run(case)` gives its seconds and its new tokens."""

    name = ""

    def can(self, case: Case) -> bool:
        """Whether the peer knows this workload."""
        raise NotImplementedError

    def run(self, case: Case) -> tuple[float, int]:
        raise NotImplementedError

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

    def __init__(self, name: str, python: str, model: str, dtype: str, threads: int) -> None:
        self.name = name
        program = Path(__file__).with_name("peer.py")
        command = [python, str(program), name, "--model", model, "--dtype", dtype]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # its helpers are stopped with it
        )
        self.seconds_to_start = float(self._answer()["ready"])
        self._signal(signal.SIGSTOP)

    def can(self, case: Case) -> bool:
        return True

    def run(self, case: Case) -> tuple[float, int]:
        assert self._process.stdin is not None
        order = {
            "prompts": case.prompts,
            "max_new_tokens": case.max_new_tokens,
            "stop": case.stop,
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
        os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer {self.name} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Llama(Opponent):
    """llama.cpp's own batched benchmark, which does not sample: its best case."""

    name = "llama"

    def __init__(self, program: str, gguf: str | None, threads: int) -> None:
        if gguf is None:
            raise SystemExit("bench.rollout: --peer llama needs --gguf, the model as GGUF")
        self._command = [program, "-m", gguf, "-c", "9000", "-b", "2048", "-ub", "512"]
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
        rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
        numbers = [row for row in rows if row[1].strip().isdigit()]
        if not numbers:
            raise RuntimeError(f"llama-batched-bench: no row of numbers in:\n{done.stdout}")
        seconds = float(numbers[-1][5]) + float(numbers[-1][7])  # prefill and decode
        return seconds, case.sequences * case.max_new_tokens
