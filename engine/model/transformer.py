"""The one definition of the network, for every family, for generation, scoring and training alike.

    x     = embed[token] (+ embed_positions[position])
    a     = x + o(attention(rope(q), rope(k), v))     with q, k, v = projections of norm(x)
    x'    = a + mlp(norm(a))                          or, parallel: a + mlp(norm(x))
    hidden = norm(x)

The residual stream x is float32; what goes into a product is ``model.act_dtype``. Attention comes
in as a function, so that decoding over a cache and training over packed segments run through the
same lines.

Letters: N rows (tokens), H hidden, Hq/Hk query/key heads, D head size, F intermediate, M scored
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.data.pack import Packed
from engine.kernels._backend import cpu_class, kernels_usable
from engine.kernels.attention import attention
from engine.kernels.gelu import gelu
from engine.kernels.layernorm import layernorm
from engine.kernels.linear import PackedWeight, linear
from engine.kernels.linear_logprob import linear_logprob
from engine.kernels.linear_logprob_loss import Loss, linear_logprob_loss
from engine.kernels.rmsnorm import rmsnorm
from engine.kernels.rope import rope
from engine.kernels.swiglu import swiglu
from engine.run.device import to_device

from .architectures import Architecture, check_ids
from .checkpointing import Checkpointing, computed_again, made_again, saved_as
from .dropout import Dropout
from .rotary import rope_table
from .storage import Weights

# (layer, q (N, Hq, D), k (N, Hk, D), v (N, Hk, D)) -> (N, Hq, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
SMALLEST_TABLE = 256


@dataclass(frozen=True)
class Model:
    """A language model: its architecture, its weights, and the ``config.json`` that it came with."""

    architecture: Architecture
    weights: Weights
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the compute copy, and of saved files."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie and the forward runs; batches come from the host."""
        return self.weights.device

    @property
    def act_dtype(self) -> torch.dtype:
        """Dtype of activations between ops: bfloat16 only where the products want bfloat16
        operands, as a GPU's do."""
        return activation_dtype(self.dtype, self.device)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Dtype of keys and values: the storage dtype, also where other activations are float32. A
        cache of them is half as large and read in half the time."""
        return self.dtype

    @property
    def batch_invariant(self) -> bool:
        """A token's log-prob is a function of its own prefix and the weights alone, to the bit: the engine's own
        kernels run on the CPU. torch's products on the definitions, and a GPU's, sum in an order that depends on the
        batch."""
        return self.device.type == "cpu" and kernels_usable()

    @property
    def version(self) -> int:
        """How often the compute copy was made anew: two equal versions are the same weights."""
        return self.weights.version

    @property
    def trainable(self) -> bool:
        return self.weights.trainable

    @property
    def head_name(self) -> str:
        """The parameter that maps hidden states to the vocabulary."""
        return "embed_tokens.weight" if self.architecture.tied_head else "lm_head.weight"

    @property
    def head(self) -> PackedWeight:  # (V, H)
        return self.weights.packed(self.head_name)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, of generation_config.json, or else of config.json."""
        for source in (self.generation_config or {}, self.config):
            given = source.get("eos_token_id")
            if given is not None:
                return frozenset([given] if isinstance(given, int) else given)
        return frozenset()

    def parameters(self) -> dict[str, Parameter]:
        """The float32 masters by name, in the order of the computation; empty in a frozen model."""
        return self.weights.masters

    def refresh(self) -> None:
        """Makes the compute copy anew from the masters: once after each optimizer step."""
        self.weights.refresh()

    def state(self) -> dict[str, Tensor]:
        """The float32 masters by name, for a checkpoint."""
        return self.weights.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts a ``state()`` back and refreshes."""
        self.weights.load_state(state)


def activation_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    """Of activations between ops, in a model whose compute copy is of dtype `storage`."""
    if device.type != "cpu" or not kernels_usable():
        return storage
    return storage if cpu_class() == "amx" else torch.float32


AnyModel = TypeVar("AnyModel", bound=Model)


def clone(model: AnyModel, trainable: bool) -> AnyModel:
    """A copy that shares no memory: the frozen reference of a policy, a value model from a reward
    model."""
    return replace(model, weights=model.weights.clone(trainable))


def whole(model: AnyModel) -> AnyModel:
    """The model to generate and score with: itself, or where its weights are sharded a frozen copy of it as it is now,
    which all ranks make together and which takes its memory for as long as it is held."""
    weights = model.weights.whole()
    return model if weights is model.weights else replace(model, weights=weights)


@dataclass(frozen=True)
class _Pass:
    """What every layer of one forward shares."""

    model: Model
    positions: Tensor  # (N,)
    attend: Attend
    dropout: Dropout | None
    rope_table: Tensor | None  # (P, R)
    act_dtype: torch.dtype
    selective: bool  # keeps only what is expensive to make again

    def norm(self, module: str, x: Tensor) -> Tensor:  # (N, any) -> same, act_dtype
        a, weights = self.model.architecture, self.model.weights
        weight = weights.vector(f"{module}.weight")
        if a.norm == "rmsnorm":
            return rmsnorm(x, weight, a.norm_eps, self.act_dtype)
        return layernorm(x, weight, weights.vector(f"{module}.bias"), a.norm_eps, self.act_dtype)

    def reading_norm(self, module: str, x: Tensor, normed: Tensor) -> AbstractContextManager[object]:
        """The block's products read ``normed`` = norm(x), which need not be kept beside x."""
        x = x.detach()
        return made_again(self.selective, normed, lambda: self.norm(module, x))

    def drop(self, x: Tensor, layer: int, sublayer: int, rows: Tensor | None) -> Tensor:
        return x if self.dropout is None else self.dropout(x, layer, sublayer, rows)


