"""What a training forward keeps for its backward, and what the backward makes again.

    none        everything that an operation's gradient reads
    selective   not what a pass over kept tensors gives: outputs of norms, the product's input behind
                the activation, float32 copies of rounded keys and values
    full        the residual stream before each layer; a layer is computed again, whole

The gradient is the same to the bit: the same kernels read the same numbers. Selective keeps the graph
as it is and changes what stands in it for a saved tensor (Chen et al. 2016: cheap to compute, large to
keep; Korthikanti et al. 2022, section 5: what "selective" means for a transformer).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "selective", "full"]
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")  # by the memory that they need


class _Recipe:
    """Stands for a tensor that several operations saved; made once a backward, for all of them."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make, self._savers, self._waiting = make, 0, 0
        self._value: Tensor | None = None

    def saved(self) -> _Recipe:
        self._savers += 1
        return self

    def tensor(self) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self._make()
            self._waiting = self._savers
        value = self._value
        self._waiting -= 1
        if self._waiting == 0:
            self._value = None
        return value


def _place(x: Tensor) -> tuple[object, ...]:
    """Equal for tensors of the same memory, while it lives. Hooks hold this and not x, which they would keep alive."""
    return x.data_ptr(), x.shape, x.dtype


def made_again(
    wanted: bool, value: Tensor, make: Callable[[], Tensor]
) -> AbstractContextManager[object]:
    """Operations inside the block that save ``value`` save ``make`` instead, which gives the same bits.

    ``make`` must hold no tensor but those that are kept anyway, detached. ``wanted`` false: nothing changes.
    """
    if not wanted or not torch.is_grad_enabled():
        return nullcontext()
    recipe, place = _Recipe(make), _place(value)

    def pack(saved: Tensor) -> Any:
        return recipe.saved() if _place(saved) == place else saved

    def unpack(packed: Any) -> Tensor:
        return packed.tensor() if isinstance(packed, _Recipe) else packed

    return saved_tensors_hooks(pack, unpack)


def saved_as(
    wanted: bool, values: tuple[Tensor, ...], dtype: torch.dtype
) -> AbstractContextManager[object]:
    """Operations inside the block save ``values``, which hold numbers of ``dtype``, in that dtype."""
    if not wanted or not torch.is_grad_enabled() or all(v.dtype == dtype for v in values):
        return nullcontext()
    wide, places = values[0].dtype, [_place(value) for value in values]

    def pack(saved: Tensor) -> tuple[Tensor, bool]:
        narrow = _place(saved) in places
        # an operation's own output is among what it saves: not detached, it would hold the operation that holds it
        return (saved.to(dtype), True) if narrow else (saved.detach(), False)

    def unpack(packed: tuple[Tensor, bool]) -> Tensor:
        return packed[0].to(wide) if packed[1] else packed[0]

    return saved_tensors_hooks(pack, unpack)


def computed_again(wanted: bool, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """block(x), of which only x is kept; random numbers inside must be addressed, not streamed."""
    if not wanted or not torch.is_grad_enabled():
        return block(x)
    y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    return y
