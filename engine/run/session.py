"""A run folder while a stage writes to it: config, log, checkpoints, and stopping in good order.

Ctrl-C and SIGTERM ask for a stop: the stage finishes its step, saves and raises `Stopped`, which says how to go on.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from engine import ops
from engine.config import RunConfig, to_dict
from engine.errors import ConfigError
from engine.kernels.linear import exact_products
from engine.run import checkpoint
from engine.run.distributed import ALONE, Ranks
from engine.run.log import RunLog
from engine.run.sharded_checkpoint import is_sharded_checkpoint
from engine.run.sharded_checkpoint import load as load_sharded
from engine.run.sharded_checkpoint import save as save_sharded
from engine.run.silent_log import SilentLog

Made = TypeVar("Made")


class Stopped(Exception):
    """The run was asked to stop; it is saved and can go on."""

    def __init__(self, stage: str, output_dir: str, step: int) -> None:
        super().__init__(
            f"stopped after step {step} and saved; go on with:\n  python -m engine.train --stage {stage}"
            f" --config {output_dir}/config.yaml --resume_from_checkpoint true"
        )


def versions() -> dict[str, str]:
    """What the run was made with, for its records."""
    out = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_class": ops.cpu_class(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for package in ("rlhf-engine", "torch", "transformers", "safetensors", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        out["commit"] = done.stdout.strip() or "unknown"
    return out


def peak_memory_gb() -> float:
    """The process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def set_threads(threads: int | None) -> int:
    """The cores this process may use, or fewer if asked; inter-op threads stay at one."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def refuse_a_used_folder(folder: Path, resume: str | None) -> None:
    """Checkpoints of an earlier run and of this one in one folder could be taken for each other."""
    there = checkpoint.kept(folder)
    if there and (resume is None or resume.lower() == "false"):
        raise ConfigError(
            f"output_dir: {folder} holds {there[-1].name} of an earlier run; go on with it"
            " (--resume_from_checkpoint true), or give another folder"
        )


class Session:
    """Context manager around a stage's loop."""

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        total_steps: int,
        live: tuple[str, ...],
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.stage, self.ranks = config, stage, ranks
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_a_used_folder(self.folder, config.resume_from_checkpoint)
        self._asked_to_stop = False
        self._handlers: dict[int, Any] = {}
        self._products = exact_products(config.exact_logprobs)
        if ranks.is_first:
            self.log = RunLog(
                self.folder, total_steps=total_steps, live=live, quiet=not config.progress, title=stage
            )
        else:
            self.log = SilentLog(self.folder)

    def __enter__(self) -> Session:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._request_stop)
        self._products.__enter__()
        self.log.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._products.__exit__(kind, error, trace)
        self.log.__exit__(kind, error, trace)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self._asked_to_stop = True
        self.log.event(f"{signal.Signals(number).name}: finishing this step, then saving")

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks ask together."""
        return self.ranks.any(self._asked_to_stop)

    def write_config(self) -> None:
        """config.yaml, which runs this stage again, and versions.json."""
        if not self.ranks.is_first:
            return
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True)
        (self.folder / "config.yaml").write_text(f"# stage: {self.stage}\n{text}")
        (self.folder / "versions.json").write_text(
            json.dumps({"stage": self.stage, **versions()}, indent=1) + "\n"
        )

    def resume(self, like: Mapping[str, Mapping[str, Tensor]]) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, if the config asks for one and there is one; `like` as of `load`."""
        wanted = self.config.resume_from_checkpoint
        if wanted is None or wanted.lower() == "false":
            return None
        if wanted.lower() == "true":
            newest = checkpoint.latest(self.folder) if self.ranks.is_first else None
            wanted = self.ranks.text_of_first("" if newest is None else str(newest))
            if not wanted:
                self.log.event(f"no checkpoint in {self.folder}: starting at the beginning")
                return None
        found = self.load(Path(wanted), like)
        self.log.resume(int(found.state["step"]))
        self.log.event(f"going on from {wanted}")
        return found

    def load(self, path: Path, like: Mapping[str, Mapping[str, Tensor]]) -> checkpoint.Checkpoint:
        """A checkpoint, written by any number of ranks. `like` is what is wanted of it, group -> name -> a tensor of
        the same shape: sharded ones come back sharded in the same way."""
        if self.ranks.mesh is None and not is_sharded_checkpoint(path):
            return checkpoint.load(path)
        return load_sharded(path, like, self.ranks)

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        state, keep = {**state, "step": step, "stage": self.stage}, self.config.save_total_limit
        if self.ranks.mesh is None:
            groups = {group: dict(named) for group, named in tensors.items()}
            checkpoint.save(self.folder, step, groups, state, keep)
        else:
            save_sharded(self.folder, step, tensors, state, keep, self.ranks)

    def export(self, made: Made, write: Callable[[Made], None]) -> None:
        """The first rank writes what all have made together, and the others wait for it."""
        if self.ranks.is_first:
            write(made)
        self.ranks.wait()

    def stop_if_asked(self, step: int) -> None:
        """Raises Stopped; call it after saving."""
        if self.stop_requested:
            raise Stopped(self.stage, str(self.folder), step)
