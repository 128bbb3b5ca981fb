"""transformer_step against the network's definition, with ==: hidden states, cache pages, draws; and its errors."""

from __future__ import annotations

import random

import pytest
import torch
from small_engines import FAMILIES, save_tiny

from engine.generate import steps
from engine.generate.cache import PageCache
from engine.generate.sampling import Sampling
from engine.generate.steps import DefinedSteps, KernelSteps, Rows
from engine.kernels._backend import BackendError, backend, extension, kernels_usable
from engine.kernels.attention_decode import PAGE
from engine.kernels.transformer_step import TransformerStep
from engine.model.network import step_network
from engine.model.weights import load_policy

pytestmark = pytest.mark.skipif(not kernels_usable(), reason="an op of the C++ kernels alone")
SETTINGS = Sampling(20, temperature=0.7)
LENGTHS = (1, 16, 5, 17, 33, 70)  # one token, whole pages, one over, more than one block of keys


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture
def llama(folders):
    return load_policy(folders["llama"], dtype="float32")


def cache_of(model) -> PageCache:
    a = model.architecture
    return PageCache(a.num_layers, 40, a.num_kv_heads, a.head_dim, model.kv_dtype)


def step_over(model, cache: PageCache) -> TransformerStep:
    return TransformerStep(step_network(model, 96), cache.keys, cache.values)


def some_prompts():
    draws = random.Random(1)
    return [[draws.randrange(1, 250) for _ in range(length)] for length in LENGTHS]


def some_pages():
    """Pages for 96 tokens a prompt, in no order."""
    order = list(range(40))
    random.Random(2).shuffle(order)
    return [order[i * 6 : (i + 1) * 6] for i in range(len(LENGTHS))]


def rows_after(prompts):
    positions = torch.tensor([len(p) for p in prompts])
    return Rows(positions % 200 + 3, positions, torch.tensor(some_pages(), dtype=torch.int32))


def check_against_the_definition(model, settings=SETTINGS):
    prompts, pages = some_prompts(), some_pages()
    uniform = torch.rand(len(prompts), dtype=torch.float64)
    caches = [cache_of(model), cache_of(model)]
    defined = DefinedSteps(model, caches[0], settings)
    stepped = KernelSteps(model, caches[1], settings, 96)
    with torch.no_grad():
        hidden = [steps.prefill(prompts, pages) for steps in (defined, stepped)]
        drawn = [steps.decode(rows_after(prompts), uniform) for steps in (defined, stepped)]
    assert torch.equal(*hidden)
    for name in ("tokens", "logprobs", "entropies"):
        assert torch.equal(*(getattr(d, name) for d in drawn)), name
    for mine, other in zip(*(c.keys + c.values for c in caches), strict=True):
        assert torch.equal(mine, other)
    assert all(page.abs().sum() > 0 for page in caches[1].keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_definition_to_the_bit(folders, family, dtype):
    check_against_the_definition(load_policy(folders[family], dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_every_class_of_cpu(folders, dtype, cpu_class):
    check_against_the_definition(load_policy(folders["qwen3"], dtype=dtype))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_with_threads(llama, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):  # a barrier that lets one through would show sooner or later
            check_against_the_definition(llama)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 20, 51])
def test_prompts_that_do_not_fit_one_call_come_back_in_their_order(llama, monkeypatch, tokens):
    """Cut into calls of this many tokens (longest first, so not in order), or of one prompt that is longer."""
    monkeypatch.setattr(steps, "PREFILL_TOKENS", tokens)
    check_against_the_definition(llama)


def test_with_a_filter_the_hidden_rows_are_drawn_from(llama):
    check_against_the_definition(llama, Sampling(20, top_k=5))


def test_a_prompt_in_pieces_is_the_prompt_at_once(llama):
    prompt, table = some_prompts()[-1], torch.tensor(some_pages()[:1], dtype=torch.int32)
    results = []
    for cuts in ((0, 70), (0, 1, 16, 50, 70)):
        cache = cache_of(llama)
        step = step_over(llama, cache)
        for first, last in zip(cuts, cuts[1:], strict=False):
            hidden, *_ = step(
                torch.tensor(prompt[first:last]),
                torch.arange(first, last),
                torch.tensor([0, last - first], dtype=torch.int32),
                table,
            )
        results.append((hidden, cache))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1].keys, results[1][1].keys))