def hidden_states(
    model: Model,
    tokens: Tensor,  # (N,) int64, of the host or the model's device
    positions: Tensor,  # (N,) int64, of the host or the model's device
    attend: Attend,
    dropout: Dropout | None = None,
    rows: Tensor | None = None,  # (M,) int64, all different, on the model's device
    checkpointing: Checkpointing = "selective",
) -> Tensor:  # (N, H), or (M, H) of ``rows``, act_dtype
    """Hidden states after the final norm, one a token; see the module's docstring for the
    equations. With ``rows``, those of these rows only: the last layer makes keys and values of
    all rows, and queries and everything behind attention of these.

    ``attend(layer, q, k, v)`` is attention of the given rows, with q and k already rotated. Ids are checked where they
    lie on the host; on a GPU reading them would wait for all that was launched before.

    Raises:
        ModelError: a token outside the vocabulary, a position outside the model's range, or masters
            that were changed without ``model.refresh()``.
    """
    a, weights = model.architecture, model.weights
    weights.check()
    check_ids("token", tokens, a.vocab_size, "the vocabulary")
    longest = check_ids("position", positions, a.max_positions, "max_position_embeddings")
    tokens, positions = to_device(tokens, model.device), to_device(positions, model.device)
    table = None
    if a.rope is not None:
        length = max(SMALLEST_TABLE, 1 << longest.bit_length())
        table = rope_table(a.rope, length, model.device)
    selective, full = checkpointing == "selective", checkpointing == "full"
    step = _Pass(model, positions, attend, dropout, table, model.act_dtype, selective)
    return weights.through("", partial(_network, step, rows, full), tokens)


def forward(
    model: Model,
    batch: Packed,
    dropout: Dropout | None = None,
    rows: Tensor | None = None,  # (M,) int64 of the host, in any order, repeated where wanted
    checkpointing: Checkpointing = "selective",
) -> Tensor:  # (N, H), or (M, H) of ``rows``, act_dtype
    """Hidden states of a packed batch: every segment sees itself and, where it has one, its
    prefix. The batch comes from the host.

    ``rows``: what is read of them. ``forward(model, batch, rows=rows)`` is ``forward(model,
    batch)[rows]``, to the bit where the model is batch-invariant, without the work on other rows that
    only the last layer's output would show. ``checkpointing``: what is kept for the backward; it
    changes memory and time, no bit.
    """
    cu = to_device(batch.cu_seqlens, model.device)
    prefix = None if batch.prefix is None else to_device(batch.prefix, model.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, cu, prefix)

    def hidden(of: Tensor | None) -> Tensor:
        return hidden_states(
            model, batch.tokens, batch.positions, attend, dropout, of, checkpointing
        )

    if rows is None:
        return hidden(None)
    distinct, places = torch.unique(rows, return_inverse=True)
    if len(distinct) == len(batch.tokens):
        return chosen_rows(hidden(None), rows)
    made = hidden(to_device(distinct, model.device))
    return made if torch.equal(distinct, rows) else chosen_rows(made, places)


def chosen_rows(hidden: Tensor, rows: Tensor) -> Tensor:  # (N, H), (M,) of the host -> (M, H)
    """The hidden states that something is read from."""
    return hidden[to_device(rows, hidden.device)]


