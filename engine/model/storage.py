"""Where the numbers of a model live: float32 masters, and the compute copy that every forward
reads.

    copy = round(master)        once an optimizer step: in the step's own pass, or in ``refresh``

Generation, scoring and the training forward read the copy only; gradients go straight through the
rounding to the master's ``.grad``, in float32. A frozen model has no masters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.errors import ModelError
from engine.kernels._memory import Slabs
from engine.kernels.linear import PackedWeight, linear, pack_weight, refresh_weight
from engine.run.device import HOST

from .names import Spec


class StaleWeightsError(ModelError):
    """The masters have changed and the compute copy was not made anew."""


class Weights:
    """The parameters of one model by internal name.

    Args:
        specs: shape and kind of every parameter, in order.
        read: gives a parameter by name, in any floating dtype; it is copied, so a view of a mapped
            file will do. Asked
            once a name, so no more than one tensor is held twice at any time.
        dtype: storage dtype of the compute copy, bfloat16 or float32.
        trainable: keep float32 masters too.
        device: where all of them lie.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], Tensor],
        dtype: torch.dtype,
        trainable: bool,
        device: torch.device = HOST,
    ) -> None:
        self.specs = dict(specs)
        self.dtype = dtype
        self.device = device
        self.version = 0
        self.masters: dict[str, Parameter] = {}
        self._packed: dict[str, PackedWeight] = {}
        self._slabs = Slabs()
        self._plain: dict[str, Tensor] = {}
        self._fused: dict[tuple[str, ...], Tensor] = {}
        self._seen: dict[str, int] = {}
        self._load(read, trainable)

    def _load(self, read: Callable[[str], Tensor], trainable: bool) -> None:
        for name in self.specs:
            if trainable:
                tensor = read(name).to(self.device, torch.float32, copy=True).contiguous()
                self.masters[name] = Parameter(tensor)
                self._copy(name, tensor)
            else:
                kept = self._storage_dtype(name)
                self._copy(name, read(name).to(self.device, kept, copy=True).contiguous())
        self._mark(self.masters)

    @property
    def trainable(self) -> bool:
        return bool(self.masters)

    def refresh(self) -> None:
        """Makes the compute copy anew from the masters and counts the version up: once after each
        optimizer step.

        Raises:
            ModelError: a frozen model, which has no masters to make it from.
        """
        self._need_masters("refresh")
        for name, master in self.masters.items():
            if name in self._packed:
                refresh_weight(self._packed[name], master)
            else:
                self._refresh_plain(name)
        self._mark(self.masters)
        self.version += 1

    def written_by_step(self, name: str) -> PackedWeight | Tensor | None:
        """What an optimizer step writes beside the master of this name, in the same pass: the compute copy of a matrix
        or a table. None for a vector, a float32 tensor of rounded values, which ``step_taken`` makes."""
        if name in self._packed:
            return self._packed[name]
        return self._plain[name] if self.specs[name].kind == "table" else None

    def step_taken(self, names: Collection[str]) -> None:
        """A step moved the masters of these names and wrote what ``written_by_step`` gave: their compute copy is new,
        and the version counts up. A master that was written to besides stays stale."""
        for name in names:
            if self.written_by_step(name) is None:
                self._refresh_plain(name)
        self._mark(names)
        self.version += 1

    def check(self) -> None:
        """Raises StaleWeightsError where a master was written to since the compute copy was
        made."""
        for name, master in self.masters.items():
            if master._version != self._seen[name]:
                raise StaleWeightsError(
                    f"{name}: the master was written to after version {self.version} of the compute"
                    " copy was made; call model.refresh() after the optimizer step, before the next"
                    " forward"
                )

    def through(self, part: str, run: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """run(*args), a pass through a part of the network: "layers.N", "score", or "" for the whole.

        The weights of all parts are at hand here; where they are sharded (sharded.py) a part's are gathered for it. So
        this is outermost: what computes a layer again in its backward goes inside.
        """
        return run(*args)

    def whole(self) -> Weights:
        """Weights to generate and score with: these, or where they are sharded a frozen copy of them as they are now,
        gathered by all ranks together."""
        return self

    def master(self, name: str) -> Tensor | None:
        """The float32 master, or None in a frozen model."""
        return self.masters.get(name)

    def packed(self, name: str) -> PackedWeight:
        """The compute copy of a matrix, packed for products on this machine."""
        return self._packed[name]

    def vector(self, name: str) -> Tensor:
        """The compute copy of a vector: float32 that hold values of the storage dtype;
        differentiable."""
        return self._through(name)

    def optional_vector(self, name: str) -> Tensor | None:
        """A vector that not every family has, such as a bias."""
        return self._through(name) if name in self.specs else None

    def table(self, name: str) -> Tensor:  # (rows, H)
        """The compute copy of a table of vectors, in its storage dtype."""
        return self._packed[name].dense if name in self._packed else self._plain[name]

    def lookup(self, name: str, ids: Tensor) -> Tensor:  # (N,) int64 -> (N, H) float32
        """Rows of a table; the gradient is added up by row into the master."""
        dense = self.table(name)
        rows: Tensor = _Lookup.apply(ids, dense, self.master(name))  # type: ignore[no-untyped-call]
        return rows

    def project(
        self, x: Tensor, modules: Sequence[str], out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:  # (N, K) -> one (N, rows) a module
        """x W^T + b for each of ``modules``, which all read the same x.

        They are asked for together so that they can be one product; their parameters keep their own
        names.
        """
        results = []
        for module in modules:
            weight, bias = f"{module}.weight", self.optional_vector(f"{module}.bias")
            kind = x.dtype if out_dtype is None else out_dtype
            results.append(linear(x, self.packed(weight), bias, self.master(weight), kind))
        return tuple(results)

    def fuse(self, names: Sequence[str]) -> Tensor:  # (all their rows, K), or (all their rows,)
        """The compute copies of parameters that read the same columns, as one; from then on each is a view of its rows,
        so that a refresh writes both."""
        key = tuple(names)
        if key not in self._fused:
            parts = [self._plain[n] if n in self._plain else self._packed[n].dense for n in names]
            whole = torch.cat(parts)
            for name, part in zip(names, torch.split(whole, [len(p) for p in parts]), strict=True):
                if name in self._plain:
                    self._plain[name] = part
                else:
                    self._packed[name] = replace(self._packed[name], dense=part)
            self._fused[key] = whole
        return self._fused[key]

    def stored(self, name: str) -> Tensor:
        """The compute copy in its storage dtype, as it is written to files: memory of its own for each name."""
        kept = self._plain[name] if name in self._plain else self._packed[name].dense
        shared = any(name in names for names in self._fused)
        return kept.to(self._storage_dtype(name), copy=shared)

    def state(self) -> dict[str, Tensor]:
        """The float32 masters by name (not copied), for a checkpoint. A frozen model has none:
        ModelError."""
        self._need_masters("state")
        return {name: master.detach() for name, master in self.masters.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Writes a ``state()`` into the masters and makes the compute copy anew.

        Raises:
            ModelError: naming every parameter missing, left over or of another shape; nothing is
                written then.
        """
        self._need_masters("load_state")
        problems = [f"missing: {name}" for name in self.masters if name not in state]
        problems += [f"left over: {name}" for name in state if name not in self.masters]
        for name, master in self.masters.items():
            if name in state and state[name].shape != master.shape:
                given = tuple(state[name].shape)
                problems.append(f"wrong shape: {name}: got {given}, want {tuple(master.shape)}")
        if problems:
            raise ModelError("the state does not fit the model:\n  " + "\n  ".join(problems))
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state[name])
        self.refresh()

    def clone(self, trainable: bool) -> Weights:
        """A copy that shares no memory with this one; trained from the masters where there are
        some."""
        self.check()
        read: Callable[[str], Tensor] = self.stored
        if trainable and self.masters:
            read = lambda name: self.masters[name].detach()  # noqa: E731
        return Weights(self.specs, read, self.dtype, trainable, self.device)

    def _storage_dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.specs[name].kind == "score" else self.dtype

    def _copy(self, name: str, source: Tensor) -> None:
        kind, kept = self.specs[name].kind, self._storage_dtype(name)
        if kind in ("matrix", "score"):
            self._packed[name] = pack_weight(source, kept, self._slabs)
        elif kind == "table":
            self._plain[name] = source.to(kept)
        else:
            self._plain[name] = source.to(kept).to(torch.float32, copy=True)

    def _refresh_plain(self, name: str) -> None:
        """In place: a decode step holds on to this memory."""
        self._plain[name].copy_(self.masters[name].detach().to(self._storage_dtype(name)))

    def _mark(self, names: Iterable[str]) -> None:
        self._seen.update({name: self.masters[name]._version for name in names})

    def _through(self, name: str) -> Tensor:
        master = self.master(name)
        if master is None or not torch.is_grad_enabled():
            return self._plain[name]
        value: Tensor = _StraightThrough.apply(master, self._plain[name])  # type: ignore[no-untyped-call]
        return value

    def _need_masters(self, call: str) -> None:
        if not self.masters:
            raise ModelError(
                f"{call}: the model is frozen and has no masters; load it with trainable=True"
            )


class _StraightThrough(torch.autograd.Function):
    """Value of the rounded copy, gradient to the master as if it had not been rounded."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Lookup(torch.autograd.Function):
    """out_i = dense[ids_i]; d master[v] = sum of d out_i over ids_i = v, in the order of i."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, dense: Tensor, master: Tensor | None) -> Tensor:
        ctx.rows = dense.shape[0]
        ctx.save_for_backward(ids)
        return dense[ids].float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None]:
        if not ctx.needs_input_grad[2]:
            return None, None, None
        (ids,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        # one pass a thread over its own range of rows: the order of additions does not depend on
        # their number
        return (
            None,
            None,
            torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, -1, False),
        )
