"""A run folder while a stage writes to it: config, log, checkpoints, and stopping in good order.

Ctrl-C and SIGTERM ask for a stop: the stage finishes its step, saves and raises `Stopped`, which says how to go on.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import yaml
from torch import Tensor

from engine import ops
from engine.config import RunConfig, to_dict
from engine.errors import ConfigError
from engine.kernels.linear import exact_products
from engine.run import checkpoint, memory
from engine.run.flops import Totals
from engine.run.log import RunLog


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
    """The process's largest resident memory so far, in 10^9 bytes."""
    return memory.peak_resident_bytes() / memory.GB


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
        self, config: RunConfig, stage: str, total_steps: int, live: tuple[str, ...]
    ) -> None:
        self.config, self.stage = config, stage
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_a_used_folder(self.folder, config.resume_from_checkpoint)
        self.stop_requested = False
        self._handlers: dict[int, Any] = {}
        self.totals = Totals()
        self._products = exact_products(config.exact_logprobs)
        self.log = RunLog(
            self.folder, total_steps=total_steps, live=live, quiet=not config.progress, title=stage
        )

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
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.stop_requested = True
        self.log.event(f"{signal.Signals(number).name}: finishing this step, then saving")

    def write_config(self) -> None:
        """config.yaml, which runs this stage again, and versions.json."""
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True)
        (self.folder / "config.yaml").write_text(f"# stage: {self.stage}\n{text}")
        (self.folder / "versions.json").write_text(
            json.dumps({"stage": self.stage, **versions()}, indent=1) + "\n"
        )

    def resume(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, if the config asks for one and there is one."""
        wanted = self.config.resume_from_checkpoint
        if wanted is None or wanted.lower() == "false":
            return None
        if wanted.lower() == "true":
            newest = checkpoint.latest(self.folder)
            if newest is None:
                self.log.event(f"no checkpoint in {self.folder}: starting at the beginning")
                return None
            wanted = str(newest)
        found = checkpoint.load(Path(wanted))
        self.log.resume(int(found.state["step"]))
        self.log.event(f"going on from {wanted}")
        return found

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        checkpoint.save(
            self.folder,
            step,
            {group: dict(named) for group, named in tensors.items()},
            {**state, "step": step, "stage": self.stage},
            keep=self.config.save_total_limit,
        )

    def say_totals(self) -> None:
        """At the end: operations, their rate and the padding that packing saved, by phase."""
        for line in self.totals.lines():
            self.log.event(line)

    def stop_if_asked(self, step: int) -> None:
        """Raises Stopped; call it after saving."""
        if self.stop_requested:
            raise Stopped(self.stage, str(self.folder), step)
