"""Checkpoints that all ranks of a run write and any number of ranks reads, through torch.distributed.checkpoint.

    checkpoint-N/
        shard-R-model-1-of-1.safetensors   what rank R - 1 holds: "<group>/<name>" -> its rows, and in the header where
        state.json, manifest.json          as of any checkpoint

The storage is that module's Hugging Face one, safetensors with JSON in the header: nothing is pickled on disk. The
folder is made aside and renamed by the first rank once all have written, as in checkpoint.py: its manifest has the
size and the hash of every rank's file, and a folder is whole or not there. What one rank cannot write ends all.
As in saver.py training waits for the copy to memory alone: a thread of each rank writes, and these threads have a
process group of their own, so that what they say to each other does not meet what training says.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import CheckpointError, OutputError
from engine.run import checkpoint
from engine.run.checkpoint import Checkpoint
from engine.run.distributed import LONGEST_WAIT, Ranks, is_sharded
from engine.run.files import refusals_named
from engine.run.saver import Saved, Saver, copied

Groups = Mapping[str, Mapping[str, Tensor]]
SHARD_FILES = "shard-*" + checkpoint.TENSORS


class ShardedSaver(Saver):
    """`Saver` of a run of several processes, whose methods but `finished` all ranks call together. What one rank cannot
    write is an error of all, raised by the same call of all of them. `finished` is told in the first rank alone."""

    def __init__(self, root: Path, keep: int, ranks: Ranks) -> None:
        super().__init__(root, keep)
        self.ranks = ranks
        self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def save(self, step: int, tensors: Groups, state: Mapping[str, Any], interim: bool) -> None:
        """Copy now, each rank its own rows, and write beside the caller. Waits for the checkpoint before.

        Raises:
            OutputError: the disk refuses the folder, or refused the checkpoint before.
            CheckpointError: the state cannot be written as asked.
        """
        began = time.perf_counter()
        self.wait()
        text = self.ranks.by_first(partial(self._begin, step, state))
        copies = {name: copied(tensor) for name, tensor in _flat(tensors).items()}
        waited = time.perf_counter() - began
        given = (step, copies, text, interim, waited)
        self._thread = threading.Thread(target=self._write_own, args=given, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last call, once all ranks have written or failed to; waits for none."""
        if self._thread is not None and not self.ranks.any(self._thread.is_alive()):
            self.wait()

    def close(self) -> None:
        """The end, when nothing is being written."""
        torch.distributed.destroy_process_group(self._group)

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self.root / f"checkpoint-{step}", self.root / f"{checkpoint.ASIDE}checkpoint-{step}"

    def _begin(self, step: int, state: Mapping[str, Any]) -> str:
        """The folder aside, and the text of the state."""
        final, aside = self._paths(step)
        text = checkpoint.state_text(state)
        with refusals_named(final):
            self.root.mkdir(parents=True, exist_ok=True)
            checkpoint.clean_up(self.root)
            aside.mkdir()
        return text

    def _write_own(self, step: int, tensors: Mapping[str, Tensor], text: str, interim: bool, waited: float) -> None:
        began = time.perf_counter()
        try:
            self._write_together(step, tensors, text, interim)
            if self.ranks.is_first:
                final, _ = self._paths(step)
                size = sum(file.stat().st_size for file in final.iterdir()) / 1e9
                self._saved = [*self._saved, Saved(final, size, waited, time.perf_counter() - began)]
        except BaseException as error:  # whatever it was, the next call raises it
            self._error = error

    def _write_together(self, step: int, tensors: Mapping[str, Tensor], text: str, interim: bool) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save as save_shards

        final, aside = self._paths(step)
        complete = partial(checkpoint.complete, aside, self.root, step, text, self.keep, interim)
        try:
            with failures_named(final, OutputError):
                save_shards(dict(tensors), storage_writer=_storage(aside, complete), process_group=self._group)
        except OutputError:  # of all ranks: none goes on before the folder is as it was
            if self.ranks.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            torch.distributed.barrier(self._group)
            raise


