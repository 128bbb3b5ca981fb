"""Checkpoints in the background: training waits for the copy to memory, a thread writes it to the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.run import checkpoint
from engine.run.files import refusals_named

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """One checkpoint: where, its size, seconds that training waited for it, seconds that writing took."""

    path: Path
    gigabytes: float
    waited: float
    wrote: float

    def metrics(self) -> dict[str, float]:
        return {
            "timing/checkpoint_wait": self.waited,
            "timing/checkpoint_write": self.wrote,
            "perf/checkpoint_gb": self.gigabytes,
        }

    def __str__(self) -> str:
        return (
            f"{self.path.name}: {self.gigabytes:.3g} GB written in {self.wrote:.2f} s,"
            f" training waited {self.waited:.2f} s"
        )


class Saver:
    """At most one checkpoint is being written; an error of the writing is raised by the next call of any method.

    While one is being written its tensors exist twice: in training and in the copy.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: list[Saved] = []

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any], interim: bool) -> None:
        """Copy now, write beside the caller. Waits for the checkpoint before, if it is still being written."""
        began = time.perf_counter()
        self.wait()
        copies = {
            group: {name: copied(t) for name, t in named.items()}
            for group, named in tensors.items()
        }
        waited = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, dict(state), interim, waited), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last call, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OutputError: the disk refused the checkpoint; the ones before it are untouched.
            CheckpointError: the state cannot be written as asked.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finished(self) -> list[Saved]:
        """The checkpoints that came to be since the last call."""
        saved, self._saved = self._saved, []
        return saved

    def close(self) -> None:
        """The end, when nothing is being written: one process holds nothing that would have to be let go."""

    def _write(
        self, step: int, tensors: Tensors, state: Mapping[str, Any], interim: bool, waited: float
    ) -> None:
        began = time.perf_counter()
        try:
            with refusals_named(self.root / f"checkpoint-{step}"):
                path = checkpoint.save(self.root, step, tensors, state, self.keep, interim)
                size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
            self._saved = [*self._saved, Saved(path, size, waited, time.perf_counter() - began)]
        except BaseException as error:  # whatever it was, the next call raises it
            self._error = error


def copied(tensor: Tensor) -> Tensor:
    """A copy in the host's memory that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()
