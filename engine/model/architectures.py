"""What differs between families of models, as data read from a Hugging Face ``config.json``.

The network itself is defined once, in ``transformer.py``; it asks an ``Architecture`` and never a
family's name. A setting that would change the result and is not implemented is an error, never
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import EngineError, ModelError

from .rotary import Rope, read_rope

MAX_LAYERS = 10_000  # more is no model, but a file that would fill the memory with names

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

# Names that transformers gives to one and the same function.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder-only transformer.

    ``activation == "silu"`` is the gated form down(silu(gate) * up); the gelus are down(gelu(up)).
    ``attention_bias`` is on the q, k and v projections, ``output_bias`` on the projection after
    attention. ``rope is None`` means learned positions.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: Norm
    norm_eps: float
    activation: Activation
    rope: Rope | None
    parallel_residual: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    @property
    def gated(self) -> bool:
        return self.activation == "silu"

    @property
    def learned_positions(self) -> bool:
        return self.rope is None

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that rotate with the position; 0 with learned positions."""
        return 0 if self.rope is None else self.rope.rotary_dim

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config.json: got {self.num_heads} attention heads and {self.num_kv_heads}"
                " key/value heads, want the first to be a multiple of the second"
            )


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Raises:
        ModelError: an unknown ``model_type``, a size missing, or a setting that is not supported.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        known = ", ".join(READERS)
        raise ModelError(f"config.json: model_type: got {family!r}, want one of {known}")
    for key in ("quantization_config", "pruned_heads", "is_encoder_decoder", "add_cross_attention"):
        if config.get(key):
            raise ModelError(
                f"config.json: {key}: got {config[key]!r}, want it absent: a plain decoder in"
                " float weights"
            )
    try:
        architecture = READERS[family](config)
    except EngineError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise ModelError(
            f"config.json: a setting is of another type than {family} models have ({error})"
        ) from error
    if architecture.num_layers > MAX_LAYERS:
        raise ModelError(f"config.json: got {architecture.num_layers} layers, want at most {MAX_LAYERS}")
    return architecture


def _gpt2(config: Mapping[str, Any]) -> Architecture:
    _want(config, "scale_attn_weights", True)
    _want(config, "scale_attn_by_inverse_layer_idx", False)
    hidden, heads = _size(config, "n_embd"), _size(config, "n_head")
    return Architecture(
        family="gpt2",
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(config, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_divided(hidden, heads),
        intermediate_size=_size(config, "n_inner", 4 * hidden),
        max_positions=_size(config, "n_positions"),
        norm="layernorm",
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        activation=_activation(config, "activation_function", "gelu_new", gated=False),
        rope=None,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )


def _gpt_neox(config: Mapping[str, Any]) -> Architecture:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim, max_positions = _divided(hidden, heads), _size(config, "max_position_embeddings")
    bias = bool(config.get("attention_bias", True))
    return Architecture(
        family="gpt_neox",
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=_size(config, "intermediate_size"),
        max_positions=max_positions,
        norm="layernorm",
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        activation=_activation(config, "hidden_act", "gelu", gated=False),
        rope=read_rope(config, head_dim, max_positions, partial=True),
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def _llama(config: Mapping[str, Any]) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    return _llama_like(config, bias, bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Mapping[str, Any]) -> Architecture:
    _refuse_window(config, config.get("sliding_window", 4096))
    return _llama_like(config)


def _qwen2(config: Mapping[str, Any]) -> Architecture:
    _refuse_qwen_window(config)
    return _llama_like(config, attention_bias=True)


def _qwen3(config: Mapping[str, Any]) -> Architecture:
    _refuse_qwen_window(config)
    bias = bool(config.get("attention_bias", False))
    return _llama_like(config, bias, bias, qk_norm=True, head_dim=128)


def _llama_like(
    config: Mapping[str, Any],
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,  # where config.json is silent; None: hidden_size / heads
) -> Architecture:
    kinds = config.get("layer_types") or []
    other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if other:
        raise ModelError(f"config.json: layer_types: got {other[0]!r}, want 'full_attention' only")
    if "sliding_attention" in kinds:
        _refuse_window(config, config.get("sliding_window"))
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    if head_dim is None and config.get("head_dim") is None:
        head_dim = _divided(hidden, heads)
    head_dim = _size(config, "head_dim", head_dim)
    max_positions = _size(config, "max_position_embeddings")
    # llama before grouped heads has no such key; the others default to a number that fits one size
    # of model only
    silent = config["model_type"] == "llama" or "num_key_value_heads" in config
    return Architecture(
        family=config["model_type"],
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", heads if silent else None),
        head_dim=head_dim,
        intermediate_size=_size(config, "intermediate_size"),
        max_positions=max_positions,
        norm="rmsnorm",
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=_activation(config, "hidden_act", "silu", gated=True),
        rope=read_rope(config, head_dim, max_positions, partial=False),
        qk_norm=qk_norm,
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


READERS: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key}: got {value!r}, want a whole number >= 1")
    return value


def _divided(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ModelError(
            f"config.json: got hidden size {hidden} and {heads} attention heads, want the first"
            " to be a multiple of the second"
        )
    return hidden // heads


def _want(config: Mapping[str, Any], key: str, wanted: bool) -> None:
    if bool(config.get(key, wanted)) != wanted:
        raise ModelError(f"config.json: {key}: got {config[key]!r}, only {wanted} is supported")


def _activation(config: Mapping[str, Any], key: str, default: str, gated: bool) -> Activation:
    name = config.get(key, default)
    known = [n for n, activation in ACTIVATIONS.items() if (activation == "silu") == gated]
    if name not in known:
        raise ModelError(f"config.json: {key}: got {name!r}, want one of {', '.join(known)}")
    return ACTIVATIONS[name]


def _refuse_window(config: Mapping[str, Any], window: int | None) -> None:
    longest = _size(config, "max_position_embeddings")
    if window is not None and window < longest:
        raise ModelError(
            f"config.json: sliding_window: got {window} with max_position_embeddings {longest};"
            f" sliding-window attention is not supported. Up to {window} tokens it is full"
            f" attention: to use the model so, set max_position_embeddings to {window}"
        )


def _refuse_qwen_window(config: Mapping[str, Any]) -> None:
    """Without ``layer_types`` the window is on the layers from ``max_window_layers`` up."""
    if config.get("layer_types") is not None or not config.get("use_sliding_window", False):
        return
    if config.get("max_window_layers", 28) < _size(config, "num_hidden_layers"):
        _refuse_window(config, config.get("sliding_window", 4096))


def check_ids(what: str, ids: Tensor, size: int, limit: str) -> int:
    """The largest id (0 of none; of a GPU's ids, which are not read, the largest possible). An id outside 0 .. size-1
    is an error that names it and its row."""
    if ids.device.type != "cpu":
        return size - 1
    if ids.numel() == 0:
        return 0
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        bad = high if high >= size else low
        row = int((ids == bad).nonzero()[0])
        raise ModelError(
            f"{what} {bad} in row {row}: {limit} goes from 0 to {size - 1};"
            " check the tokenizer, or shorten the sequence"
        )
    return high
