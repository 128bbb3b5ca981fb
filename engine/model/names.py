"""The names of the parameters, here and in Hugging Face files, as data.

Inside the engine every family has the names of llama without the leading ``model.``; ``PLACES``
says where a module of a family lies in its files. Loading reads with it and saving writes with it,
so the two cannot drift apart.

Letters: V vocabulary, P positions, H hidden, F intermediate, D head size, Hq/Hk query/key heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .architectures import Architecture

Kind = Literal["matrix", "table", "vector", "score"]
Head = Literal["lm_head", "score"]


@dataclass(frozen=True)
class Spec:
    """One parameter. ``kind``: a matrix is packed for products, a table is looked up by row, a
    vector is used as it is by norms and as bias; the score head is a matrix that stays float32 in
    every storage type."""

    shape: tuple[int, ...]
    kind: Kind


def parameter_specs(a: Architecture, head: Head) -> dict[str, Spec]:
    """Every parameter of the model by internal name, in the order of the computation."""
    specs = {"embed_tokens.weight": Spec((a.vocab_size, a.hidden_size), "table")}
    if a.learned_positions:
        specs["embed_positions.weight"] = Spec((a.max_positions, a.hidden_size), "table")
    for layer in range(a.num_layers):
        specs.update({f"layers.{layer}.{name}": spec for name, spec in _layer_specs(a)})
    specs.update(_norm("norm", a))
    if head == "score":
        specs["score.weight"] = Spec((1, a.hidden_size), "score")
    elif a.tied_head:  # the token table is the output matrix too
        specs["embed_tokens.weight"] = Spec((a.vocab_size, a.hidden_size), "matrix")
    else:
        specs["lm_head.weight"] = Spec((a.vocab_size, a.hidden_size), "matrix")
    return specs


def _layer_specs(a: Architecture) -> Iterator[tuple[str, Spec]]:
    hidden, inner = a.hidden_size, a.intermediate_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    yield from _norm("input_layernorm", a)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _projection(f"self_attn.{name}", rows, hidden, a.attention_bias)
    if a.qk_norm:
        yield "self_attn.q_norm.weight", Spec((a.head_dim,), "vector")
        yield "self_attn.k_norm.weight", Spec((a.head_dim,), "vector")
    yield from _projection("self_attn.o_proj", hidden, queries, a.output_bias)
    yield from _norm("post_attention_layernorm", a)
    for name in ("gate_proj", "up_proj") if a.gated else ("up_proj",):
        yield from _projection(f"mlp.{name}", inner, hidden, a.mlp_bias)
    yield from _projection("mlp.down_proj", hidden, inner, a.mlp_bias)


def _projection(module: str, rows: int, cols: int, bias: bool) -> Iterator[tuple[str, Spec]]:
    yield f"{module}.weight", Spec((rows, cols), "matrix")
    if bias:
        yield f"{module}.bias", Spec((rows,), "vector")


def _norm(module: str, a: Architecture) -> Iterator[tuple[str, Spec]]:
    yield f"{module}.weight", Spec((a.hidden_size,), "vector")
    if a.norm == "layernorm":
        yield f"{module}.bias", Spec((a.hidden_size,), "vector")


REST = ""  # the part of embeddings, last norm and output matrix


def part_of(name: str) -> str:
    """The part of the network that reads a parameter, which is gathered as one where weights are sharded:
    "layers.3.mlp.up_proj.weight" -> "layers.3", "score.weight" -> "score", anything else belongs to the rest."""
    pieces = name.split(".")
    if pieces[0] == "layers":
        return ".".join(pieces[:2])
    return "score" if pieces[0] == "score" else REST


@dataclass(frozen=True)
class Place:
    """Where a module's tensors lie in the files of a family.

    transposed: the weight is kept (in, out). part: the module is this third (q, k or v) of a fused
    one, which lies as (3, heads, D) rows, or as (heads, 3, D) where ``by_head``.
    """

    module: str
    transposed: bool = False
    part: int | None = None
    by_head: bool = False

    def read(self, stored: Tensor, head_dim: int) -> Tensor:
        """The parameter (a view where possible) out of the stored tensor."""
        rows = stored.T if self.transposed and stored.dim() == 2 else stored
        if self.part is None:
            return rows
        if not self.by_head:
            return rows.chunk(3)[self.part]
        by_head = rows.view(-1, 3, head_dim, *rows.shape[1:])
        return by_head[:, self.part].flatten(0, 1)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter of this shape."""
        rows = shape if self.part is None else (3 * shape[0], *shape[1:])
        return rows[::-1] if self.transposed else rows

    def write(self, parts: list[Tensor], head_dim: int) -> Tensor:
        """The stored tensor out of its parameters, in order of ``part``: the inverse of
        ``read``."""
        if self.part is None:
            rows = parts[0]
        elif self.by_head:
            split = [part.view(-1, head_dim, *part.shape[1:]) for part in parts]
            rows = torch.stack(split, dim=1).flatten(0, 2)
        else:
            rows = torch.cat(parts)
        return (rows.T if self.transposed and rows.dim() == 2 else rows).contiguous()


