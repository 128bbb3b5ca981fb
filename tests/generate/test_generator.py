"""Generation: stops, limits, errors, and without the C++ kernels the same tokens whatever the batch, slots and pages.

To the bit, on every family, dtype and class of CPU: test_bits.py.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from small_engines import CONTEXT, FAMILIES, save_tiny

from engine.data.pack import pack_sequences, predictions
from engine.errors import ConfigError
from engine.generate.generator import Generated, generate
from engine.generate.sampling import Sampling
from engine.generate.scheduler import Limits
from engine.kernels._backend import backend, kernels_usable
from engine.model import transformer
from engine.model.weights import load_policy

FP32 = "float32"
LENGTHS = (1, 16, 5, 17, 32, 31, 2, 48)  # one token, full pages, one token over, one under


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def llama(folders):
    return load_policy(folders["llama"], dtype=FP32)


def some_prompts(lengths=LENGTHS, seed=0):
    draws = random.Random(seed)
    return [[draws.randrange(1, 250) for _ in range(length)] for length in lengths]


def scored(model, results: list[Generated], temperature=1.0):
    """Log-probs and entropies of the results' tokens by one packed training forward."""
    batch = pack_sequences([r.prompt_tokens + r.tokens for r in results])
    shift = predictions(batch, skip_first=[len(r.prompt_tokens) for r in results])
    with torch.no_grad():
        hidden = transformer.forward(model, batch)[shift.rows]
        logprob, entropy = transformer.logprobs(model, hidden, shift.targets, temperature)
    lengths = shift.cu.diff().tolist()
    return list(zip(logprob.split(lengths), entropy.split(lengths), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_full_forward_on_the_torch_definitions(folders, family):
    with backend("reference"):
        model = load_policy(folders[family], dtype=FP32)
        results = generate(model, some_prompts(), Sampling(20), frozenset(), seed=3)
        for result, (logprob, entropy) in zip(results, scored(model, results), strict=True):
            torch.testing.assert_close(result.logprobs, logprob, rtol=0, atol=1e-4)
            torch.testing.assert_close(result.entropies, entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_batch_order_slots_and_pages_change_no_token(llama, n):
    prompts, settings, eos = some_prompts(), Sampling(20), frozenset({7, 99})
    ids = list(range(100, 100 + len(prompts) * n))
    want = generate(llama, prompts, settings, eos, n=n, seed=1, episode_ids=ids)
    page = (
        16 * 2 * 2 * 2 * 10 * llama.kv_dtype.itemsize
    )  # layers, keys and values, heads, head size
    for limits in (
        Limits(max_active=1),
        Limits(max_active=2, prefill_tokens=10),
        Limits(kv_cache_gb=6 * page * 1e-9),
    ):
        again = generate(llama, prompts, settings, eos, n, 1, ids, limits)
        assert_same(again, want)
    order = [5, 0, 7, 2, 6, 1, 4, 3]
    ids_in_order = [ids[i * n + k] for i in order for k in range(n)]
    shuffled = generate(llama, [prompts[i] for i in order], settings, eos, n, 1, ids_in_order)
    sorted_back = sorted(shuffled, key=lambda g: g.episode_id)
    assert [g.episode_id for g in sorted_back] == ids
    assert_same(sorted_back, want)
    for index, prompt in enumerate(prompts):
        chosen = slice(index * n, index * n + n)
        alone = generate(llama, [prompt], settings, eos, n, 1, ids[chosen])
        assert_same(alone, want[chosen])


def assert_same(got, want):
    """Equal tokens and log-probs; one sequence at a time, so that a failure is short."""
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.tokens == other.tokens, f"sequence {index}"
        if kernels_usable():
            assert torch.equal(one.logprobs, other.logprobs), f"sequence {index}"
        else:
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_samples_that_share_a_prompt_are_the_samples_of_the_prompt_repeated(llama):
    prompts = some_prompts((1, 16, 17, 30))
    shared = generate(llama, prompts, Sampling(18), frozenset({7}), n=3, seed=2)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    assert_same(shared, generate(llama, repeated, Sampling(18), frozenset({7}), seed=2))
    assert len({g.tokens for g in shared}) > 6, "the samples of a prompt are copies of each other"
    assert [g.prompt_tokens for g in shared] == [tuple(prompt) for prompt in repeated]


def test_a_sequence_ends_with_its_first_stop_token_or_at_the_limit(llama):
    free = generate(llama, some_prompts(), Sampling(24), frozenset(), seed=4)
    assert all(g.finish_reason == "length" and len(g.tokens) == 24 for g in free)
    stops = frozenset({free[0].tokens[5], free[2].tokens[23], free[3].tokens[0]})
    ended = generate(llama, some_prompts(), Sampling(24), stops, seed=4)
    for one, other in zip(ended, free, strict=True):
        hits = [t for t, token in enumerate(other.tokens) if token in stops]
        assert one.tokens == (other.tokens[: hits[0] + 1] if hits else other.tokens)
        assert one.finish_reason == ("stop" if hits else "length")
        assert len(one.logprobs) == len(one.entropies) == len(one.tokens)
    assert len(ended[3].tokens) == 1 and ended[2].finish_reason == "stop"


def test_no_prompts_give_no_results(llama):
    assert generate(llama, [], Sampling(4), frozenset()) == []


def test_one_new_token_needs_no_decode_step(llama):
    results = generate(llama, some_prompts((1, 3)), Sampling(1), frozenset(), n=2)
    assert [len(g.tokens) for g in results] == [1, 1, 1, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_many_draws_follow_the_softmax(llama, temperature):
    """Chi-square of the first token of 5,000 samples of one prompt against softmax(logits /
    temperature).
    """
    prompt, count = some_prompts((9,))[0], 5000
    settings = Sampling(1, temperature)
    results = generate(llama, [prompt], settings, frozenset(), count, limits=Limits(count))
    seen = torch.bincount(torch.tensor([g.tokens[0] for g in results]), minlength=300).double()
    batch = pack_sequences([prompt])
    with torch.no_grad():
        z = transformer.logits(llama, transformer.forward(llama, batch)[-1:])[0].double()
    expected = (z / temperature).softmax(-1) * count
    big = expected >= 5  # the usual rule of the test; the rest is one class
    parts = torch.stack(
        [
            torch.cat([seen[: len(z)][big], seen[: len(z)][~big].sum()[None]]),
            torch.cat([expected[big], expected[~big].sum()[None]]),
        ]
    )
    chi2 = ((parts[0] - parts[1]) ** 2 / parts[1].clamp_min(1e-9)).sum().item()
    freedom = int(big.sum())
    assert freedom > 5 and chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_filters_sample_their_law_and_return_its_log_prob(llama):
    prompts = some_prompts((9, 20))
    for settings in (Sampling(12, 1.3, top_k=4), Sampling(12, top_p=0.6), Sampling(12, top_k=1)):
        results = generate(llama, prompts, settings, frozenset(), n=4, seed=8)
        for result, (logprob, _) in zip(
            results, scored(llama, results, settings.temperature), strict=True
        ):
            assert (result.logprobs >= logprob - 1e-5).all(), (
                "a filtered law has more mass on its tokens"
            )
            assert (result.logprobs <= 1e-6).all()
        if settings.top_k == 1:
            greedy = generate(llama, prompts, Sampling(12, greedy=True), frozenset(), n=4, seed=9)
            assert all(g.tokens == r.tokens for g, r in zip(greedy, results, strict=True))
            assert all((g.logprobs == 0).all() and (g.entropies == 0).all() for g in greedy)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 4, "prompt 1 has no tokens"),
        ([5] * (CONTEXT - 3), 4, f"make {CONTEXT + 1}, the model's context is {CONTEXT}"),
        ([5, 263], 4, "token ids 5..263"),
        ([-1], 4, "token ids -1..-1"),
        ([5] * 60, 20, r"prompt 1 \(60 tokens\) .* needs 5 pages"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_runs(llama, prompt, new, message):
    page = 16 * 2 * 2 * 2 * 10 * llama.kv_dtype.itemsize
    limits = Limits(kv_cache_gb=4.5 * page * 1e-9)
    with pytest.raises(ConfigError, match=message):
        generate(llama, [[1], prompt], Sampling(new), frozenset(), limits=limits)


def test_wrong_counts_are_errors(llama):
    with pytest.raises(ConfigError, match="n: got 0"):
        generate(llama, [[1]], Sampling(1), frozenset(), n=0)
    with pytest.raises(ConfigError, match="episode_ids: got 1; give one a sample, 2 here"):
        generate(llama, [[1]], Sampling(1), frozenset(), n=2, episode_ids=[3])


def test_the_whole_context_can_be_filled(llama):
    (result,) = generate(llama, some_prompts((CONTEXT - 20,)), Sampling(20), frozenset())
    assert len(result.tokens) == 20
