"""A side of a bench in a process of its own, stopped but for its turn: JSON orders in, JSON answers out, one a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any


class Served:
    """A program that says when it is ready (with its versions), then answers orders.

    It runs only inside `awake`, so that two sides on the same cores never disturb each other.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the program and waits until it is ready.

        Raises RuntimeError where it ends instead.
        """
        self.name = name
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,  # its helpers are stopped with it
        )
        try:
            self.versions: dict[str, str] = dict(self._answer()["versions"])
        except BaseException:  # also when this program is stopped: a start can take minutes
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to an order; inside `awake`. Raises RuntimeError where the program ends."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its missing answer says so
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._answer()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Running only inside the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def turn(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Awake for one order."""
        with self.awake():
            return self.ask(order)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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


def peer_environment(threads: int) -> dict[str, str]:
    """Of a program in a peer's own environment: nothing of ours on its path, nothing fetched."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    # Else a file of the program's folder could hide a package of the peer.
    environment["PYTHONSAFEPATH"] = "1"
    return environment
