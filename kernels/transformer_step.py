"""All layers of the network for the new rows of some sequences over cache pages, and the sampler: one call a step.

    x      = embed[token] (+ embed_positions[position])
    a      = x + o(attention(rope(q), rope(k), v))     over the pages of the row's sequence, the own key written first
    x'     = a + mlp(norm(a))                          or, parallel: a + mlp(norm(x))
    hidden = norm(x) of each sequence's last row;  token ~ softmax(hidden W^T / temperature), by its uniform number

Decoding is one row a sequence, prefill all rows of a prompt. The definition is
`engine.model.transformer.hidden_states` with `attention_decode` and `linear_sample`, whose row functions run here, so
that the result is theirs to the bit; there is no second definition, and no backward.

Letters: N new rows, S sequences, L layers, H hidden, Hq/Hk query/key heads, D head size, F intermediate, V vocabulary,
R rotated channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._backend import BackendError, choose, define_class
from .linear import PackedWeight, packed_data

PHASES = ("norms and gates", "products", "attention", "head", "sampling")


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms (weight, bias or None), and (weight, bias or None) of each linear map."""

    input_norm: tuple[Tensor, Tensor | None]  # (H,)
    q: tuple[PackedWeight, Tensor | None]  # (Hq D, H)
    k: tuple[PackedWeight, Tensor | None]  # (Hk D, H)
    v: tuple[PackedWeight, Tensor | None]  # (Hk D, H)
    q_norm: Tensor | None  # (D,)
    k_norm: Tensor | None  # (D,)
    o: tuple[PackedWeight, Tensor | None]  # (H, Hq D)
    inner_norm: tuple[Tensor, Tensor | None]  # (H,)
    gate: tuple[PackedWeight, Tensor | None] | None  # (F, H); None: not gated
    up: tuple[PackedWeight, Tensor | None]  # (F, H)
    down: tuple[PackedWeight, Tensor | None]  # (H, F)

    def tensors(self) -> list[Tensor | None]:
        """In the order that csrc/cpu/transformer_step_inputs.cpp reads."""

        def linear(pair: tuple[PackedWeight, Tensor | None]) -> list[Tensor | None]:
            return [packed_data(pair[0]), pair[1]]

        gate: list[Tensor | None] = [None, None] if self.gate is None else linear(self.gate)
        return [
            *self.input_norm,
            *linear(self.q),
            *linear(self.k),
            *linear(self.v),
            self.q_norm,
            self.k_norm,
            *linear(self.o),
            *self.inner_norm,
            *gate,
            *linear(self.up),
            *linear(self.down),
        ]


@dataclass(frozen=True)
class Network:
    """The compute copy of a whole model, as one step reads it. `shape` is L, Hq, Hk, D, F, and the switches."""

    embed_tokens: Tensor  # (V, H) storage dtype
    embed_positions: Tensor | None  # (P, H) storage dtype
    rope_table: Tensor | None  # (P, R) float32
    last_norm: tuple[Tensor, Tensor | None]  # (H,)
    head: PackedWeight  # (V, H)
    layers: tuple[LayerWeights, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms: bool
    gelu_tanh: bool
    parallel_residual: bool
    eps: float

    def tensors(self) -> list[Tensor | None]:
        found = [
            self.embed_tokens,
            self.embed_positions,
            self.rope_table,
            *self.last_norm,
            packed_data(self.head),
        ]
        for layer in self.layers:
            found += layer.tensors()
        return found

    def shape(self) -> list[int]:
        vocabulary, hidden = self.embed_tokens.shape
        rotated = 0 if self.rope_table is None else self.rope_table.shape[1]
        gated = self.layers[0].gate is not None
        switches = (self.rms, gated, self.gelu_tanh, self.parallel_residual)
        return [
            hidden,
            vocabulary,
            len(self.layers),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.intermediate_size,
            rotated,
            *(int(switch) for switch in switches),
        ]


class TransformerStep:
    """A network over a cache, looked at once and stepped often.

    It holds on to the memory of the compute copy, which a refresh rewrites in place, and of the cache: L of k_pages and
    of v_pages as in attention_decode. Raises ValueError where a tensor does not fit, and in a call after another class
    of CPU was chosen.
    """

    def __init__(
        self,
        network: Network,
        keys: Sequence[Tensor],  # L of k_pages, written at the new rows' positions
        values: Sequence[Tensor],  # L of v_pages
    ) -> None:
        if choose("transformer_step", network.embed_tokens) == "reference":
            raise BackendError(
                "transformer_step: has no torch definition of its own; want the C++ kernels, or "
                "engine.model.transformer.hidden_states"
            )
        self._ready = torch.classes.engine.TransformerStep(
            network.tensors(), network.shape(), network.eps, list(keys), list(values)
        )

    def __call__(
        self,
        tokens: Tensor,  # (N,) int64
        positions: Tensor,  # (N,) int64, one after the other within a sequence
        cu: Tensor,  # (S+1,) int32 offsets of each sequence's new rows, one or more
        page_table: Tensor,  # (S, pages) int32
        uniform: Tensor | None = None,  # (S,) float64 in [0, 1): sample a token for each sequence
        temperature: float = 1.0,
        seconds: Tensor | None = None,  # (PHASES,) float64: the time of each phase is added
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (S, H), (S,) int64, (S,) float32, (S,) float32
        """Hidden states of each sequence's last row; with `uniform` its next token, log-prob and entropy (else empty).

        Raises ValueError on ids, positions, pages and shapes that do not fit.
        """
        result: tuple[Tensor, Tensor, Tensor, Tensor] = self._ready.run(
            tokens, positions, cu, page_table, uniform, temperature, seconds
        )
        return result


define_class("transformer_step", "TransformerStep")
