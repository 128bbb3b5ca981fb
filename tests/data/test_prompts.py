"""Prompts, and the columns that reward functions get."""

import pytest

from engine.data.prompts import load_prompts, reward_columns
from engine.errors import DataError

USER = {"role": "user", "content": "Why not?"}


def test_prompts_keep_text_talk_and_other_columns(write, chat_tokenizer) -> None:
    talk = [{"role": "system", "content": "Be kind"}, USER]
    rows = [
        {"prompt": "Why not?", "answer": 4, "source": "mine"},
        {"prompt": [USER], "answer": None},
        {"messages": talk},
        {"prompt": "as text", "messages": talk},
    ]
    data = load_prompts([write(*rows)], chat_tokenizer)
    assert len({prompt.tokens for prompt in data}) == 1  # the template adds the same system turn
    assert data[0].columns == {"answer": 4, "source": "mine"} and data[0].source == "mine"
    assert (data[0].text, data[0].messages) == ("Why not?", None)
    assert (data[1].text, data[1].messages) == ("Why not?", (USER,))
    assert data[2].text == "Be kind\n\nHuman: Why not?" and data[2].columns == {}
    assert data[3].text == "as text" and data[3].messages == tuple(talk)
    assert chat_tokenizer.decode(data[0].tokens).endswith("<|im_start|>assistant\n")


def test_reward_functions_get_talks_as_a_column(write, chat_tokenizer) -> None:
    talk = [{"role": "system", "content": "Be kind"}, USER]
    rows = [{"prompt": "x", "answer": 4}, {"messages": talk}, {"prompt": [USER]}, {"prompt": "x", "messages": talk}]
    columns = reward_columns(load_prompts([write(*rows)], chat_tokenizer))
    assert columns == {"answer": [4, None, None, None], "messages": [None, talk, [USER], talk]}
    assert reward_columns(load_prompts([write(rows[0])], chat_tokenizer)) == {"answer": [4]}


def test_long_prompts_are_filtered_and_counted_never_cut(write, raw_tokenizer) -> None:
    path = write({"prompt": "q" * 5}, {"prompt": "q" * 6}, {"prompt": "q"})
    data = load_prompts([path], raw_tokenizer, max_length=5)
    assert [len(prompt.tokens) for prompt in data] == [5, 1]
    assert data.report.skipped == {"too long": 1} and data.report.examples == ()
    with pytest.raises(DataError, match="no usable row"):
        load_prompts([path], raw_tokenizer, max_length=0)
