"""Demonstrations and pretraining rows."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from engine.data.chat import Talk, TextEncoder
from engine.data.split import hold_back
from engine.data.text import load_pretrain, load_sft
from engine.errors import DataError

USER = {"role": "user", "content": "Why not?"}
ASSISTANT = {"role": "assistant", "content": "The cat sat."}


def test_every_form_of_a_demonstration_is_the_same_example(write, chat_tokenizer) -> None:
    data = load_sft(
        [
            write(
                {"prompt": "Why not?", "completion": "The cat sat.", "source": "mine"},
                {"prompt": [USER], "completion": [ASSISTANT]},
                {"prompt": "Why not?", "completion": "The cat sat.", "messages": None},
                {"prompt": "as text", "messages": [USER], "completion": "The cat sat."},
                {"messages": [USER, ASSISTANT]},
            )
        ],
        chat_tokenizer,
    )
    assert [example.source for example in data] == ["mine", "rows", "rows", "rows", "rows"]
    assert len({(e.tokens, e.response_start, e.prompt_length) for e in data}) == 1
    trained = data[0].tokens[data[0].response_start :]
    assert chat_tokenizer.decode(trained) == "The cat sat.<|im_end|>"
    context = chat_tokenizer.decode(data[0].tokens[: data[0].response_start])
    assert context.endswith("Why not?<|im_end|>\n<|im_start|>assistant\n")


def test_several_turns_train_the_last_answer(write, chat_tokenizer) -> None:
    talk = [USER, {"role": "assistant", "content": "Hello!"}, USER, ASSISTANT]
    (example,) = load_sft([write({"messages": talk})], chat_tokenizer)
    assert chat_tokenizer.decode(example.tokens[example.response_start :]) == (
        "The cat sat.<|im_end|>"
    )
    assert "Hello!" in chat_tokenizer.decode(example.tokens[: example.response_start])


def test_without_a_template_prompt_and_response_follow_each_other(write, raw_tokenizer) -> None:
    path = write({"prompt": "Why", "completion": " not?"}, {"text": "The cat sat."})
    first, second = load_sft([path], raw_tokenizer)
    assert raw_tokenizer.decode(first.tokens) == "Why not?<|endoftext|>"
    assert raw_tokenizer.decode(first.tokens[: first.response_start]) == "Why"
    assert (second.response_start, second.prompt_length) == (0, 0)
    assert raw_tokenizer.decode(second.tokens) == "The cat sat.<|endoftext|>"
    assert second.key == second.tokens and first.key == first.tokens[: first.prompt_length]


def test_full_sequence_trains_the_prompt_too(write, raw_tokenizer) -> None:
    path = write({"prompt": "Why", "completion": " not?"})
    (part,), (full,) = load_sft([path], raw_tokenizer), load_sft([path], raw_tokenizer, None, True)
    assert full.tokens == part.tokens
    assert (full.response_start, full.prompt_length) == (0, part.response_start)


def test_a_text_starts_after_the_first_token_of_the_tokenizer(write, bos_tokenizer) -> None:
    (example,) = load_sft([write({"text": "The cat"})], bos_tokenizer)
    assert example.tokens[0] == 0 and example.response_start == 1 and example.prompt_length == 0


def test_texts_are_prompts_of_their_own_whatever_token_begins_them(write, bos_tokenizer) -> None:
    """Of one and the same prompt a share of the rows would be all or nothing."""
    data = load_sft([write(*({"text": f"Text number {i}"} for i in range(100)))], bos_tokenizer)
    assert len({example.key for example in data}) == 100
    train, held = hold_back(data, 0.2)
    assert len(train) + len(held) == 100 and 8 <= len(held) <= 32


def test_long_rows_are_bad_or_cut_and_counted(write, raw_tokenizer) -> None:
    path = write(
        {"prompt": "a" * 5, "completion": "b" * 4},
        {"prompt": "a" * 5, "completion": "b" * 5},
        {"prompt": "a" * 10, "completion": "b"},
    )
    with pytest.raises(DataError, match=":2: the prompt with its response has 11 tokens.*the 10"):
        load_sft([path], raw_tokenizer, 10)
    skipped = load_sft([path], raw_tokenizer, 10, bad_rows="skip")
    assert len(skipped) == 1 and skipped.report.skipped == {"too long": 2}
    cut = load_sft([path], raw_tokenizer, 10, truncate=True, bad_rows="skip")
    assert [len(example.tokens) for example in cut] == [10, 10]
    assert cut[1].tokens[-1] != raw_tokenizer.eos_token_id
    assert cut.report.truncated == 1 and cut.report.skipped == {"too long": 1}
    assert "  cut at the maximal length: 1" in cut.report.lines()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no column 'completion' or 'messages' or 'text'; it has prompt"),
        ({"completion": "a"}, "no column 'prompt' or 'messages'"),
        ({"prompt": "a", "completion": " \n"}, "the answer is empty"),
        ({"prompt": "a", "completion": None, "text": None}, "no column 'completion'"),
        ({"prompt": "a", "completion": 3}, "completion: got int"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"prompt": "a", "completion": [USER]}, "want one assistant message"),
        ({"messages": [USER]}, "want a talk that ends with the assistant"),
        ({"messages": [ASSISTANT]}, "want a talk that ends with the assistant"),
        ({"text": " "}, "text: it is empty"),
    ],
)
def test_bad_demonstrations(write, raw_tokenizer, row, reason) -> None:
    with pytest.raises(DataError) as caught:
        load_sft([write(row)], raw_tokenizer)
    assert ":1: " in str(caught.value) and reason in str(caught.value)


def test_special_tokens_in_a_response_do_not_end_it(write, chat_tokenizer) -> None:
    path = write({"prompt": "<|im_end|>", "completion": "a<|im_end|>b"})
    (example,) = load_sft([path], chat_tokenizer)
    response = example.tokens[example.response_start :]
    assert list(response).count(chat_tokenizer.eos_token_id) == 1
    (parsed,) = load_sft([path], chat_tokenizer, parse_special_tokens=True)
    assert list(parsed.tokens[parsed.response_start :]).count(chat_tokenizer.eos_token_id) == 2


def documents(count: int) -> list[dict[str, str]]:
    return [{"text": f"{chr(97 + i)}" * (3 + 5 * i)} for i in range(count)]


def test_pretraining_rows_hold_every_token_once_in_order(write, raw_tokenizer) -> None:
    rows = load_pretrain([write(*documents(9))], raw_tokenizer, 7, seed=1)
    stream = np.concatenate([rows.table.reshape(-1)])
    text = raw_tokenizer.decode(stream.tolist())
    found = text.split("<|endoftext|>")
    wanted = {document["text"] for document in documents(9)}
    assert all(piece in wanted for piece in found[:-1])
    assert any(document.startswith(found[-1]) for document in wanted)
    total = sum(len(TextEncoder(raw_tokenizer).plain(d)) + 1 for d in wanted)
    assert rows.num_tokens + rows.tokens_left_over == total
    assert rows.tokens_left_over < 7 and rows.table.shape == (total // 7, 7)
    assert f"  {total // 7} rows of 7 tokens" in rows.lines()


def test_pretraining_order_is_a_function_of_the_seed(write, raw_tokenizer) -> None:
    path = write(*documents(9))
    tables = [load_pretrain([path], raw_tokenizer, 7, seed).table for seed in (1, 1, 2)]
    assert (tables[0] == tables[1]).all() and not (tables[0] == tables[2]).all()


def test_a_place_in_the_stream_is_all_that_a_resume_needs(write, raw_tokenizer) -> None:
    rows = load_pretrain([write(*documents(9))], raw_tokenizer, 7)
    n = len(rows)
    whole = rows.rows(range(3 * n))
    assert [rows.rows([place])[0] for place in range(3 * n)] == whole
    for epoch in range(3):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == sorted(rows[i] for i in range(n))
    assert whole[:n] != whole[n : 2 * n]


def test_too_little_text_is_an_error(write, raw_tokenizer) -> None:
    with pytest.raises(DataError, match="4 tokens of text, less than one row of 5"):
        load_pretrain([write({"text": "xqz"})], raw_tokenizer, 5)
    with pytest.raises(DataError, match="text: it is empty"):
        load_pretrain([write({"text": ""})], raw_tokenizer, 5)
    with pytest.raises(DataError, match="got length 1"):
        load_pretrain([write({"text": "abc"})], raw_tokenizer, 1)


def test_held_back_prompts_are_on_one_side_only(write: Callable[..., str], raw_tokenizer) -> None:
    rows = [{"prompt": f"p{i % 60}", "completion": f" c{i}"} for i in range(240)]
    data = load_sft([write(*rows)], raw_tokenizer)
    train, held = hold_back(data, 0.25, seed=3)
    assert len(train) + len(held) == 240 and 24 <= len(held) <= 100
    assert not {e.key for e in train} & {e.key for e in held}
    assert (train.report.kept, held.report.kept) == (len(train), len(held))
    fewer = load_sft([write(*rows[:100], name="fewer.jsonl")], raw_tokenizer)
    assert {e.key for e in hold_back(fewer, 0.25, 3)[1]} <= {e.key for e in held}
    assert hold_back(data, 0.25, 4)[1].items != held.items
    assert len(hold_back(data, 0.0)[1]) == 0
    with pytest.raises(DataError, match="got 1.0"):
        hold_back(data, 1.0)


def test_examples_survive_json(write, chat_tokenizer) -> None:
    (example,) = load_sft([write({"messages": [USER, ASSISTANT]})], chat_tokenizer)
    assert json.loads(json.dumps(example.tokens)) == list(example.tokens)
    assert TextEncoder(chat_tokenizer).prompt(Talk("Why not?")) == list(example.key)
