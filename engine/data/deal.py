"""Which passes of a training step are this process's: items are dealt over ranks by address, then cut by tokens.

    item i of the step belongs to rank i mod size

Each pass through sharded weights gathers them, which all ranks do together: a rank with fewer passes than another adds
fillers, whose loss counts 0. With one process these are the cuts of `cut_by_tokens`, and no filler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.data.pack import cut_by_tokens
from engine.run.distributed import Ranks


@dataclass(frozen=True)
class Pass:
    """One forward and backward: which items it takes, and whether they count or only keep step with other ranks."""

    items: list[int]
    counts: bool

    def loss(self, loss: Tensor) -> Tensor:  # () -> ()
        """The loss to take the gradient of."""
        return counted(loss, self.counts)


def counted(loss: Tensor, counts: bool) -> Tensor:  # () -> ()
    """The loss of a pass; of a filler 0, with a gradient of zeros."""
    return loss if counts else loss * 0.0


def own_passes(lengths: Sequence[int], budget: int, ranks: Ranks) -> list[Pass]:
    """This rank's passes over items of these lengths; as many on every rank, none only where there are no items."""
    cuts = []
    for rank in range(ranks.size):
        items = range(rank, len(lengths), ranks.size)
        cuts.append([[items[i] for i in cut] for cut in cut_by_tokens([lengths[i] for i in items], budget)])
    passes = [Pass(cut, True) for cut in cuts[ranks.rank]]
    if ranks.size == 1 or not lengths:
        return passes
    shortest = min(range(len(lengths)), key=lambda i: (lengths[i], i))
    return passes + [Pass([shortest], False)] * (max(map(len, cuts)) - len(passes))
