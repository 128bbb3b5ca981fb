"""A row is a function of its own tokens and the weights alone, to the bit, on tiny models (docs/design.md P2)."""

from __future__ import annotations

import random

import pytest
from same_rows import Request, calls_that_differ, optimizer_step, trained, ways_that_differ
from small_engines import FAMILIES, save_tiny

from engine.model.weights import load_policy

DTYPES = ("float32", "bfloat16")
# one token, whole pages, one over, one under, more than one block of 64 keys
LENGTHS = (1, 16, 5, 17, 70, 31)
FEW = frozenset(range(3, 250, 12))  # stop tokens, so that answers end at different times


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def some_prompts(lengths):
    draws = random.Random(0)
    return [[draws.randrange(1, 250) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_compute_a_row_gives_the_same_bits(folders, family, dtype, cpu_class):
    """And again after an optimizer step, when every weight is another one."""
    model = load_policy(folders[family], dtype, trainable=True)
    request = Request(some_prompts(LENGTHS), 2, 12, FEW)
    before = request.sample(model)
    assert len({len(e.tokens) for e in before}) > 2
    assert not ways_that_differ(model, before)
    rows = trained(model, before)
    optimizer_step(model, before, 1e-2)
    assert (trained(model, before).logprob != rows.logprob).all()
    after = request.sample(model)
    assert [e.weights_version for e in after] == [1] * len(after)
    assert not ways_that_differ(model, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_tokens_in_any_batch(folders, family, dtype, cpu_class):
    """64 sequences at once, one at a time, in other orders, slots, pages and threads."""
    model = load_policy(folders[family], dtype)
    request = Request(some_prompts(draw_lengths(16)), 4, 9, FEW)
    want = request.sample(model)
    assert len(want) == 64 and len({e.tokens for e in want}) > 48
    assert not calls_that_differ(model, request, want)


def draw_lengths(count):
    draws = random.Random(5)
    return [draws.randrange(1, 40) for _ in range(count)]


def test_another_seed_or_another_episode_gives_other_tokens(folders):
    """Otherwise the test above would hold for a sampler that ignores its random numbers."""
    model = load_policy(folders["llama"], "float32")
    request = Request([[5, 6, 7]] * 4, 4, 9, frozenset())
    assert len({e.tokens for e in request.sample(model)}) == 16
