"""A device that computes what the CPU computes and refuses what a GPU refuses: for tests without a GPU.

A tensor on "pretend" holds its numbers in the host's memory, behind a device of its own: an operation on tensors of two
devices is an error (0-dim tensors of the host excepted, as on a GPU), also an index on the host into a tensor on the
device, which a GPU would wait for. `Pretend.waits` names every operation for which a GPU would make the host wait.
Kernels of the engine run in Triton's interpreter on the same numbers, so results equal the CPU's to the bit.

It proves where tensors lie and what waits, not CUDA itself: streams, pinned memory, graphs, and the choice of Triton by
`is_cuda` do not exist here. torch takes up such a device before the first backward of a process only, so a test that
uses it is a program: tests/on_pretend_device.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from engine.kernels import _backend

NAME = "pretend"
COPIES = ("copy_", "_to_copy")
# results whose size depends on values, and values themselves
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "item",
    "equal",
    "is_nonzero",
)


class Placed(Tensor):
    """A tensor on the device; `inner` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Placed:
        made: Placed = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Placed({self.inner!r})"

    def tolist(self) -> Any:  # torch refuses it for a subclass
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **_: Any) -> Tensor:  # torch makes it beneath every mode
        return torch.tensor(data, dtype=self.dtype).to(self.device, non_blocking=True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor on {NAME} outside of its mode")


def _host(x: Any) -> Any:
    if isinstance(x, Placed):
        return x.inner
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return x


def _wrapped(result: Any, given: Any) -> Any:
    """Results on the device; what an operation writes to comes back as the tensor that it is."""
    known = {id(x.inner): x for x in tree_leaves(given) if isinstance(x, Placed)}

    def wrap(x: Any) -> Any:
        return known[id(x)] if id(x) in known else Placed(x) if isinstance(x, Tensor) else x

    return tree_map(wrap, result)


class Pretend(TorchDispatchMode):
    """Inside, the device exists."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies_there = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        placed = [x for x in leaves if isinstance(x, Placed)]
        asked = any(isinstance(x, torch.device) and x.type == NAME for x in leaves)
        if not placed and not asked:
            return func(*args, **kwargs)
        name = func._opname
        if name in COPIES:
            return self._copy(func, placed, args, kwargs)
        self._refuse_mixing(func, leaves)
        masks = name in ("index", "index_put_", "index_put") and any(
            x.dtype == torch.bool for x in placed[1:]
        )
        if name in READS or masks:
            self.waits.append(name)
        return self._placed(func, args, kwargs)

    def _copy(self, func: Any, placed: list[Placed], args: Any, kwargs: Any) -> Any:
        if func._opname == "copy_":
            to, source = args[0], args[1]
            there, from_there = isinstance(to, Placed), isinstance(source, Placed)
        else:
            from_there = bool(placed)
            wanted = kwargs.get("device")
            there = from_there if wanted is None else wanted.type == NAME
        if from_there and not there:
            self.waits.append("copy to the host")
        if there and not from_there:
            self.copies_there += 1
            queued = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            if not queued:
                self.waits.append("copy to the device")
        if there:
            return self._placed(func, args, kwargs)
        return func(*tree_map(_host, args), **tree_map(_host, kwargs))

    def _refuse_mixing(self, func: Any, leaves: list[Any]) -> None:
        for x in leaves:
            if isinstance(x, Tensor) and not isinstance(x, Placed) and x.dim() > 0:
                raise RuntimeError(
                    f"{func}: a tensor {tuple(x.shape)} of {x.device} beside one of {NAME}"
                )

    def _placed(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        return _wrapped(result, (args, kwargs))


def register() -> None:
    """Makes the device known to torch, and its tensors to the engine's way into Triton."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    original = _backend._run_triton

    def run(op: str, *arguments: Any) -> Any:
        if not any(isinstance(x, Placed) for x in arguments):
            return original(op, *arguments)
        mixed = [x for x in arguments if isinstance(x, Tensor) and not isinstance(x, Placed)]
        if mixed:
            raise RuntimeError(f"engine::{op}: a tensor {tuple(mixed[0].shape)} of the host")
        return _wrapped(original(op, *tree_map(_host, arguments)), arguments)

    _backend._run_triton = run


def place() -> torch.device:
    return torch.device(NAME, 0)
