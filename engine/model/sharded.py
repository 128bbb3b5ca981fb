"""Weights that several processes hold together, each a part: PyTorch's FSDP2 under the same functional forward.

    masters, gradients, Adam's moments, the average: float32, rows cut over the ranks (DTensor)
    a pass through a part of the network:  gather round(master) -> pack -> compute -> free
    its backward:                          gather again -> gradients in float32 -> summed, each rank keeps its rows

A part (a layer; the score head; the rest) is one `fully_shard` module that holds the part's masters and runs the
network's own function. MixedPrecisionPolicy gathers the storage dtype, which is the compute copy to the bit. Gradients
are summed, not averaged: losses are divided by the global count. They stay float32 (`grad_dtype`), so nothing is lost
on the way into the reduction, which would round a bfloat16 parameter's.

Source: Zhao et al. 2023 (FSDP), Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import Parameter

from engine.errors import ModelError
from engine.kernels.linear import PackedWeight, pack_weight
from engine.run.distributed import is_sharded

from .names import REST, Spec, part_of
from .storage import Weights, _StraightThrough


class _Part(nn.Module):
    """A part's masters; its forward is somebody else's function: FSDP's hooks gather before it, free after."""

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.places = {name: f"master_{i}" for i, name in enumerate(masters)}
        for name, tensor in masters.items():
            self.register_parameter(self.places[name], Parameter(tensor))

    def forward(self, run: Callable[..., Tensor], *args: Tensor) -> Tensor:
        return run(*args)

    def now(self, name: str) -> Tensor:
        """The parameter as it is now: this rank's rows (a DTensor), or while it is gathered all of it."""
        found: Tensor = getattr(self, self.places[name])
        return found


class ShardedWeights(Weights):
    """The weights of a trainable model over the ranks of a mesh.

    A training forward runs block by block (`through`), on every rank as often as on the others. What needs no gradient
    reads `whole()`. Arguments as of `Weights`.

    Args:
        mesh: with a dimension "shard", and "replicate" before it where several copies of the shards are trained (HSDP).
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], Tensor],
        dtype: torch.dtype,
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        self._mesh = mesh
        self._parts: dict[str, _Part] = {}
        super().__init__(specs, read, dtype, True, device)

    def _load(self, read: Callable[[str], Tensor], trainable: bool) -> None:
        """Part by part: no rank ever holds more than its shards and one whole part."""
        names: dict[str, list[str]] = {}
        for name in self.specs:
            names.setdefault(part_of(name), []).append(name)
        for part, own in sorted(names.items(), key=lambda item: item[0] == REST):  # the rest holds the others
            module = _Part({n: read(n).to(self.device, torch.float32, copy=True).contiguous() for n in own})
            for inner, other in self._parts.items():
                if part == REST:
                    module.add_module(inner.replace(".", "_"), other)
            self._shard(module, self._storage_dtype(own[0]), frees=part != REST)
            self._parts[part] = module
        self.masters = {n: cast(Parameter, self._parts[part_of(n)].now(n)) for n in self.specs}

    def _shard(self, module: _Part, kept: torch.dtype, frees: bool) -> None:
        """`frees`: after its forward, until the backward; the rest's output matrix is read after it."""
        policy = MixedPrecisionPolicy(
            param_dtype=None if kept == torch.float32 else kept,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the residual stream is float32
        )
        fully_shard(module, mesh=self._mesh, mp_policy=policy, reshard_after_forward=frees)
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def through(self, part: str, run: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """run(*args) with the part's weights gathered for it, and again for its backward; all ranks together.

        Raises:
            ModelError: a pass without gradient, which reads `whole()`.
        """
        if part == REST and not torch.is_grad_enabled():
            raise ModelError("sharded weights: a pass without gradient reads transformer.whole(model)")
        self._forget(part)
        result: Tensor = self._parts[part](run, *args)
        if part != REST:
            self._forget(part)
        return result

    def whole(self) -> Weights:
        """A frozen copy, gathered tensor by tensor: on every rank as much memory as the compute copy of one process."""

        def read(name: str) -> Tensor:
            rows: Any = self.masters[name].detach().to(self._storage_dtype(name))
            gathered: Tensor = rows.full_tensor()
            return gathered

        self._packed.clear()
        copy = Weights(self.specs, read, self.dtype, False, self.device)
        copy.version = self.version
        return copy

    def refresh(self) -> None:
        """The masters were written to: the next pass gathers them, and the version counts up."""
        cast(FSDPModule, self._parts[REST]).reshard()  # gathered still, if a pass had no backward
        self.version += 1

    def written_by_step(self, name: str) -> None:
        """Nothing: the compute copy is made where it is gathered."""

    def step_taken(self, names: Collection[str]) -> None:
        self.refresh()

    def check(self) -> None:
        """There is no copy that could be stale: each training pass gathers, and its backward frees."""

    def master(self, name: str) -> Tensor | None:
        """What the gradient of a gathered weight goes to: itself in float32. Of one that is not, the sharded master."""
        now = self._parts[part_of(name)].now(name)
        if is_sharded(now):
            return self.masters[name]
        if now.dtype == torch.float32:
            return now
        cast(Any, now).grad_dtype = torch.float32
        wide: Tensor = _Widened.apply(now)  # type: ignore[no-untyped-call]
        return wide

    def packed(self, name: str) -> PackedWeight:
        gathered = self._gathered(name)
        if name not in self._packed:
            self._packed[name] = pack_weight(gathered, self._storage_dtype(name))
        return self._packed[name]

    def table(self, name: str) -> Tensor:  # (rows, H)
        return self._gathered(name)

    def stored(self, name: str) -> Tensor:
        raise ModelError(f"{name}: the weights are sharded; write transformer.whole(model)")

    def clone(self, trainable: bool) -> Weights:
        if trainable:
            raise ModelError("sharded weights: got clone(trainable=True), want the folder loaded once more")
        return self.whole()

    def _gathered(self, name: str) -> Tensor:
        """All rows, in the storage dtype, in memory that is FSDP's: freed with the part."""
        part = part_of(name)
        now = self._parts[part].now(name)
        if is_sharded(now):
            raise ModelError(
                f"{name}: the weights are sharded and this part is not gathered; to generate or score, use"
                " transformer.whole(model)"
            )
        if part != REST:  # a layer that is computed again in the backward: what the one before it packed goes
            for other in [n for n in self._packed if part_of(n) not in (part, REST)]:
                del self._packed[other]
        return now.detach()

    def _forget(self, part: str) -> None:
        for name in [n for n in self._packed if part_of(n) == part]:
            del self._packed[name]

    def _through(self, name: str) -> Tensor:
        value = self._gathered(name).float()
        if not torch.is_grad_enabled():
            return value
        through: Tensor = _StraightThrough.apply(self.master(name), value)  # type: ignore[no-untyped-call]
        return through


class _Widened(torch.autograd.Function):
    """A gathered weight in float32, so that its gradient is; the leaf takes it as it is."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor) -> Tensor:
        return gathered.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
