"""Tiny random models of every family, as Hugging Face folders with a byte tokenizer, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONTEXT = 96
SPECIAL = ["<|end|>", "<|user|>", "<|model|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        **HEADS,
        "head_dim": 10,
    },
    "gpt2": {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": CONTEXT},
    "gpt_neox": {
        "hidden_size": 40,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rotary_pct": 0.4,
    },
    "qwen2": {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, **HEADS},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        **HEADS,
        "head_dim": 10,
        "tie_word_embeddings": False,
    },
}
FAMILIES = tuple(SIZES)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and three special ones; `<|end|>` ends a sequence."""
    vocab = {
        symbol: i for i, symbol in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0])
    fast.chat_template = TEMPLATE
    return fast


def save_tiny(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of `family` in `folder`; weights large enough that its law is far from
    uniform.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    sizes = {"max_position_embeddings": CONTEXT, **SIZES[family]}
    if family == "gpt2":
        del sizes["max_position_embeddings"]
    eos = tokenizer.eos_token_id
    # more rows than the tokenizer has tokens, as real models have
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer) + 4, eos_token_id=eos, bos_token_id=None, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)  # weights at 1 would hide an index
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
