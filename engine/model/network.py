"""A model's compute copy as `transformer_step` reads it: every layer's tensors in one value."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.linear import PackedWeight
from engine.kernels.transformer_step import LayerWeights, Network

from .rotary import rope_table
from .transformer import SMALLEST_TABLE, Model


def step_network(model: Model, longest: int) -> Network:
    """The weights as they are now, for positions below ``longest``.

    Raises:
        ModelError: masters that were changed without ``model.refresh()``.
    """
    a, weights = model.architecture, model.weights
    weights.check()
    table = None
    if a.rope is not None:
        rows = max(SMALLEST_TABLE, 1 << (longest - 1).bit_length())
        table = rope_table(a.rope, rows, model.device)
    return Network(
        embed_tokens=weights.table("embed_tokens.weight"),
        embed_positions=None if a.rope is not None else weights.table("embed_positions.weight"),
        rope_table=table,
        last_norm=_norm(model, "norm"),
        head=model.head,
        layers=tuple(_layer(model, f"layers.{i}") for i in range(a.num_layers)),
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        intermediate_size=a.intermediate_size,
        rms=a.norm == "rmsnorm",
        gelu_tanh=a.activation == "gelu_tanh",
        parallel_residual=a.parallel_residual,
        eps=a.norm_eps,
    )


def _layer(model: Model, name: str) -> LayerWeights:
    a, weights = model.architecture, model.weights
    head_norms = [
        weights.vector(f"{name}.self_attn.{part}.weight") if a.qk_norm else None
        for part in ("q_norm", "k_norm")
    ]
    return LayerWeights(
        input_norm=_norm(model, f"{name}.input_layernorm"),
        q=_linear(model, f"{name}.self_attn.q_proj"),
        k=_linear(model, f"{name}.self_attn.k_proj"),
        v=_linear(model, f"{name}.self_attn.v_proj"),
        q_norm=head_norms[0],
        k_norm=head_norms[1],
        o=_linear(model, f"{name}.self_attn.o_proj"),
        inner_norm=_norm(model, f"{name}.post_attention_layernorm"),
        gate=_linear(model, f"{name}.mlp.gate_proj") if a.gated else None,
        up=_linear(model, f"{name}.mlp.up_proj"),
        down=_linear(model, f"{name}.mlp.down_proj"),
    )


def _norm(model: Model, module: str) -> tuple[Tensor, Tensor | None]:
    weights = model.weights
    return weights.vector(f"{module}.weight"), weights.optional_vector(f"{module}.bias")


def _linear(model: Model, module: str) -> tuple[PackedWeight, Tensor | None]:
    weights = model.weights
    return weights.packed(f"{module}.weight"), weights.optional_vector(f"{module}.bias")
