"""Several processes that train one model: which of them this one is, and what they say to each other.

Control is the same everywhere, work is split: each process knows the whole step (rows, prompts, answers), does the
part that is its own by address, and sums of parts make every process know the whole result. So whitening, losses'
denominators and metrics are over all processes because they are computed from the same numbers as in one.

    total = sum over ranks of x          x is 0 where a rank has no part, so a part comes through to the bit
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError, EngineError, ModelError, OutputError
from engine.run.device import choose_device

if TYPE_CHECKING:  # a process alone does not load it
    from torch.distributed.device_mesh import DeviceMesh

TOLD: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError, ModelError, OutputError)
}
WAIT, LONGEST_WAIT = timedelta(minutes=30), timedelta(days=1)  # of a rank for another that lives; the dead end all
SHARD, REPLICATE = "shard", "replicate"  # names of the mesh's dimensions; weights are cut along the first


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one's place among them. Every method but `share` and `threads` is a collective:
    all ranks call it, in the same order. With one process nothing is sent and every result is what was given."""

    rank: int
    size: int
    local_size: int  # of them on this machine
    mesh: DeviceMesh | None  # None with one process

    @property
    def is_first(self) -> bool:
        """The one that writes: logs, metrics, config, models."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """The items of 0 .. count - 1 that are this rank's: item i belongs to rank i mod size."""
        return list(range(self.rank, count, self.size))

    def threads(self, wanted: int | None) -> int | None:
        """CPU threads of this process: as many as asked for, else the machine's cores in equal parts."""
        if wanted is not None or self.mesh is None:
            return wanted
        return max(1, len(os.sched_getaffinity(0)) // self.local_size)

    def sum(self, x: Tensor) -> Tensor:  # any shape -> same
        """The sum over ranks, on every rank the same bits."""
        if self.mesh is None:
            return x
        total = x.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over ranks of each value, in float64."""
        if self.mesh is None:
            return list(values)
        return [float(v) for v in self.sum(torch.tensor(list(values), dtype=torch.float64))]

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        if self.mesh is None:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return float(found)

    def smallest(self, value: float) -> float:
        """The smallest of the ranks' values."""
        return -self.largest(-value)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.mesh is None else self.largest(float(flag)) > 0

    def of_first(self, x: Tensor) -> Tensor:  # any shape -> same
        """The first rank's tensor; the others give one of the same shape and dtype."""
        if self.mesh is None:
            return x
        found = x.detach().clone()
        torch.distributed.broadcast(found, 0)
        return found

    def text_of_first(self, text: str) -> str:
        """The first rank's text; what the others give is not read."""
        if self.mesh is None:
            return text
        data = text.encode()
        size = int(self.of_first(torch.tensor(len(data))))
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.is_first and data else None
        return bytes(self.of_first(torch.zeros(size, dtype=torch.uint8) if sent is None else sent).tolist()).decode()

    def by_first(self, do: Callable[[], Any]) -> Any:
        """What `do` gives in the first process, on every rank; only plain JSON goes from one to another.

        Raises:
            EngineError: the one of the first process, or its refusal of the disk, on every rank: all of them end.
        """
        if self.mesh is None:
            return do()
        failed: EngineError | OSError | None = None
        told = ""
        if self.is_first:
            try:
                told = json.dumps({"gave": do()})
            except (EngineError, OSError) as error:
                failed, told = error, json.dumps({"raised": type(error).__name__, "text": str(error)})
        said = json.loads(self.text_of_first(told))
        if "raised" in said:
            self.wait()  # nobody leaves before all know why
        if failed is not None:
            raise failed
        if "raised" in said:
            raise TOLD.get(said["raised"], EngineError)(said["text"])
        return said["gave"]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.mesh is not None:
            self.sum(torch.zeros(()))

    def ragged(self, own: Sequence[Tensor], count: int) -> list[Tensor]:
        """One vector an item, made by the item's rank (`share`, in that order): all of them, on every rank, in order.

        All are of one dtype, on the host; without items of its own a rank still calls.
        """
        if self.mesh is None:
            return list(own)
        lengths = torch.zeros(count, dtype=torch.int64)
        mine = self.share(count)
        lengths[mine] = torch.tensor([len(x) for x in own], dtype=torch.int64)
        lengths = self.sum(lengths)
        ends = lengths.cumsum(0).tolist()
        wide = torch.zeros(ends[-1] if ends else 0, dtype=torch.float64)  # holds token ids and float32 exactly
        for i, x in zip(mine, own, strict=True):
            wide[ends[i] - len(x) : ends[i]] = x
        return list(torch.split(self.sum(wide), lengths.tolist()))


ALONE = Ranks(0, 1, 1, None)


def world() -> tuple[int, int]:
    """Processes of the run, and of them on this machine, as torchrun says in the environment; 1 and 1 without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return size, int(os.environ.get("LOCAL_WORLD_SIZE", size))


def join(device: str, replicate: int = 1, busy: float | None = 0.0) -> Ranks:
    """This process among those that torchrun started (its environment says how many); alone without torchrun.

    Args:
        device: of the config; with "cpu" ranks talk through gloo, else tensors of a GPU through NCCL.
        replicate: copies of the sharded weights (HSDP): ranks = replicate x shards.
        busy: seconds for which the first may keep the others waiting, with a reward function; None is no limit.

    Raises:
        ConfigError: ranks that replicate does not divide.
    """
    size, local_size = world()
    if size % replicate:
        raise ConfigError(
            f"replicate: got {replicate} with {size} process{'es' if size > 1 else ''}, want a divisor of their number;"
            " start more with torchrun --nproc_per_node, or leave replicate at 1"
        )
    if size == 1:
        return ALONE
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = choose_device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not torch.distributed.is_initialized():
        wait = LONGEST_WAIT if busy is None else WAIT + timedelta(seconds=busy)
        _meet("cpu:gloo,cuda:nccl" if on_gpu else "gloo", wait)
    from torch.distributed.device_mesh import init_device_mesh

    shape, names = ((size,), (SHARD,)) if replicate == 1 else ((replicate, size // replicate), (REPLICATE, SHARD))
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", shape, mesh_dim_names=names)
    return Ranks(torch.distributed.get_rank(), size, local_size, mesh)


def _meet(backend: str, wait: timedelta) -> None:
    """torchrun keeps one store over its restarts, in which a process would find the addresses of those that died
    (torch 2.13): every attempt has its own names in it."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"attempt-{attempt}", store)
    torch.distributed.init_process_group(backend, timeout=wait, store=own, rank=rank, world_size=size)


def leave() -> None:
    """The end of `join`, when all is done: nobody goes before the others have all they wait for."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def is_sharded(x: Tensor) -> bool:
    """Is it a DTensor? Asked without importing that class, which takes a tenth of a start."""
    return hasattr(x, "to_local")


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here, not a copy; a tensor that is not sharded is itself."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


def norm_over_shards(norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:  # () -> ()
    """The norm of all shards of `tensors` out of the norm of those that lie here; copies of a shard count once."""
    meshes = {x.device_mesh for x in tensors if hasattr(x, "device_mesh")}
    if not meshes:
        return norm
    (mesh,) = meshes
    squares = norm.square()
    torch.distributed.all_reduce(squares, group=mesh.get_group(SHARD))
    return squares.sqrt()
