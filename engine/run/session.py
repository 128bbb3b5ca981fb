"""A run folder while a stage writes to it: config, log, checkpoints, and stopping in good order.

Ctrl-C and SIGTERM ask for a stop: the stage finishes its step, saves and raises `Stopped`, which says how to go on.
A stage called outside the main thread leaves the handlers of both signals as they are.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from engine import ops
from engine.config import RunConfig, to_dict
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.kernels.linear import exact_products
from engine.run import checkpoint, files, memory
from engine.run.distributed import ALONE, Ranks
from engine.run.flops import Totals
from engine.run.log import RunLog, next_previous
from engine.run.resume import check_same_run, with_effect
from engine.run.saver import Saver
from engine.run.sharded_checkpoint import ShardedSaver, is_sharded_checkpoint
from engine.run.sharded_checkpoint import load as load_sharded
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
    """The process's largest resident memory so far, in 10^9 bytes."""
    return memory.peak_resident_bytes() / memory.GB


def set_threads(threads: int | None) -> int:
    """The cores this process may use, or fewer if asked; inter-op threads stay at one."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def settle_cpu(config: RunConfig, ranks: Ranks) -> None:
    """The run's threads, and that its kernels are of the class that it asks for.

    Raises:
        ConfigError: kernels of another class are loaded already; once a process is too late to choose.
    """
    wanted, used = config.cpu_class, ops.cpu_class()
    if wanted is not None and used not in (wanted, "reference"):
        raise ConfigError(
            f"cpu_class: got {wanted!r}, want {used!r}, the class of the kernels that this process has loaded; set"
            " ENGINE_CPU_CLASS before it starts, or use python -m engine.train, which does"
        )
    set_threads(ranks.threads(config.threads))


def refuse_a_used_folder(folder: Path, resume: str | None) -> None:
    """Checkpoints of an earlier run and of this one in one folder could be taken for each other."""
    there = checkpoint.kept(folder)
    if there and resume is None:
        raise ConfigError(
            f"output_dir: {folder} holds {there[-1].name} of an earlier run; go on with it"
            " (--resume_from_checkpoint true), or give another folder"
        )


def saver_of(folder: Path, keep: int, ranks: Ranks) -> Saver:
    """What writes checkpoints: beside the training of one process, or all ranks together."""
    return Saver(folder, keep) if ranks.mesh is None else ShardedSaver(folder, keep, ranks)


class Session:
    """Context manager around a stage's loop: `start` once, then `resume`, then `check` and `save` as it goes.

    With several `ranks` all of them make the same calls in the same order; the first one holds the folder and writes.
    """

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
        ranks.by_first(self._claim)
        self._asked_to_stop = False
        self._handlers: dict[int, Any] = {}
        self._lock: AbstractContextManager[None] = nullcontext()  # the first holds the folder, for all
        if ranks.is_first:
            self._lock = files.folder_lock(self.folder)
        self.totals = Totals()
        self._products = exact_products(config.exact_logprobs)
        self._saver = saver_of(self.folder, config.num_checkpoints, ranks)
        self._inputs: dict[str, str] = {}
        self._found: Path | None = None
        self._saved_at: int | None = None
        self.log: RunLog = SilentLog(self.folder)
        if ranks.is_first:
            self.log = RunLog(
                self.folder, total_steps=total_steps, live=live, quiet=not config.progress, title=stage
            )

    def _claim(self) -> None:
        with files.refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        refuse_a_used_folder(self.folder, self.config.goes_on_from)

    def __enter__(self) -> Session:
        try:
            self.ranks.by_first(self._lock.__enter__)
        except BaseException:
            self._saver.close()
            raise
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
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
        try:
            self._finish_saving(error)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._products.__exit__(kind, error, trace)
            self.log.__exit__(kind, error, trace)
            self._lock.__exit__(kind, error, trace)
            self._saver.close()

    def _finish_saving(self, error: BaseException | None) -> None:
        """The last checkpoint comes to be whatever ended the run; its own failure does not hide that."""
        try:
            self._saver.wait()
        except EngineError as failed:
            if error is None:
                raise
            self.log.event(str(failed))
        self._tell_saved()

    def _tell_saved(self) -> dict[str, float]:
        """Events of the checkpoints that came to be, and the metrics of the last of them."""
        metrics: dict[str, float] = {}
        for saved in self._saver.finished():
            self.log.event(str(saved))
            metrics = saved.metrics()
        return metrics

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self._asked_to_stop = True
        self.log.event(f"{signal.Signals(number).name}: finishing this step, then saving")

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks ask together."""
        return self.ranks.any(self._asked_to_stop)

    def start(self, inputs: Mapping[str, str], reports: Sequence[str]) -> None:
        """Find the checkpoint to go on from, refuse one of another run, and write what the run is.

        `inputs` says what the run reads besides its config, by name (engine/run/resume.py); `reports` are lines for
        the journal. Writes config.yaml, which runs this stage again, and versions.json.

        Raises:
            CheckpointError: the checkpoint is of a config or of inputs that would give another result.
        """
        self._inputs = dict(inputs)
        found, lines = self.ranks.by_first(self._find)
        self._found = None if found is None else Path(found)
        config = to_dict(self.config) | {"allow_config_change": []}  # allowed once, not for good
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.write("config.yaml", f"# stage: {self.stage}\n{text}")
        made_with = json.dumps({"stage": self.stage, **versions()}, indent=1) + "\n"
        self.write("versions.json", made_with)
        for line in (*lines, *reports):
            self.log.event(line)

    def _find(self) -> tuple[str | None, list[str]]:
        """(path of the checkpoint to go on from, lines about it); its bytes are verified, its tensors not yet read."""
        wanted = self.config.goes_on_from
        if wanted is None:
            return None, []
        lines: list[str] = []
        if wanted == "true":
            newest, damaged = checkpoint.newest_whole(self.folder)
            lines += [f"passed over: {text}" for text in damaged]
            if newest is None:
                return None, [f"no checkpoint in {self.folder}: starting at the beginning"]
            wanted, manifest = str(newest), checkpoint.read_manifest(newest)
        else:
            manifest = checkpoint.verify(wanted)
        path = Path(wanted)
        state = checkpoint.read_state(path)
        stage, step = (state.get(name) for name in ("stage", "step"))
        if (stage, step) != (self.stage, manifest["step"]):
            raise CheckpointError(
                f"{wanted}: is of stage {str(stage)[:20]!r} at step {str(step)[:20]},"
                f" want stage {self.stage!r} at step {manifest['step']}"
            )
        allowed = self.config.allow_config_change
        lines += check_same_run(path, state, to_dict(self.config), self._inputs, allowed)
        return wanted, [*lines, f"going on from {wanted}"]

    def resume(self, like: Mapping[str, Mapping[str, Tensor]]) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, if `start` found one; the records go on after it. `like` as of `load`."""
        path, self._found = self._found, None
        if path is None:
            return None
        found = self.load(path, like)
        self.ranks.by_first(lambda: self._settle(found))
        self.log.resume(found.step)
        self._saved_at = found.step
        return found

    def _settle(self, found: checkpoint.Checkpoint) -> None:
        """The folder's checkpoints as they were at that step; later ones, of an attempt given up, go aside."""
        if found.path.resolve().parent != self.folder.resolve():
            return
        with files.refusals_named(self.folder):
            checkpoint.settle(self.folder, found.step, self.config.num_checkpoints)
            if self.config.goes_on_from == "true":
                return  # the newest whole one: later ones are damaged, and stay until new ones replace them
            aside = next_previous(self.folder)
            moved = checkpoint.set_aside(self.folder, found.step, aside)
        if moved:
            self.log.event(f"checkpoints of an earlier attempt were moved to {aside}: {', '.join(moved)}")

    def load(self, path: Path, like: Mapping[str, Mapping[str, Tensor]]) -> checkpoint.Checkpoint:
        """A checkpoint, written by any number of ranks. `like` is what is wanted of it, group -> name -> a tensor of
        the same shape: sharded ones come back sharded in the same way."""
        if self.ranks.mesh is None and not is_sharded_checkpoint(path):
            return checkpoint.load(path)
        return load_sharded(path, like, self.ranks)

    def check(self) -> dict[str, float]:
        """Metrics of the checkpoint that came to be since the last call; call it at every step.

        Raises:
            OutputError: writing one failed; the ones before it are untouched.
        """
        self._saver.check()
        return self._tell_saved()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        interim: bool = False,
    ) -> None:
        """Save, in the background; `interim`: beside the schedule. Nothing is done when `step` was saved already."""
        if step == self._saved_at:
            return
        more = {"step": step, "stage": self.stage, "config": with_effect(to_dict(self.config))}
        more["inputs"] = self._inputs
        self._saver.save(step, tensors, {**state, **more}, interim)
        self._saved_at = step

    def wait_for_save(self) -> None:
        """Until the last checkpoint is on the disk. Raises `OutputError` when it could not be written."""
        self._saver.wait()
        self._tell_saved()

    def write(self, name: str, text: str) -> None:
        """A file of the run folder, whole or not there."""
        self.ranks.by_first(lambda: files.replace(self.folder / name, text))

    @contextmanager
    def publishing(self) -> Iterator[Path]:
        """`files.published` of the run folder, for models that are written inside with `export`."""
        with ExitStack() as stack:
            aside = self.ranks.by_first(lambda: str(stack.enter_context(files.published(self.folder))))
            yield Path(aside)
            self.ranks.by_first(stack.close)

    def export(self, made: Made, write: Callable[[Made], None]) -> None:
        """The first rank writes what all have made together, and the others wait for it."""
        self.ranks.by_first(lambda: write(made))

    def say_totals(self) -> None:
        """At the end: operations, their rate and the padding that packing saved, by phase."""
        for line in self.totals.lines():
            self.log.event(line)

    def stop_if_asked(self, step: int) -> None:
        """Raises Stopped when the state of `step` is on the disk; call it after saving. Asked since then, it leaves the
        next step to save."""
        if self._saved_at == step and self.stop_requested:
            self.wait_for_save()
            raise Stopped(self.stage, str(self.folder), step)