def logprobs(
    model: Model, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:  # (M, H), (M,) -> (M,), (M,) float32
    """log softmax(hidden W^T / temperature)[target] and the entropy of that distribution, a row;
    differentiable."""
    master = model.weights.master(model.head_name)
    targets = to_device(targets, hidden.device)
    logprob, entropy = linear_logprob(hidden, model.head, targets, temperature, master=master)
    return logprob, entropy


def logprob_loss(
    model: Model, hidden: Tensor, targets: Tensor, loss: Loss, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:  # (M, H), (M,) -> (), (M,), (M,) float32
    """A loss that is a sum over rows of functions of `logprobs`' two, differentiable, and the two without gradient."""
    master = model.weights.master(model.head_name)
    targets = to_device(targets, hidden.device)
    return linear_logprob_loss(hidden, model.head, targets, loss, temperature, master=master)


def logits(model: Model, hidden: Tensor) -> Tensor:  # (M, H) -> (M, V) float32
    """hidden W^T, for the few rows of a decode step and for tests; never for a batch of
    training."""
    master = model.weights.master(model.head_name)
    return linear(hidden, model.head, None, master, torch.float32)


def _network(
    step: _Pass, rows: Tensor | None, full: bool, tokens: Tensor
) -> Tensor:  # (N,) -> (N, H), or (M, H) of ``rows`` (M,), act_dtype
    a, weights = step.model.architecture, step.model.weights
    x = weights.lookup("embed_tokens.weight", tokens)  # (N, H) float32
    if a.rope is None:
        x = x + weights.lookup("embed_positions.weight", step.positions)
    for layer in range(a.num_layers):
        block = partial(_block, step, layer, rows=rows if layer == a.num_layers - 1 else None)
        x = weights.through(f"layers.{layer}", partial(computed_again, full, block), x)
    return step.norm("norm", x)


def _block(
    step: _Pass, layer: int, x: Tensor, rows: Tensor | None = None
) -> Tensor:  # (N, H) float32 -> same, or (M, H) of ``rows`` (M,)
    name = f"layers.{layer}"
    mixed = _attention(step, layer, x, rows)
    kept = x if rows is None else x.index_select(0, rows)
    after = kept + step.drop(mixed, layer, 0, rows)
    read = kept if step.model.architecture.parallel_residual else after
    inner = _mlp(step, name, read)
    return after + step.drop(inner, layer, 1, rows)


def _attention(
    step: _Pass, layer: int, x: Tensor, rows: Tensor | None
) -> Tensor:  # (N, H) -> (N, H) float32, or (M, H) of ``rows`` (M,)
    weights, module = step.model.weights, f"layers.{layer}.self_attn"
    norm, dtype = f"layers.{layer}.input_layernorm", step.model.kv_dtype
    normed = step.norm(norm, x)
    with step.reading_norm(norm, x, normed):
        q, k, v = _heads(step, module, normed, rows)
    k, v = (_as_cached(part, dtype) for part in (k, v))
    if rows is not None:  # the kernel has a query for each key; those of no use are 0
        q = q.new_zeros((len(k), *q.shape[1:])).index_copy(0, rows, q)
    with saved_as(step.selective, (k, v), dtype):
        out = step.attend(layer, q, k, v)  # (N, Hq, D)
    out = out if rows is None else out.index_select(0, rows)
    (result,) = weights.project(out.flatten(1), (f"{module}.o_proj",), torch.float32)
    return result


def _heads(
    step: _Pass, module: str, x: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # (N, H) -> (N or M, Hq, D), (N, Hk, D), (N, Hk, D)
    """Queries (of ``rows`` only, where given), keys and values, rotated."""
    a, weights = step.model.architecture, step.model.weights
    names = f"{module}.q_proj", f"{module}.k_proj", f"{module}.v_proj"
    if rows is None:
        flat = weights.project(x, names)
    else:
        flat = *weights.project(x.index_select(0, rows), names[:1]), *weights.project(x, names[1:])
    counts = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
    q, k, v = (part.view(-1, heads, a.head_dim) for part, heads in zip(flat, counts, strict=True))
    if a.qk_norm:
        q, k = _head_norm(step, f"{module}.q_norm", q), _head_norm(step, f"{module}.k_norm", k)
    if step.rope_table is not None:
        at = step.positions if rows is None else step.positions.index_select(0, rows)
        q = rope(q, at, step.rope_table)
        k = rope(k, step.positions, step.rope_table)
    return q, k, v


def _as_cached(x: Tensor, dtype: torch.dtype) -> Tensor:  # (N, Hk, D) -> same, dtype of x
    """Rounded to what a cache of keys and values holds, so that decoding reads the same numbers;
    the gradient goes straight through."""
    if x.dtype == dtype:
        return x
    rounded: Tensor = _Rounded.apply(x, dtype)  # type: ignore[no-untyped-call]
    return rounded


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _head_norm(step: _Pass, module: str, heads: Tensor) -> Tensor:  # (N, heads, D) -> same
    return step.norm(module, heads.flatten(0, 1)).view(heads.shape)


def _mlp(step: _Pass, layer: str, x: Tensor) -> Tensor:  # (N, H) -> (N, H) float32
    a, weights = step.model.architecture, step.model.weights
    norm, module = f"{layer}.post_attention_layernorm", f"{layer}.mlp"
    names = ("gate_proj", "up_proj") if a.gated else ("up_proj",)
    normed = step.norm(norm, x)
    with step.reading_norm(norm, x, normed):
        read = weights.project(normed, [f"{module}.{name}" for name in names])
    activate = partial(_activate, a, tuple(part.detach() for part in read))
    inner = _activate(a, read)
    with made_again(step.selective, inner, activate):
        (result,) = weights.project(inner, (f"{module}.down_proj",), torch.float32)
    return result


def _activate(a: Architecture, read: tuple[Tensor, ...]) -> Tensor:  # each (N, F) -> (N, F)
    if a.gated:
        return swiglu(read[0], read[1])
    return gelu(read[0], "tanh" if a.activation == "gelu_tanh" else "none")
