"""Checkpoints that all ranks of a run write and any number of ranks reads, through torch.distributed.checkpoint.

    checkpoint-N/
        shard-R-model-1-of-1.safetensors   what rank R - 1 holds: "<group>/<name>" -> its rows, and in the header where
        state.json, manifest.json          as of any checkpoint

The storage is that module's Hugging Face one, safetensors with JSON in the header: nothing is pickled on disk. The
folder is made aside and renamed by the first rank once all have written, as in checkpoint.py, whose manifest it has.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.run import checkpoint
from engine.run.checkpoint import Checkpoint
from engine.run.distributed import Ranks, is_sharded

Groups = Mapping[str, Mapping[str, Tensor]]
SHARD_FILES = "shard-*" + checkpoint.TENSORS


def save(root: Path | str, step: int, tensors: Groups, state: Mapping[str, Any], keep: int, ranks: Ranks) -> Path:
    """`checkpoint.save` by all ranks together, each its own rows. Arguments and errors as there."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    root = Path(root)
    aside = root / f"{checkpoint.ASIDE}checkpoint-{step}"
    if ranks.is_first:
        root.mkdir(parents=True, exist_ok=True)
        checkpoint.clean_up(root)
        aside.mkdir()
    ranks.wait()
    try:
        save_shards(_flat(tensors), storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))
        if ranks.is_first:
            checkpoint.complete(aside, root, step, checkpoint.state_text(state), keep)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    ranks.wait()
    return root / f"checkpoint-{step}"


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
    manifest = checkpoint.verify(path) if ranks.is_first else {}
    ranks.wait()
    manifest = json.loads(ranks.text_of_first(json.dumps(manifest)))
    wanted = _flat(like)
    found = _from_shards(path, wanted, ranks) if is_sharded_checkpoint(path) else _from_whole(path, wanted)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in like}
    for key, tensor in found.items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor
    state = json.loads((path / checkpoint.STATE).read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], groups, state)


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor.detach() for group, named in groups.items() for name, tensor in named.items()}


def _from_shards(path: Path, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    there: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    _check(path, {name: tuple(entry.size) for name, entry in there.items()}, like)
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    with warnings.catch_warnings():  # it supposes that one process might be a mistake
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
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