def test_no_sequences_give_nothing(llama):
    none, cu = torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    table = torch.empty(0, 3, dtype=torch.int32)
    step = step_over(llama, cache_of(llama))
    hidden, *drawn = step(none, none, cu, table, torch.empty(0).double())
    assert hidden.shape == (0, 36) and all(t.numel() == 0 for t in drawn)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": [5, 9999]}, r"tokens\[1\]: got 9999, want 0 ... "),
        (
            {"cu": [0, 2], "table": [[0] * 6], "uniform": [0.5]},
            r"positions\[1\]: got 0, want 4, one after the other",
        ),
        ({"positions": [96, 0]}, r"positions\[0\]: got 96, want 0 ... 95"),
        ({"cu": [0, 0, 2]}, "sequence 0 has no new row"),
        ({"cu": [0, 1]}, r"cu\[-1\]: got 1, want the number of tokens 2"),
        ({"table": [[0] * 6, [40] * 6]}, r"page_table\[1\]\[0\]: got 40, want 0 ... 39"),
        ({"uniform": [0.5]}, r"uniform: got shape \[1\], want \(2,\)"),
        ({"temperature": 0.0}, "temperature: got 0, want a number above 0"),
    ],
)
def test_errors_say_what_is_wanted(llama, change, message):
    given = {"tokens": [5, 6], "positions": [3, 0], "cu": [0, 1, 2], "table": [[0] * 6, [1] * 6]}
    given |= {"uniform": [0.5, 0.5], "temperature": 1.0, **change}
    step = step_over(llama, cache_of(llama))
    with pytest.raises(ValueError, match=message):
        step(
            torch.tensor(given["tokens"]),
            torch.tensor(given["positions"]),
            torch.tensor(given["cu"], dtype=torch.int32),
            torch.tensor(given["table"], dtype=torch.int32),
            torch.tensor(given["uniform"], dtype=torch.float64),
            given["temperature"],
        )


def test_a_cache_of_another_dtype_or_with_a_layer_less_is_an_error(llama):
    cache = cache_of(llama)
    keys = [k.double() for k in cache.keys]
    with pytest.raises(ValueError, match="cache: got dtype Double, want Float"):
        TransformerStep(step_network(llama, 96), keys, cache.values)
    with pytest.raises(ValueError, match="keys, values: got 2 and 1, want one a layer, 2"):
        TransformerStep(step_network(llama, 96), cache.keys, cache.values[:1])


def test_a_step_that_is_kept_reads_what_a_refresh_has_written(folders):
    """Every parameter is another one: matrices, norms and tables lie where they lay."""
    model, one = load_policy(folders["gpt2"], dtype="bfloat16", trainable=True), torch.ones(1).double()
    given = torch.tensor([5]), torch.tensor([0]), torch.tensor([0, 1]).int(), torch.zeros(1, 6).int()
    kept, results = step_over(model, cache_of(model)), []
    for change in (0.0, 0.5):
        for master in model.weights.masters.values():
            master.data.mul_(1 + change).add_(change)
        model.refresh()
        for step in (kept, step_over(model, cache_of(model))):
            results.append(step(*given, one * 0.3)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    assert not torch.equal(results[1], results[3])


def test_a_step_is_of_one_class_of_cpu(llama):
    step, used = step_over(llama, cache_of(llama)), extension().cpu_class()
    if used == "plain":
        pytest.skip("this machine has one class only")
    one, cu = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
    extension().set_cpu_class("plain")
    try:
        with pytest.raises(ValueError, match=f"packed for class {used}, want plain.*anew"):
            step(one, one, cu, torch.zeros(1, 1, dtype=torch.int32))
    finally:
        extension().set_cpu_class(used)


def test_on_the_definitions_it_says_where_the_definition_is(llama):
    network, cache = step_network(llama, 96), cache_of(llama)
    with backend("reference"), pytest.raises(BackendError, match="hidden_states"):
        TransformerStep(network, cache.keys, cache.values)


def test_pages_are_those_of_the_cache():
    assert PAGE == 16  # the tests above cut prompts at its multiples
