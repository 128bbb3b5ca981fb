"""What one model runs for a batch of sequences: whole prompts (prefill), or one token each and the next one's draw.

On the CPU's kernels a step is one call (``transformer_step``), on a GPU's one replay of a graph (``graph.py``); without
kernels it is the network's definition, layer by layer. All keep keys and values in the same pages, and all follow the
same law. Rows come from the host, and draws go back to it.

Letters: N packed prompt tokens, P prompts, R rows of a decode step (one a running sequence), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.data.pack import cut_by_tokens, last_rows, pack_sequences
from engine.generate.cache import PageCache, prompt_slots
from engine.generate.sampling import Sampling, draw, filtered_law
from engine.kernels._backend import forced_backend, kernels_usable
from engine.kernels.attention import attention
from engine.kernels.attention_decode import PAGE, attention_decode
from engine.kernels.linear_sample import linear_sample
from engine.kernels.transformer_step import TransformerStep
from engine.model.network import step_network
from engine.model.transformer import Model, chosen_rows, hidden_states, logits
from engine.run.device import to_device, to_host

# of one call: what lies between its products stays in the last cache (768 tokens and more were slower)
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Rows:
    """One decode step's input: the last token of each running sequence, and where its keys are."""

    tokens: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64
    page_table: Tensor  # (R, pages) int32; entries behind a sequence's length are never read


@dataclass(frozen=True)
class Drawn:
    """One token a row, with its log-prob and the entropy of the law it was drawn from."""

    tokens: Tensor  # (R,) int64
    logprobs: Tensor  # (R,) float32
    entropies: Tensor  # (R,) float32


class Steps(Protocol):
    """A model over one cache."""

    cache: PageCache

    def prefill(
        self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]
    ) -> Tensor:  # (P, H)
        """Run P prompts as one packed batch and write their keys and values into their ``pages``.

        Returns the hidden row of each prompt's last token, the only one that the head has to see.
        """

    def decode(self, rows: Rows, uniform: Tensor) -> Drawn:
        """Run one token of each sequence, its key and value written into its page, and draw the
        next one by ``uniform`` (R,)."""

    def draw(self, hidden: Tensor, uniform: Tensor) -> Drawn:
        """Draw a token for each hidden row (R, H) by its uniform (R,)."""


def steps_for(model: Model, num_pages: int, settings: Sampling, longest: int) -> Steps:
    """Over ``num_pages`` pages, for sequences of at most ``longest`` tokens."""
    on_cpu, forced = model.device.type == "cpu", forced_backend()
    if forced == "triton" or (model.device.type == "cuda" and forced is None):
        from engine.generate.graph import GraphSteps  # which extends the steps of this file

        return GraphSteps(model, num_pages, settings, longest)
    a = model.architecture
    cache = PageCache(
        a.num_layers, num_pages, a.num_kv_heads, a.head_dim, model.kv_dtype, model.device
    )
    if on_cpu and kernels_usable():
        return KernelSteps(model, cache, settings, longest)
    return DefinedSteps(model, cache, settings)


class DefinedSteps:
    """Layer by layer, as the network is defined."""

    def __init__(self, model: Model, cache: PageCache, settings: Sampling) -> None:
        self._model, self.cache, self._settings = model, cache, settings

    def prefill(
        self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]
    ) -> Tensor:  # (P, H)
        batch = pack_sequences(prompts)
        device = self._model.device
        slots = torch.cat([prompt_slots(p, len(t)) for p, t in zip(pages, prompts, strict=True)])
        slots, cu = to_device(slots, device), to_device(batch.cu_seqlens, device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.write(layer, slots, k, v)
            return attention(q, k, v, cu)

        hidden = hidden_states(self._model, batch.tokens, batch.positions, attend)
        return chosen_rows(hidden, last_rows(batch))

    def decode(self, rows: Rows, uniform: Tensor) -> Drawn:
        cache, device = self.cache, self._model.device
        page = rows.page_table.gather(1, (rows.positions // PAGE)[:, None]).squeeze(1)
        slots = to_device(page.long() * PAGE + rows.positions % PAGE, device)
        lengths = to_device((rows.positions + 1).int(), device)
        page_table = to_device(rows.page_table, device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, slots, k, v)
            pages = cache.keys[layer], cache.values[layer]
            return attention_decode(q, *pages, page_table, lengths)

        hidden = hidden_states(self._model, rows.tokens, rows.positions, attend)
        return self.draw(hidden, uniform)

    def draw(self, hidden: Tensor, uniform: Tensor) -> Drawn:
        settings, uniform = self._settings, to_device(uniform, hidden.device)
        if settings.filters:
            drawn = draw(filtered_law(logits(self._model, hidden), settings), uniform)
        else:
            drawn = linear_sample(hidden, self._model.head, uniform, settings.temperature)
        return Drawn(*drawn) if hidden.device.type == "cpu" else on_host(*drawn)


def on_host(tokens: Tensor, logprobs: Tensor, entropies: Tensor) -> Drawn:
    """In one copy: float64 holds all three exactly."""
    return read_draws(to_host(torch.stack([tokens.double(), logprobs.double(), entropies.double()])))


def read_draws(values: Tensor) -> Drawn:  # (3, R) float64
    return Drawn(values[0].long(), values[1].float(), values[2].float())


class KernelSteps(DefinedSteps):
    """One call a step, the same numbers to the bit."""

    def __init__(self, model: Model, cache: PageCache, settings: Sampling, longest: int) -> None:
        super().__init__(model, cache, settings)
        self._step = TransformerStep(step_network(model, longest), cache.keys, cache.values)
        self._one_each = torch.zeros(1, dtype=torch.int32)  # offsets of one new row a sequence

    def prefill(
        self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]
    ) -> Tensor:  # (P, H)
        rows: list[Tensor] = [torch.empty(0)] * len(prompts)
        for chosen in cut_by_tokens([len(p) for p in prompts], PREFILL_TOKENS):
            hidden = self._prefill([prompts[i] for i in chosen], [pages[i] for i in chosen])
            for i, row in zip(chosen, hidden, strict=True):
                rows[i] = row
        return torch.stack(rows)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]
    ) -> Tensor:  # (P, H)
        batch = pack_sequences(prompts)
        width = max(len(p) for p in pages)
        table = torch.tensor([[*p, *[0] * (width - len(p))] for p in pages], dtype=torch.int32)
        return self._step(batch.tokens, batch.positions, batch.cu_seqlens, table)[0]

    def decode(self, rows: Rows, uniform: Tensor) -> Drawn:
        filters = self._settings.filters
        if len(self._one_each) != len(rows.tokens) + 1:
            self._one_each = torch.arange(len(rows.tokens) + 1, dtype=torch.int32)
        hidden, *drawn = self._step(
            rows.tokens,
            rows.positions,
            self._one_each,
            rows.page_table,
            None if filters else uniform,
            self._settings.temperature,
        )
        return self.draw(hidden, uniform) if filters else Drawn(*drawn)
