"""Packing, prefixes, positions, dropout and the checks at the door of the forward."""

import pytest
import torch
from families import CASES, hf_logits, save, some_sequences

from engine.data.pack import pack_groups, pack_sequences
from engine.errors import ModelError
from engine.kernels._backend import kernels_usable
from engine.model.dropout import Dropout
from engine.model.transformer import forward, hidden_states, logits, logprobs
from engine.model.weights import load_policy

# every kind of attention, of norm and of residual, for what is run on every class of CPU
KINDS = ("gpt2", "gpt_neox", "llama-one-key-head-linear", "qwen3-biased")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(2)
    root = tmp_path_factory.mktemp("packed")
    for case in CASES:
        save(case, root / case)
    return root


def equal(a, b) -> bool:
    """Bits with the C++ kernels (promise P2); with the torch definitions to float32 rounding."""
    return torch.equal(a, b) if kernels_usable() else torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", KINDS)
def test_a_token_does_not_see_the_batch_it_is_in(folders, case, dtype, cpu_class):
    model = load_policy(folders / case, dtype)
    sequences = some_sequences(13, 1, 0, 30, 2)
    with torch.no_grad():
        together = forward(model, pack_sequences(sequences)).split([len(s) for s in sequences])
        for sequence, hidden in zip(sequences, together, strict=True):
            assert equal(forward(model, pack_sequences([sequence])), hidden)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", KINDS)
def test_answers_that_share_a_prompt_are_whole_sequences(folders, case, dtype, cpu_class):
    model = load_policy(folders / case, dtype)
    prompts, answers = some_sequences(19, 1), [some_sequences(7, 0, 1, 20), some_sequences(4)]
    batch = pack_groups(list(zip(prompts, answers, strict=True)))
    with torch.no_grad():
        hidden = iter(forward(model, batch).split(batch.lengths.tolist()))
        for prompt, group in zip(prompts, answers, strict=True):
            assert equal(next(hidden), forward(model, pack_sequences([prompt])))
            for answer in group:
                whole = forward(model, pack_sequences([prompt + answer]))
                assert equal(next(hidden), whole[len(prompt) :])


def test_an_empty_batch_has_no_rows(folders):
    model = load_policy(folders / "qwen3", "float32")
    assert forward(model, pack_sequences([])).shape == (0, 48)
    assert forward(model, pack_sequences([[], []])).shape == (0, 48)


def test_logprobs_are_those_of_the_logits_at_the_temperature(folders):
    model = load_policy(folders / "gpt2", "float32")
    with torch.no_grad():
        hidden = forward(model, pack_sequences(some_sequences(9, 3)))
        targets = torch.randint(0, 97, (12,))
        logprob, entropy = logprobs(model, hidden, targets, temperature=0.6)
        law = (logits(model, hidden).double() / 0.6).log_softmax(-1)
    assert torch.allclose(logprob.double(), law.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy.double(), -(law.exp() * law).sum(-1), atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "llama-biased-tied-llama3", "gpt_neox-serial"])
def test_far_positions_rotate_as_in_transformers(case, tmp_path):
    """Angles are large there, and a table grows on the way."""
    theirs = save(case, tmp_path, max_position_embeddings=5000)
    model = load_policy(tmp_path, "float32")
    tokens = torch.tensor(some_sequences(6)[0])
    positions = torch.arange(4990, 4996)
    offsets = pack_sequences([tokens.tolist()])
    far = type(offsets)(tokens, positions, offsets.cu_seqlens)
    with torch.no_grad():
        want = theirs(tokens[None], position_ids=positions[None]).logits[0]
        assert (logits(model, forward(model, far)) - want).abs().max() <= 1e-4
    near = logits(model, forward(model, offsets))
    assert (near - hf_logits(theirs, [tokens.tolist()])).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "llama"])
