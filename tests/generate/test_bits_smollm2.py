"""SmolLM2-135M itself: the same bits in every way, and the logits of transformers (docs/design.md P2)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close
from same_rows import Request, calls_that_differ, optimizer_step, trained, ways_that_differ
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.data.pack import pack_sequences
from engine.kernels._backend import kernels_usable
from engine.model.transformer import forward, logits
from engine.model.weights import load_policy

DTYPES = ("float32", "bfloat16")
LONG = (
    "Once upon a time there was an old man who lived by himself near the forest. Every day he went out to look for"
    " wood, and every evening he sat by the fire and told his dog about the things that he had seen. One winter"
    " night somebody knocked at the small wooden door, and the dog"
)
TEXTS = ("The", "A small cat sat on", "Write a short review of a hotel by the sea, in one", LONG)


@pytest.fixture(scope="module")
def prompts(smollm2):
    """One token, less than a page, a page after a token or two, and more than a block of 64 keys soon."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    found = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [len(prompt) for prompt in found] == [1, 5, 13, 61]
    return found


@pytest.mark.skipif(not kernels_usable(), reason="the promise of the C++ kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_to_compute_a_row_gives_the_same_bits(smollm2, prompts, dtype):
    """And again after an optimizer step, when every weight is another one."""
    model = load_policy(smollm2, dtype, trainable=True)
    request = Request([prompts[1], prompts[3]], 2, 4, frozenset())
    before = request.sample(model)
    assert not ways_that_differ(model, before)
    rows = trained(model, before)
    optimizer_step(model, before, 1e-4)
    assert (trained(model, before).logprob != rows.logprob).all()
    after = request.sample(model)
    assert [e.weights_version for e in after] == [1] * len(after)
    assert not ways_that_differ(model, after)


@pytest.mark.skipif(not kernels_usable(), reason="the promise of the C++ kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_tokens_in_any_batch(smollm2, prompts, dtype):
    """64 sequences at once, one at a time, in other orders, slots, pages and threads."""
    model = load_policy(smollm2, dtype)
    request = Request(prompts[:3] + [prompts[3][:30]], 16, 3, frozenset())
    want = request.sample(model)
    assert len(want) == 64 and len({e.tokens for e in want}) > 48
    assert not calls_that_differ(model, request, want)


def their_logits(model, sequences):  # (N, V)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([s])).logits[0] for s in sequences])


def our_logits(folder, dtype, sequences):  # (N, V)
    model = load_policy(folder, dtype)
    with torch.no_grad():
        return logits(model, forward(model, pack_sequences(sequences)))


@pytest.fixture(scope="module")
def float32_logits(smollm2, prompts):
    """transformers', ours, and transformers' in float64."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs, ours = their_logits(model, prompts), our_logits(smollm2, "float32", prompts)
    return theirs, ours, their_logits(model.double(), prompts)


def test_float32_logits_are_those_of_transformers(float32_logits):
    theirs, ours, _ = float32_logits
    assert theirs.std() > 0.5
    assert (ours - theirs).pow(2).mean().sqrt() <= 1e-4


@pytest.mark.skipif(not kernels_usable(), reason="of the C++ kernels' sums")
def test_every_float32_logit_is_that_of_transformers(float32_logits):
    """In float64: its own float32 logits are up to 2e-4 from those where torch's products take 16 lanes, ours 7e-5."""
    _, ours, truth = float32_logits
    assert (ours - truth).abs().max() <= 1e-4


def test_bfloat16_logits_follow_the_tolerance_rule(smollm2, prompts):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    theirs = their_logits(model, prompts)
    truth = their_logits(model.double(), prompts)  # the same rounded weights
    ours = our_logits(smollm2, "bfloat16", prompts)
    assert_close(ours, theirs, truth, "SmolLM2-135M")
    error, others = ((x.double() - truth).pow(2).mean().sqrt() for x in (ours, theirs))
    assert error <= others
