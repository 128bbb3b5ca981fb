"""Tiny random transformers models of every family and of every switch that a family has.

Sizes are odd on purpose, and norms and biases random, so that a wrong index cannot hide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, POSITIONS = 97, 64
ENDS = {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": None}
GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 57, "n_positions": POSITIONS}
NEOX = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 57,
    "max_position_embeddings": POSITIONS,
}
LLAMA = {**NEOX, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-gelu": (
        "gpt2",
        {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False, "n_inner": None},
    ),
    "gpt_neox": ("gpt_neox", {**NEOX, "rotary_pct": 0.5}),
    "gpt_neox-serial": (
        "gpt_neox",
        {
            **NEOX,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0},
        },
    ),
    "llama": ("llama", LLAMA),
    "llama-biased-tied-llama3": (
        "llama",
        {
            **LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama-one-key-head-linear": (
        "llama",
        {**LLAMA, "num_key_value_heads": 1, "head_dim": 20, "rope_parameters": LINEAR},
    ),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None, "head_dim": 14}),
    "mistral-wide-window": ("mistral", {**LLAMA, "sliding_window": POSITIONS}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 20}),
    "qwen3-biased": ("qwen3", {**LLAMA, "head_dim": 14, "attention_bias": True}),
}
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


def build(case: str, scalar: bool = False, **settings: Any) -> PreTrainedModel:
    """The transformers model of a case, float32, ready to score."""
    model_type, given = CASES[case]
    labels = {"num_labels": 1} if scalar else {}
    config = CONFIG_MAPPING[model_type](
        **{"vocab_size": VOCABULARY, **given, **ENDS, **labels, **settings}
    )
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + 1.0 * (parameter.dim() == 1))
    return model


def save(case: str, folder: Path, scalar: bool = False, **settings: Any) -> PreTrainedModel:
    model = build(case, scalar, **settings)
    model.save_pretrained(folder)
    return model


def some_sequences(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]


def hf_logits(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:  # (N, V)
    """Logits of each sequence on its own, one after the other.

    The parameters are put into memory of their own first: as views of a mapped file they lie at any address, and the
    order of sums in torch's float32 products depends on the alignment on some CPUs.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        parts = [model(torch.tensor([sequence])).logits[0] for sequence in sequences if sequence]
    return torch.cat(parts)
