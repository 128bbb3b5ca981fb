"""transformer_step: one decode step of SmolLM2-135M's shape with random weights, against the same layer by layer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import floors
from bench.suite import work
from engine.generate.cache import PageCache
from engine.generate.sampling import Sampling
from engine.generate.steps import DefinedSteps, KernelSteps, Rows
from engine.kernels.attention_decode import PAGE
from engine.model.transformer import Model
from engine.model.weights import load_policy

CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return load_policy(folder, dtype="bfloat16")


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["engine", "layer by layer"])
def test_transformer_step(benchmark, model, name, rows):
    a, pages = model.architecture, CONTEXT // PAGE
    cache = PageCache(a.num_layers, rows * pages, a.num_kv_heads, a.head_dim, model.kv_dtype)
    for pages_of_layer in (*cache.keys, *cache.values):
        pages_of_layer.normal_()
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    batch = Rows(torch.arange(100, 100 + rows), torch.full((rows,), CONTEXT - 1), table)
    uniform = torch.rand(rows, dtype=torch.float64)
    one, other = (
        KernelSteps(model, cache, Sampling(1), CONTEXT),
        DefinedSteps(model, cache, Sampling(1)),
    )
    with torch.no_grad():
        ours, theirs = one.decode(batch, uniform), other.decode(batch, uniform)
        for field in ("tokens", "logprobs", "entropies"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
        sizes = floors.Sizes.of(model)
        elements = sizes.layer_elements + sizes.head_elements
        size = elements * sizes.weight_bytes + sizes.cache_bytes(rows, CONTEXT)
        flop = 2 * elements * rows + sizes.attention_flop(rows, CONTEXT)
        work(benchmark, size, flop, bf16=True)
        benchmark((one if name == "engine" else other).decode, batch, uniform)