def _storage(aside: Path, complete: Callable[[], object]) -> Any:
    """What writes a checkpoint's shards. The first rank calls `complete` when all have written; what it raises there,
    all ranks raise."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    class Storage(HuggingFaceStorageWriter):
        def finish(self, metadata: object, results: object) -> None:
            complete()

    return Storage(str(aside), save_distributed=True)


@contextmanager
def failures_named(path: Path, kind: type[OutputError] | type[CheckpointError]) -> Iterator[None]:
    """What torch.distributed.checkpoint gathers of the ranks' failures, no `Exception`, becomes an error of ours."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        said = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        done = "written" if kind is OutputError else "read"
        raise kind(
            f"{path}: cannot be {done} ({said[:400]}); nothing is left half-written, go on from the newest whole"
            " checkpoint (--resume_from_checkpoint true)"
        ) from error


def is_sharded_checkpoint(path: Path | str) -> bool:
    """Was it written by several ranks?"""
    return any(Path(path).glob(SHARD_FILES))


def load(path: Path | str, like: Groups, ranks: Ranks) -> Checkpoint:
    """The tensors that `like` names, cut over the ranks as its tensors are, from a checkpoint of any number of ranks.

    All ranks call. The first compares every byte with the manifest before the others read.

    Raises:
        CheckpointError: when `checkpoint.verify` does, and where names or shapes are not those of `like`.
    """
    path = Path(path)
    manifest = ranks.by_first(lambda: checkpoint.verify(path))
    wanted = _flat(like)
    sharded = is_sharded_checkpoint(path)
    found = _from_shards(path, manifest, wanted, ranks) if sharded else _from_whole(path, wanted)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in like}
    for key, tensor in found.items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor
    return Checkpoint(path, manifest["step"], groups, checkpoint.read_state(path))


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor.detach() for group, named in groups.items() for name, tensor in named.items()}


def _from_shards(
    path: Path, manifest: Mapping[str, Any], like: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    strange = {file.name for file in path.glob(f"*{checkpoint.TENSORS}")} - manifest["files"].keys()
    if strange:
        raise CheckpointError(f"{path}: has {sorted(strange)[:3]}, of which its manifest knows nothing; move them away")
    try:
        there: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        _check(path, {name: tuple(entry.size) for name, entry in there.items()}, like)
        _check_parts(path, there, like)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not shards of a checkpoint ({type(error).__name__}: {error})") from error
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    with warnings.catch_warnings(), failures_named(path, CheckpointError):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
        load_shards(found, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=ranks.mesh is None)
    return found


def _from_whole(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint that one process wrote: every rank reads it and keeps its rows."""
    from torch.distributed.tensor import distribute_tensor

    whole = _flat(checkpoint.load(path).tensors)
    _check(path, {name: tuple(tensor.shape) for name, tensor in whole.items()}, like)
    found = {}
    for name, wanted in like.items():
        given, cut = whole[name].to(wanted.device), wanted
        if is_sharded(cut):
            mesh, placements = cut.device_mesh, cut.placements  # type: ignore[attr-defined]
            given = distribute_tensor(given, mesh, placements, src_data_rank=None)
        found[name] = given
    return found


def _check(path: Path, there: Mapping[str, tuple[int, ...]], like: Mapping[str, Tensor]) -> None:
    missing = [name for name in like if name not in there]
    if missing:
        raise CheckpointError(f"{path}: lacks {missing[:5]}; want the checkpoint of a run of the same model and stage")
    for name, wanted in like.items():
        if there[name] != tuple(wanted.shape):
            raise CheckpointError(
                f"{path}: {name} is {there[name]}, want {tuple(wanted.shape)}; it is of a run of another model"
            )


def _check_parts(path: Path, there: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
    """The shards have every row once: what is in none of them would be read as whatever lay in memory."""
    for name, wanted in like.items():
        held = sum(math.prod(chunk.sizes) for chunk in there[name].chunks)
        if held != wanted.numel():
            raise CheckpointError(
                f"{path}: {name} has {held} numbers in all shards, want {wanted.numel()}; a shard is missing, resume"
                " from another checkpoint"
            )