def test_what_cannot_be_looked_up_is_named(folders, case):
    model = load_policy(folders / case, "float32")
    with pytest.raises(ModelError, match=r"token 97 in row 3: the vocabulary goes from 0 to 96"):
        forward(model, pack_sequences([[1, 2], [3, 97]]))
    with pytest.raises(ModelError, match=r"token -1 in row 0"):
        forward(model, pack_sequences([[-1]]))
    with pytest.raises(ModelError, match=r"position 64 in row 66: max_position_embeddings"):
        forward(model, pack_sequences([[1, 1], [1] * 65]))


def test_attention_is_the_callers(folders):
    """One call a layer, in order, with rotated heads of the right shapes."""
    model = load_policy(folders / "llama-one-key-head-linear", "float32")
    calls = []

    def attend(layer, q, k, v):
        calls.append((layer, q.shape, k.shape, v.shape))
        return q

    tokens = torch.tensor([3, 4, 5])
    hidden_states(model, tokens, torch.tensor([7, 8, 9]), attend)
    assert calls == [(i, (3, 4, 20), (3, 1, 20), (3, 1, 20)) for i in range(2)]


class TestDropout:
    x = torch.ones(50, 40)

    def test_keeps_the_mean_and_drops_its_share(self):
        dropped = Dropout(0.2, 1, 0, ((0, 500),))(torch.ones(500, 100), 0, 0)
        assert set(dropped.unique().tolist()) == {0.0, 1.25}
        assert abs(float((dropped == 0).float().mean()) - 0.2) < 0.01

    def test_a_mask_belongs_to_its_segment_wherever_it_lies(self):
        alone = Dropout(0.3, 1, 4, ((8, 20),))(self.x[:20], 3, 1)
        beside = Dropout(0.3, 1, 4, ((9, 30), (8, 20)))(self.x, 3, 1)
        assert torch.equal(beside[30:], alone)
        assert not torch.equal(beside[:20], alone)

    def test_every_part_of_the_address_counts(self):
        masks = [
            Dropout(0.3, seed, step, ((address, 50),))(self.x, layer, sublayer)
            for seed in (0, 1)
            for step in (0, 1)
            for address in (0, 1)
            for layer in (0, 1)
            for sublayer in (0, 1)
        ]
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 32

    def test_acts_on_both_sublayers_and_not_at_zero(self, folders):
        model = load_policy(folders / "gpt2", "float32")
        batch = pack_sequences(some_sequences(12))
        plain = forward(model, batch)
        assert torch.equal(forward(model, batch, Dropout(0.0, 1, 1, ((0, 12),))), plain)
        once, again, other = (
            forward(model, batch, Dropout(0.5, 1, s, ((0, 12),))) for s in (1, 1, 2)
        )
        assert torch.equal(once, again)
        assert not torch.allclose(once, plain) and not torch.allclose(once, other)

    @pytest.mark.parametrize("case", ["gpt_neox", "llama"])
    def test_every_sublayer_is_dropped_under_its_own_address(self, folders, case):
        """Dropping all of them leaves the embedding alone."""
        model, seen = load_policy(folders / case, "float32"), []

        def drop_all(x, layer, sublayer, rows):
            seen.append((layer, sublayer))
            return 0 * x

        tokens = some_sequences(5)
        left = forward(model, pack_sequences(tokens), drop_all)
        assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
        alone = [forward(model, pack_sequences([[token]]), drop_all)[0] for token in tokens[0]]
        assert torch.equal(left, torch.stack(alone))

    def test_the_gradient_passes_the_same_mask_with_the_same_factor(self):
        dropout, x = Dropout(0.25, 1, 4, ((8, 50),)), self.x.clone().requires_grad_()
        dropped = dropout(x, 3, 1)
        dropped.sum().backward()
        assert torch.equal(x.grad, dropout(torch.ones_like(x), 3, 1))
        assert sorted(x.grad.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])

    def test_refuses_a_share_of_one(self):
        with pytest.raises(ModelError, match="p = 1.0, want 0 <= p < 1"):
            Dropout(1.0, 0, 0, ())
