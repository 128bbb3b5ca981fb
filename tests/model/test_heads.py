"""Scalar models: the same score in transformers up to the constant, both ways, each family."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save, some_sequences
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.data.pack import last_rows, pack_sequences
from engine.errors import ModelError
from engine.model.heads import choose_pad_token, scores
from engine.model.transformer import clone, forward, logits
from engine.model.weights import load_scalar, save_policy, save_scalar, scalar_from_policy
from tests.compare import assert_close
from tests.small_engines import byte_tokenizer

EOS, PAD = 5, 96


def our_scores(model, sequences):
    batch = pack_sequences(sequences)
    with torch.no_grad():
        return scores(model, forward(model, batch)[last_rows(batch)])


def their_scores(theirs, sequences):
    """Padded on the right, found by the pad token, as transformers does it."""
    theirs.eval()
    width = max(map(len, sequences))
    pad = theirs.config.pad_token_id
    tokens = torch.tensor([s + [pad] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    with torch.no_grad():
        return theirs(tokens, attention_mask=mask).logits[:, 0]


def answers():
    """Ragged, one token among them, and some ending with the end-of-sequence token."""
    sequences = [[t % PAD for t in s] for s in some_sequences(9, 1, 30, 4)]
    return [[*s[:-1], EOS] if i % 2 else s for i, s in enumerate(sequences)]


@dataclass(frozen=True)
class Case:
    """A folder, and what transformers makes of it: computed once, compared on every class."""

    folder: Path
    sequences: list[list[int]]
    float32: Tensor  # (S,) scores
    bfloat16: Tensor  # (S,) of weights and arithmetic in bfloat16
    truth: Tensor  # (S,) of the rounded trunk and the exact head in float64


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("scalars")

    @functools.cache
    def make(family: str) -> Case:
        folder, sequences = root / family, answers() + answers() + answers()
        exact = save(family, folder, scalar=True, pad_token_id=PAD)
        plain = their_scores(exact, sequences)
        rounded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
        head = exact.score.weight.detach().double()  # ours stays float32
        exact.load_state_dict(rounded.state_dict())
        exact.double().score.weight.data.copy_(head)
        truth = their_scores(exact, sequences)
        return Case(folder, sequences, plain, their_scores(rounded, sequences), truth)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scalar_model_of_transformers_scores_the_same_here(cases, family, cpu_class):
    case = cases(family)
    ours = our_scores(load_scalar(case.folder, "float32"), case.sequences)
    torch.testing.assert_close(ours, case.float32, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_scores_follow_the_tolerance_rule(cases, family, cpu_class):
    case = cases(family)
    ours = our_scores(load_scalar(case.folder, "bfloat16"), case.sequences)
    assert_close(ours, case.bfloat16, case.truth, family)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_scalar_model_scores_the_same_in_transformers(family, trainable, tmp_path):
    save(family, tmp_path / "policy", pad_token_id=PAD)
    model = scalar_from_policy(tmp_path / "policy", 3, "float32", trainable).with_constant(-1.25)
    save_scalar(model, tmp_path / "scalar")
    theirs, notes = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "scalar", output_loading_info=True
    )
    assert not any(notes.values()), notes
    assert theirs.config.num_labels == 1
    assert theirs.config.architectures == [type(theirs).__name__]
    sequences = answers()
    constant = theirs.config.engine_score_constant
    assert constant == -1.25
    ours = our_scores(model, sequences)
    torch.testing.assert_close(
        ours, their_scores(theirs, sequences) + constant, atol=1e-5, rtol=1e-5
    )
    again = load_scalar(tmp_path / "scalar", "float32")
    assert again.constant == -1.25
    assert torch.equal(our_scores(again, sequences), ours)


def test_the_head_stays_float32_in_memory_and_in_the_file(tmp_path):
    save("llama", tmp_path / "policy", pad_token_id=PAD)
    model = scalar_from_policy(tmp_path / "policy", 3, "bfloat16")
    save_scalar(model, tmp_path / "scalar")
    tensors = load_file(tmp_path / "scalar" / "model.safetensors")
    assert tensors.pop("score.weight").dtype == torch.float32
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    sequences = answers()
    assert torch.equal(
        our_scores(load_scalar(tmp_path / "scalar", "bfloat16"), sequences),
        our_scores(model, sequences),
    )


def test_a_new_head_is_drawn_by_its_seed_with_the_papers_deviation(tmp_path):
    save("gpt2", tmp_path, n_embd=1000, n_layer=1)
    heads = [
        scalar_from_policy(tmp_path, seed, "float32").parameters()["score.weight"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 1000)
    assert abs(float(heads[0].detach().std()) * 1001**0.5 - 1) < 0.1


def test_a_score_is_differentiable_and_does_not_see_its_batch(tmp_path, cpu_class):
    save("qwen3", tmp_path, scalar=True)
    model = load_scalar(tmp_path, "bfloat16", trainable=True).with_constant(0.5)
    hidden = torch.randn(33, 48).to(model.act_dtype).requires_grad_()
    together = scores(model, hidden)
    assert together.shape == (33,) and together.dtype == torch.float32
    for row in (0, 7, 32):
        torch.testing.assert_close(scores(model, hidden[row : row + 1])[0], together[row])
    factors = torch.randn(33)
    (factors * together).sum().backward()
    weight = model.parameters()["score.weight"]
    want = factors @ hidden.detach().float()
    torch.testing.assert_close(weight.grad[0], want, atol=1e-4, rtol=1e-4)
    outer = (factors[:, None] * weight.detach()).to(hidden.dtype)
    torch.testing.assert_close(hidden.grad, outer, atol=1e-4, rtol=1e-2)
    assert scores(model, hidden[:0]).shape == (0,)


def test_a_value_model_is_a_trained_copy_of_the_reward_model(tmp_path):
    save("llama", tmp_path, scalar=True)
    reward = load_scalar(tmp_path, "float32").with_constant(2.0)
    value = clone(reward, trainable=True)
    assert value.constant == 2.0 and "score.weight" in value.parameters()
    sequences = answers()
    assert torch.equal(our_scores(value, sequences), our_scores(reward, sequences))


def test_a_scalar_model_predicts_no_tokens(tmp_path):
    save("llama", tmp_path, scalar=True)
    model = load_scalar(tmp_path, "float32")
    with pytest.raises(ModelError, match="no vocabulary to predict"):
        logits(model, torch.zeros(1, 48))
    with pytest.raises(ModelError, match="use save_scalar"):
        save_policy(model, tmp_path / "out")


def test_a_constant_that_is_no_number_is_refused(tmp_path):
    save("llama", tmp_path, scalar=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "engine_score_constant": "-1.0"}))
    with pytest.raises(ModelError, match="engine_score_constant: got '-1.0', want a number"):
        load_scalar(tmp_path, "float32")


class TestPadToken:
    """transformers reads the score before the first pad token, so it must not be the end's."""

    def test_first_of_those_that_end_nothing(self):
        tokenizer = byte_tokenizer()  # <|end|> 0 (end of sequence), <|user|> 1, <|model|> 2
        config = {"vocab_size": 300, "pad_token_id": None}
        assert choose_pad_token(config, tokenizer, {0}) == 1  # the start of a turn
        tokenizer.bos_token = "<|model|>"
        assert choose_pad_token(config, tokenizer, {0}) == 2
        tokenizer.unk_token = "<|user|>"
        assert choose_pad_token(config, tokenizer, {0}) == 1
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|padding|>"]})
        assert choose_pad_token(config, tokenizer, {0}) == 259
        assert choose_pad_token({**config, "pad_token_id": 7}, tokenizer, {0}) == 7
        tokenizer.pad_token = "<|model|>"
        assert choose_pad_token({**config, "pad_token_id": 7}, tokenizer, {0}) == 2
        tokenizer.pad_token = "<|end|>"
        assert choose_pad_token({**config, "pad_token_id": 0}, tokenizer, {0}) == 259
        assert choose_pad_token({"vocab_size": 259}, tokenizer, {0}) == 1  # a row it must have

    def test_none_without_a_tokenizer_to_ask(self):
        assert choose_pad_token({"vocab_size": 9, "pad_token_id": 5}, None, {5}) is None
        assert choose_pad_token({"vocab_size": 9, "pad_token_id": 5}, None, {6}) == 5

    def test_config_and_saved_tokenizer_agree_on_it(self, tmp_path):
        save("llama", tmp_path / "policy", vocab_size=300, eos_token_id=0)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        model = scalar_from_policy(tmp_path / "policy", 3, "float32")
        save_scalar(model, tmp_path / "scalar", tokenizer)
        assert tokenizer.pad_token_id == 0  # the caller's is left alone
        saved = AutoTokenizer.from_pretrained(tmp_path / "scalar")
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scalar")
        assert saved.pad_token_id == theirs.config.pad_token_id == 1
        texts = ["short", "rather longer than that<|end|>", "<|end|>"]
        padded = saved(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            want = theirs(padded.input_ids, attention_mask=padded.attention_mask).logits[:, 0]
        ours = our_scores(model, [tokenizer(text).input_ids for text in texts])
        torch.testing.assert_close(ours, want, atol=1e-4, rtol=0)

    def test_every_end_of_the_generation_config_is_an_end(self, tmp_path):
        save("llama", tmp_path / "policy", vocab_size=300, eos_token_id=0)
        file = tmp_path / "policy" / "generation_config.json"
        file.write_text('{"eos_token_id": [0, 1]}')
        model = scalar_from_policy(tmp_path / "policy", 3, "float32")
        for folder in (tmp_path / "first", tmp_path / "second"):
            save_scalar(model, folder, byte_tokenizer())
            assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 2
            model = load_scalar(folder, "float32")

    def test_a_model_with_nothing_to_pad_with_says_so(self, tmp_path):
        save("gpt2", tmp_path / "policy")
        model = scalar_from_policy(tmp_path / "policy", 3, "float32")
        with pytest.warns(UserWarning, match="will score one sequence at a time"):
            save_scalar(model, tmp_path / "scalar")
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scalar").eval()
        with torch.no_grad():
            want = theirs(torch.tensor([[3, 4, EOS]])).logits[0, 0]
        assert abs(our_scores(model, [[3, 4, EOS]])[0] - want) < 1e-4
