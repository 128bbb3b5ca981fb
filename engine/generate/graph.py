"""The decode step on a GPU: one function over buffers that never move, captured once as a graph and then replayed.

A bucket is a number of rows, a power of two. The step reads tokens, positions, page tables and random numbers from the
bucket's buffers on the device, so that one graph serves all positions and any running sequences. Rows behind them are
dead: one token at position 0 of the cache's last page, which no sequence has. A row is a function of its own inputs, so
dead rows change nothing.

A step copies three numbers a row to the device and three back, and waits once. What is captured outlives a call of
`generate`: a refresh rewrites the weights in place, and pages and buffers stay. Without capture (in Triton's
interpreter, or inside `captured(False)`) the same function is called, over the same buffers.

Letters: R running rows, B rows of their bucket, H hidden, Hq/Hk query/key heads, D head size.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from engine.generate.cache import PageCache
from engine.generate.sampling import Sampling
from engine.generate.steps import DefinedSteps, Drawn, Rows, read_draws
from engine.kernels.attention_decode import PAGE, attention_decode
from engine.kernels.gelu import gelu
from engine.kernels.layernorm import layernorm, layernorm_residual
from engine.kernels.linear import PackedWeight, exact_forced, linear
from engine.kernels.linear_sample import linear_sample
from engine.kernels.rmsnorm import rmsnorm, rmsnorm_residual
from engine.kernels.rope import rope_and_write
from engine.kernels.swiglu import swiglu
from engine.kernels.transformer_step import LayerWeights
from engine.model.network import step_network
from engine.model.storage import Weights
from engine.model.transformer import Model

Norm = tuple[Tensor, Tensor | None]  # weight (H,), bias (H,) or None
SHORTEST = 256  # tokens; a decoder for longer sequences is made for a power of two

_captured: ContextVar[bool] = ContextVar(
    "engine_captured_steps", default=os.environ.get("ENGINE_GRAPHS") != "0"
)


@contextmanager
def captured(wanted: bool) -> Iterator[None]:
    """`captured(False)`: inside the block steps are launched one kernel at a time, to compare with and to debug; for a
    whole process, ENGINE_GRAPHS=0."""
    token = _captured.set(wanted)
    try:
        yield
    finally:
        _captured.reset(token)


def bucket_of(rows: int) -> int:
    """The bucket that holds so many rows: 1, 2, 4, 8, ..."""
    return 1 << max(rows - 1, 0).bit_length()


class Bucket:
    """The buffers of one number of rows, on the device and, to copy from and to, in pinned memory of the host."""

    def __init__(self, rows: int, width: int, scratch: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._scratch, self._device = scratch, device
        # tokens, positions, the bits of the uniform numbers
        self.inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.page_table = torch.full((rows, width), scratch, dtype=torch.int32, device=device)
        # tokens, log-probs, entropies: float64 holds all three exactly
        self.results = torch.zeros(3, rows, dtype=torch.float64, device=device)
        self.hidden: Tensor | None = None  # (B, H), of the step without a draw
        self._staged = torch.zeros(3, rows, dtype=torch.int64, pin_memory=pinned)
        self._staged_table = torch.zeros(rows, width, dtype=torch.int32, pin_memory=pinned)
        self._read = torch.zeros(3, rows, dtype=torch.float64, pin_memory=pinned)
        self._loaded: Tensor | None = None  # the page table that is on the device

    def load(self, rows: Rows, uniform: Tensor) -> None:
        """Hands a step's inputs to the device. The one before has been read, so its copies are done."""
        count = len(rows.tokens)
        if rows.page_table is not self._loaded:
            self._staged[:, count:] = 0
            self._staged_table.fill_(self._scratch)
            self._staged_table[:count, : rows.page_table.shape[1]] = rows.page_table
            self.page_table.copy_(self._staged_table, non_blocking=True)
            self._loaded = rows.page_table
        self._staged[0, :count] = rows.tokens
        self._staged[1, :count] = rows.positions
        self._staged[2, :count] = uniform.view(torch.int64)
        self.inputs.copy_(self._staged, non_blocking=True)

    def read(self, count: int) -> Drawn:
        """The draws of the first rows: waits for the step."""
        self._read.copy_(self.results, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return read_draws(self._read[:, :count])


class Decoder:
    """One model's decode step over a cache of its own, for sequences of at most `longest` tokens.

    It holds on to the memory of the compute copy, which a refresh rewrites in place.
    """

    def __init__(self, model: Model, num_pages: int, longest: int) -> None:
        a = model.architecture
        self.num_pages, self.longest = num_pages, longest
        self.owner: weakref.ref[GraphSteps] | None = None  # who is decoding with it
        self._device, self._act = model.device, model.act_dtype
        self._heads, self._head_dim = (a.num_heads, a.num_kv_heads, a.num_kv_heads), a.head_dim
        self._qkv = [_fused_qkv(model.weights, i) for i in range(a.num_layers)]
        self._network = step_network(model, longest)
        self.cache = PageCache(
            a.num_layers, num_pages + 1, a.num_kv_heads, a.head_dim, model.kv_dtype, model.device
        )
        self._buckets: dict[int, Bucket] = {}
        self._graphs: dict[tuple[int, float | None, bool], Any] = {}
        self._pool: Any = None  # what all its graphs allocate from

    def fits(self, num_pages: int, longest: int) -> bool:
        """Can it run such a call? Not while another one runs on it."""
        free = self.owner is None or self.owner() is None
        return free and num_pages <= self.num_pages and longest <= self.longest

    def run(self, rows: Rows, uniform: Tensor, temperature: float | None) -> Bucket:
        """One step; without a temperature it ends with the bucket's hidden states, else with its draws."""
        size = bucket_of(len(rows.tokens))
        if size not in self._buckets:
            width = -(-self.longest // PAGE)
            self._buckets[size] = Bucket(size, width, self.num_pages, self._device)
        bucket = self._buckets[size]
        bucket.load(rows, uniform)
        if self._device.type != "cuda" or not _captured.get():
            self.step(bucket, temperature)
            return bucket
        key = (size, temperature, exact_forced())
        if key not in self._graphs:
            self._graphs[key] = self._capture(bucket, temperature)
        self._graphs[key].replay()
        return bucket

    def _capture(self, bucket: Bucket, temperature: float | None) -> Any:
        """The step as a graph. It runs before, as capturing must not compile or choose kernels; a step that runs twice
        writes the same keys and values twice."""
        here = torch.cuda.current_stream(self._device)
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.step(bucket, temperature)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.step(bucket, temperature)
        self._pool = graph.pool() if self._pool is None else self._pool
        return graph

    def step(self, bucket: Bucket, temperature: float | None) -> None:
        """All that a step launches. It reads no value and allocates nothing that outlives it, except for `hidden`."""
        network, (tokens, positions, bits) = self._network, bucket.inputs.unbind()
        x = network.embed_tokens[tokens].float()  # (B, H), the residual stream
        if network.embed_positions is not None:
            x = x + network.embed_positions[positions].float()
        page = bucket.page_table.gather(1, (positions // PAGE)[:, None]).squeeze(1)
        place = (page.long() * PAGE + positions % PAGE, positions, (positions + 1).int())
        norms = [*(layer.input_norm for layer in network.layers), network.last_norm]
        y = self._norm(x, norms[0])
        for i, layer in enumerate(network.layers):
            mixed = self._attention(i, layer, y, bucket.page_table, place)
            if network.parallel_residual:
                y, x = self._norm(x, layer.inner_norm), x + mixed
            else:
                y, x = self._norm_of_sum(mixed, x, layer.inner_norm)
            y, x = self._norm_of_sum(self._mlp(layer, y), x, norms[i + 1])
        if temperature is None:
            bucket.hidden = torch.empty_like(y) if bucket.hidden is None else bucket.hidden
            bucket.hidden.copy_(y)
            return
        drawn = linear_sample(y, network.head, bits.view(torch.float64), temperature)
        for row, values in zip(bucket.results, drawn, strict=True):
            row.copy_(values)

    def _attention(
        self,
        i: int,
        layer: LayerWeights,
        y: Tensor,  # (B, H)
        page_table: Tensor,  # (B, pages)
        place: tuple[Tensor, Tensor, Tensor],  # slots, positions, lengths: (B,) each
    ) -> Tensor:  # (B, H) float32
        slots, positions, lengths = place
        keys, values = self.cache.keys[i], self.cache.values[i]
        weight, bias = self._qkv[i]
        flat = linear(y, weight, bias)  # (B, (Hq + 2 Hk) D)
        widths = [heads * self._head_dim for heads in self._heads]
        parts = torch.split(flat, widths, dim=1)
        q, k, v = (part.view(len(y), -1, self._head_dim) for part in parts)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._head_norm(q, layer.q_norm), self._head_norm(k, layer.k_norm)
        table = self._network.rope_table
        if table is None:
            self.cache.write(i, slots, k, v)
        else:
            q = rope_and_write(q, k, v, positions, table, keys, values, slots)
        out = attention_decode(q, keys, values, page_table, lengths)  # (B, Hq, D)
        return linear(out.flatten(1), *layer.o, None, torch.float32)

    def _head_norm(self, heads: Tensor, weight: Tensor) -> Tensor:  # (B, heads, D) -> same
        return self._norm(heads.flatten(0, 1), (weight, None)).view(heads.shape)

    def _mlp(self, layer: LayerWeights, y: Tensor) -> Tensor:  # (B, H) -> (B, H) float32
        up = linear(y, *layer.up)
        if layer.gate is not None:
            inner = swiglu(linear(y, *layer.gate), up)
        else:
            inner = gelu(up, "tanh" if self._network.gelu_tanh else "none")
        return linear(inner, *layer.down, None, torch.float32)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        weight, bias = norm
        if self._network.rms:
            return rmsnorm(x, weight, self._network.eps, self._act)
        return layernorm(x, weight, bias, self._network.eps, self._act)

    def _norm_of_sum(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """norm(x + residual), and the sum."""
        weight, bias = norm
        if self._network.rms:
            return rmsnorm_residual(x, residual, weight, self._network.eps, self._act)
        return layernorm_residual(x, residual, weight, bias, self._network.eps, self._act)


def _fused_qkv(weights: Weights, layer: int) -> tuple[PackedWeight, Tensor | None]:
    """The three projections as one matrix: a step then reads y once and has one product."""
    modules = [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
    whole = weights.fuse([f"{module}.weight" for module in modules])
    biases = [f"{module}.bias" for module in modules]
    bias = weights.fuse(biases) if all(name in weights.specs for name in biases) else None
    return PackedWeight(whole, None, "reference"), bias


_decoders: weakref.WeakKeyDictionary[Weights, Decoder] = weakref.WeakKeyDictionary()


def decoder_for(model: Model, num_pages: int, longest: int) -> Decoder:
    """The model's decoder, with its graphs, from the last call if that one is large enough and free; else a new one."""
    kept = _decoders.get(model.weights)
    if kept is None or not kept.fits(num_pages, longest):
        _decoders.pop(model.weights, None)  # its pages are free before the new ones are asked for
        del kept
        room = max(SHORTEST, 1 << (longest - 1).bit_length())
        kept = _decoders[model.weights] = Decoder(model, num_pages, room)
    return kept


def release(model: Model) -> None:
    """Gives the cache, the buffers and the graphs of the model's decode step back; the next call makes them anew."""
    _decoders.pop(model.weights, None)


class GraphSteps(DefinedSteps):
    """Prefill as the network is defined, on the device's kernels; decoding by one replay a step."""

    def __init__(self, model: Model, num_pages: int, settings: Sampling, longest: int) -> None:
        model.weights.check()
        self._decoder = decoder_for(model, num_pages, longest)
        self._decoder.owner = weakref.ref(self)
        super().__init__(model, self._decoder.cache, settings)

    def decode(self, rows: Rows, uniform: Tensor) -> Drawn:
        count, filters = len(rows.tokens), self._settings.filters
        temperature = None if filters else self._settings.temperature
        bucket = self._decoder.run(rows, uniform, temperature)
        if bucket.hidden is not None and filters:
            return self.draw(bucket.hidden[:count], uniform)
        return bucket.read(count)
