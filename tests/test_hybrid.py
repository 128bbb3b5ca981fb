"""HybridEngine: prompts of every kind in, completions out, on the weights that are trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_engines import CONTEXT, SPECIAL, save_tiny

from engine.data.pack import pack_sequences, predictions
from engine.errors import ConfigError, ModelError
from engine.generate.scheduler import Limits
from engine.hybrid import Completion, HybridEngine
from engine.kernels._backend import kernels_usable
from engine.model import transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("hybrid") / "llama")


@pytest.fixture(scope="module")
def engine(folder):
    return HybridEngine.from_pretrained(folder, dtype="float32")


def test_completions_come_in_order_with_their_text(engine):
    prompts = ["hello", "a"]
    out = engine.generate(prompts, max_new_tokens=9, n=3, seed=1)
    assert [type(c) for c in out] == [Completion] * 6
    assert [c.prompt_tokens for c in out] == [
        tuple(engine.encode(p)) for p in prompts for _ in "123"
    ]
    assert [c.episode_id for c in out] == [0, 1, 2, 3, 4, 5]
    for c in out:
        assert c.text == engine.tokenizer.decode(c.tokens, skip_special_tokens=True)
        assert len(c.tokens) == len(c.logprobs) == len(c.entropies) <= 9
        assert (c.finish_reason == "stop") == (c.tokens[-1] in engine.eos_ids)


def test_text_messages_and_token_ids_are_the_same_prompt(engine):
    messages = [{"role": "user", "content": "hi"}]
    ids = engine.tokenizer("<|user|>hi<|end|><|model|>")["input_ids"]
    assert engine.encode(messages) == engine.encode("hi") == engine.encode(ids) == ids
    assert engine.encode(torch.tensor(ids)) == ids
    kinds = [
        engine.generate([prompt], max_new_tokens=5)[0].tokens for prompt in (messages, "hi", ids)
    ]
    assert kinds[0] == kinds[1] == kinds[2]


def test_the_same_id_seed_and_prompt_give_the_same_tokens_in_any_call(engine):
    want = engine.generate(["x", "yy"], max_new_tokens=8, n=2, seed=5, episode_ids=[9, 4, 7, 2])
    assert (
        engine.generate(["yy"], max_new_tokens=8, seed=5, episode_ids=[7])[0].tokens
        == want[2].tokens
    )
    others = engine.generate(["x"], max_new_tokens=8, n=1, seed=6, episode_ids=[9])
    assert others[0].tokens != want[0].tokens


def test_a_stop_token_of_the_call_ends_a_sequence(engine):
    free = engine.generate(["q"], max_new_tokens=12)[0]
    stop = free.tokens[4]
    ended = engine.generate(["q"], max_new_tokens=12, stop_token_ids=[stop])[0]
    assert ended.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert ended.finish_reason == "stop"
    for given in (torch.tensor([stop]), [torch.tensor(stop)], np.array([stop]), {stop}, frozenset([stop]), (stop,)):
        assert engine.generate(["q"], max_new_tokens=12, stop_token_ids=given)[0].tokens == ended.tokens, given


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (5, "5"),
        ("28", "'28'"),
        (["<|end|>"], r"\['<|end|>'\]"),
        ({"<|end|>"}, r"\['<|end|>'\]"),
        (torch.tensor(5), r"tensor\(5\)"),
        (torch.tensor([[5]]), r"tensor\(\[\[5\]\]\)"),
        ([5.0], r"\[5.0\]"),
        ([10**9], "1000000000"),
        ([5, -1], "-1"),
        (None, "None"),
    ],
    ids=str,
)
def test_what_is_no_stop_token_is_named(engine, given, got):
    got = got.replace("|", r"\|")
    last = engine.model.architecture.vocab_size - 1
    want = rf"want a flat list of token ids of the vocabulary, 0 to {last}; give \[id\] for one"
    with pytest.raises(ConfigError, match=f"^stop_token_ids: got {got}, {want}"):
        engine.generate(["q"], stop_token_ids=given)


def test_the_end_of_sequence_token_comes_from_the_tokenizer_and_the_generation_config(engine):
    own = engine.tokenizer.convert_tokens_to_ids(SPECIAL[0])
    assert engine.eos_ids == {own}
    model = replace(engine.model, generation_config={"eos_token_id": [5, 6]})
    assert HybridEngine(model, engine.tokenizer).eos_ids == {own, 5, 6}


def test_logprobs_are_those_of_the_sampler(engine):
    out = engine.generate(["abc", "z"], max_new_tokens=10, temperature=0.7, n=2)
    scores = engine.logprobs([c.prompt_tokens + c.tokens for c in out], temperature=0.7)
    for c, score in zip(out, scores, strict=True):
        tail = score[len(c.prompt_tokens) - 1 :]
        if kernels_usable():
            assert torch.equal(tail, c.logprobs)
        else:
            torch.testing.assert_close(tail, c.logprobs, rtol=0, atol=1e-4)


def test_logprobs_are_float32_one_shorter_than_the_sequence_and_independent_of_the_cut(
    engine, folder
):
    sequences = [[5], [7, 8], list(range(3, 40)), [9, 9, 9]]
    whole = engine.logprobs(sequences)
    assert [len(s) for s in whole] == [0, 1, 36, 2] and all(s.dtype == torch.float32 for s in whole)
    cut = HybridEngine(engine.model, engine.tokenizer, score_tokens=1).logprobs(sequences)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if kernels_usable() else 1e-4)
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = hf(torch.tensor([sequences[2]])).logits[0, :-1]
    want = logits.log_softmax(-1).gather(-1, torch.tensor(sequences[2][1:])[:, None]).squeeze(-1)
    torch.testing.assert_close(whole[2], want, rtol=0, atol=1e-4)
    assert engine.logprobs([]) == []


def test_after_an_optimizer_step_and_refresh_generation_uses_the_new_weights(folder):
    engine = HybridEngine.from_pretrained(folder, dtype="float32", trainable=True)
    prompt = [50, 60]
    before = engine.generate([prompt], max_new_tokens=6)[0]
    assert before.weights_version == engine.version == 0
    target, steps = [11, 12, 13], 30
    for _ in range(steps):
        batch = pack_sequences([prompt + target])
        shift = predictions(batch, skip_first=[2])
        hidden = transformer.forward(engine.model, batch)[shift.rows]
        logprob, _ = transformer.logprobs(engine.model, hidden, shift.targets)
        (-logprob.sum()).backward()
        with torch.no_grad():
            for parameter in engine.model.parameters().values():
                parameter -= 0.02 * parameter.grad.sign()
                parameter.grad = None
        with pytest.raises(ModelError, match="refresh"):
            engine.generate([prompt], max_new_tokens=6)
        engine.refresh()
    after = engine.generate([prompt], max_new_tokens=3)[0]
    assert after.weights_version == engine.version == steps
    assert list(after.tokens) == target, (
        f"{steps} steps towards these tokens, and others were sampled"
    )
    scores = engine.logprobs([after.prompt_tokens + after.tokens])[0]
    torch.testing.assert_close(
        scores[1:], after.logprobs, rtol=0, atol=0 if kernels_usable() else 1e-4
    )


def test_a_saved_engine_loads_again_and_generates_the_same(engine, tmp_path):
    engine.save_pretrained(tmp_path / "saved")
    again = HybridEngine.from_pretrained(tmp_path / "saved", dtype="float32", limits=Limits(2))
    assert again.limits.max_active == 2
    prompts = ["one", "two", "three"]
    want = engine.generate(prompts, max_new_tokens=8, n=2)
    assert [c.text for c in again.generate(prompts, max_new_tokens=8, n=2)] == [
        c.text for c in want
    ]


def test_what_cannot_be_done_is_said(engine, tmp_path):
    with pytest.raises(ConfigError, match="got one string"):
        engine.generate("hello")
    with pytest.raises(ConfigError, match="temperature: got 0.0"):
        engine.generate(["hello"], temperature=0.0)
    with pytest.raises(ConfigError, match=f"sequence 1: got 0 tokens; give 1 to {CONTEXT}"):
        engine.logprobs([[1], []])
    with pytest.raises(ConfigError, match=f"sequence 0: got {CONTEXT + 1} tokens"):
        engine.logprobs([[1] * (CONTEXT + 1)])


def test_without_a_chat_template_text_is_taken_as_it_is(folder):
    engine = HybridEngine.from_pretrained(folder, dtype="float32")
    engine.tokenizer.chat_template = None
    assert engine.encode("hi") == engine.tokenizer("hi")["input_ids"]
    assert engine.encode([{"role": "user", "content": "hi"}]) == engine.encode("hi")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([{"role": "user"}], "content"),
        ([{"role": "boss", "content": "x"}], "want {'role': one of"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "ends with"),
    ],
)
def test_a_broken_prompt_is_an_error(engine, prompt, message):
    with pytest.raises(ConfigError, match=message):
        engine.encode(prompt)


def test_a_special_token_spelled_in_a_prompt_is_text(engine):
    ids = engine.encode("a<|end|>b")
    assert ids.count(engine.tokenizer.eos_token_id) == 1, "only the template's own ends the turn"


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([]) == [] and engine.logprobs([]) == []


def test_arrays_of_token_ids_are_prompts(engine):
    ids = [[5, 6, 7], [8, 9, 10]]
    want = [c.tokens for c in engine.generate(ids, max_new_tokens=4)]
    for given in (np.array(ids), torch.tensor(ids), [np.array(row) for row in ids]):
        assert [c.tokens for c in engine.generate(given, max_new_tokens=4)] == want
    for own, other in zip(engine.logprobs(torch.tensor(ids)), engine.logprobs(ids), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2, 3], "got 1, want for a prompt text, a list of messages, or a flat list of token ids"),
        ([{"role": "user", "content": "x"}], r"got {'role': .*, want for a prompt text, .*\[prompt\] for one"),
        ([[1.5]], r"got \[1.5\], want"),
        ([["a"]], r"got \['a'\], want"),
        ([[True]], r"got \[True\], want"),
        ([[[1]]], r"got \[\[1\]\], want"),
        ([None], "got None, want"),
        (5, "prompts: got int; give a list of prompts"),
        ({"prompt": "a"}, "prompts: got dict; give a list of prompts"),
    ],
)
def test_what_is_no_prompt_is_named(engine, prompts, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate(prompts)


@pytest.mark.parametrize("sequences", [["hi"], [1, 2], [[1.5]]])
def test_what_is_no_sequence_is_named(engine, sequences):
    with pytest.raises(ConfigError, match="want a flat list of token ids"):
        engine.logprobs(sequences)
