"""Models whose logits, values or scores are a golden case's, so that whole stages run on golden numbers.

Only the network below the head is replaced. A slot is one row of golden numbers, and the head's weight holds it as a
column; the hidden state of a token picks the column of its slot, so the head gives the golden row and the gradient of
its weight is that of the golden numbers. A sequence says where its slots begin: its context is tokens START + first,
and the row at position p has slot first + p - (context - 1), whose logits predict the token at p + 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from engine.data.pack import Packed
from engine.kernels.linear import pack_weight
from engine.model import transformer
from engine.model.heads import ScalarModel
from engine.model.names import Spec
from engine.model.storage import Weights
from engine.model.transformer import Model

START = 1000  # tokens of the cases are below it


class WideWeights(Weights):
    """In float64, for the definitions; the engine's own masters are float32."""

    def _load(self, read: Any, trainable: bool) -> None:
        for name in self.specs:
            self.masters[name] = Parameter(read(name).to(self.device, torch.float64))
            self._packed[name] = pack_weight(self.masters[name], torch.float64)
        self._mark(self.masters)


def padded(rows: Sequence[Any], width: int) -> Tensor:  # (B, T, ...) -> (B, width, ...)
    """The golden rows with zeros behind them: slots of tokens that nothing reads."""
    given = torch.tensor(rows, dtype=torch.float64)
    whole = given.new_zeros(len(rows), width, *given.shape[2:])
    whole[:, : given.shape[1]] = given
    return whole


def _weights(name: str, kind: Any, matrix: Tensor, dtype: torch.dtype, device: Any) -> Weights:
    made = WideWeights if dtype == torch.float64 else Weights
    specs = {name: Spec(tuple(matrix.shape), kind)}
    return made(specs, lambda _: matrix, dtype, True, torch.device(device))


def policy(slots: Tensor, dtype: torch.dtype, device: Any = "cpu") -> Model:
    """A language model with these logits (slots, V)."""
    weights = _weights("lm_head.weight", "matrix", slots.T.contiguous(), dtype, device)
    return Model(SimpleNamespace(tied_head=False), weights, {})


def scalar(slots: Tensor, device: Any = "cpu") -> ScalarModel:
    """A reward or value model with these numbers (slots,)."""
    weights = _weights("score.weight", "score", slots[None].contiguous(), torch.float32, device)
    return ScalarModel(SimpleNamespace(tied_head=False), weights, {})


def gradient(model: Model) -> Tensor:  # (slots, V), or (slots, 1) of a scalar model
    found = model.weights.masters[model.head_name].grad
    assert found is not None
    return found.T


def context(first: int, length: int = 1) -> list[int]:
    return [START + first] * length


def hidden_rows(
    model: Model,
    batch: Packed,
    dropout: Any = None,
    rows: Tensor | None = None,
    checkpointing: Any = None,
) -> Tensor:  # (M, slots)
    """In place of transformer.forward: the unit vector of each row's slot."""
    assert rows is not None
    cu = batch.cu_seqlens.long()
    segments = torch.arange(batch.num_segments)
    owner = segments if batch.prefix is None else batch.prefix.long()
    opening = batch.tokens >= START
    before = torch.cat([torch.zeros(1, dtype=torch.int64), opening.long().cumsum(0)])
    lengths = (before[cu[1:]] - before[cu[:-1]])[owner]  # of each segment's context
    of = torch.repeat_interleave(segments, cu.diff())[rows]
    first = batch.tokens[cu[owner[of]]] - START
    slots = first + batch.positions[rows] - (lengths[of] - 1)
    size = model.weights.masters[model.head_name].shape[1]
    return torch.eye(size, dtype=model.dtype)[slots].to(model.device)


@contextmanager
def golden_networks() -> Iterator[None]:
    """Inside, every model is one of this file's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "forward", hidden_rows)
        yield