@dataclass(frozen=True)
class Naming:
    """How one family names things in files and in transformers."""

    prefix: str  # of every module but the heads
    causal_class: str
    scalar_class: str
    places: dict[str, Place]  # by internal module; one not named here has its internal name
    head: str = "lm_head"
    head_aliases: tuple[str, ...] = ()  # other names of the head that transformers has written
    buffers: tuple[str, ...] = ()  # ends of names of constants that older versions wrote out


GPT2 = {
    "embed_tokens": Place("wte"),
    "embed_positions": Place("wpe"),
    "norm": Place("ln_f"),
    "layers.{}.input_layernorm": Place("h.{}.ln_1"),
    "layers.{}.self_attn.q_proj": Place("h.{}.attn.c_attn", transposed=True, part=0),
    "layers.{}.self_attn.k_proj": Place("h.{}.attn.c_attn", transposed=True, part=1),
    "layers.{}.self_attn.v_proj": Place("h.{}.attn.c_attn", transposed=True, part=2),
    "layers.{}.self_attn.o_proj": Place("h.{}.attn.c_proj", transposed=True),
    "layers.{}.post_attention_layernorm": Place("h.{}.ln_2"),
    "layers.{}.mlp.up_proj": Place("h.{}.mlp.c_fc", transposed=True),
    "layers.{}.mlp.down_proj": Place("h.{}.mlp.c_proj", transposed=True),
}
QKV = "layers.{}.attention.query_key_value"
GPT_NEOX = {
    "embed_tokens": Place("embed_in"),
    "norm": Place("final_layer_norm"),
    "layers.{}.self_attn.q_proj": Place(QKV, part=0, by_head=True),
    "layers.{}.self_attn.k_proj": Place(QKV, part=1, by_head=True),
    "layers.{}.self_attn.v_proj": Place(QKV, part=2, by_head=True),
    "layers.{}.self_attn.o_proj": Place("layers.{}.attention.dense"),
    "layers.{}.mlp.up_proj": Place("layers.{}.mlp.dense_h_to_4h"),
    "layers.{}.mlp.down_proj": Place("layers.{}.mlp.dense_4h_to_h"),
}


def _llama(name: str) -> Naming:
    return Naming(
        "model.",
        f"{name}ForCausalLM",
        f"{name}ForSequenceClassification",
        places={},
        buffers=(".rotary_emb.inv_freq",),
    )


NAMINGS = {
    "gpt2": Naming(
        "transformer.",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        GPT2,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Naming(
        "gpt_neox.",
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        GPT_NEOX,
        head="embed_out",
        head_aliases=("lm_head",),
        buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "llama": _llama("Llama"),
    "mistral": _llama("Mistral"),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3"),
}


def place_of(family: str, name: str) -> tuple[Place, str]:
    """Place and full stored name of the parameter with this internal name."""
    naming = NAMINGS[family]
    module, _, leaf = name.rpartition(".")
    if module == "score":
        return Place("score"), f"score.{leaf}"
    if module == "lm_head":
        return Place(naming.head), f"{naming.head}.{leaf}"
    pieces = module.split(".")
    layer = pieces[1] if pieces[0] == "layers" else ""
    pattern = ".".join(["layers", "{}", *pieces[2:]]) if layer else module
    place = naming.places.get(pattern, Place(pattern))
    return place, f"{naming.prefix}{place.module.format(layer)}.{leaf}"
