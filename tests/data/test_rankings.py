"""Rankings in every form, and what is refused."""

import pytest

from engine.data.chat import Talk, TextEncoder
from engine.data.rankings import load_rankings, split_pair
from engine.data.rows import BadRow
from engine.errors import DataError

USER = {"role": "user", "content": "Why not?"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_form_of_a_ranking_is_the_same_group(write, chat_tokenizer) -> None:
    rows = [
        {"prompt": "Why not?", "responses": ["four", "five"], "ranks": [0, 1]},
        {"prompt": "Why not?", "responses": ["five", "four"], "ranks": [1, 0]},
        {"prompt": [USER], "responses": [[says("four")], [says("five")]], "ranks": [0, 1.0]},
        {"prompt": "Human: x", "messages": [USER], "chosen": "four", "rejected": "five"},
        {"prompt": "Why not?", "chosen": [says("four")], "rejected": [says("five")]},
        {"chosen": [USER, says("four")], "rejected": [USER, says("five")]},
        {
            "context": [USER],
            "completions": [
                {"rank": 0, "completion": [says("four")]},
                {"rank": 1, "completion": [says("five")]},
            ],
        },
        {
            "chosen": "\n\nHuman: Why not?\n\nAssistant: four",
            "rejected": "\n\nHuman: Why not?\n\nAssistant: five",
        },
    ]
    data = load_rankings([write(*rows)], chat_tokenizer)
    assert len(data) == len(rows)
    assert len(set(data.items)) == 1
    encoder = TextEncoder(chat_tokenizer)
    assert data[0].prompt == tuple(encoder.prompt(Talk(None, (USER,))))
    assert data[0].responses == (tuple(encoder.answer("four")), tuple(encoder.answer("five")))
    assert data[0].ranks == (0.0, 1.0) and data[0].key == data[0].prompt


def test_k_is_free_and_ties_stay(write, raw_tokenizer) -> None:
    rows = [
        {"prompt": "p", "responses": list("abcdefghijkl")[:k], "ranks": [i // 2 for i in range(k)]}
        for k in (2, 3, 9, 12)
    ]
    data = load_rankings([write(*rows)], raw_tokenizer)
    assert [len(group.responses) for group in data] == [2, 3, 9, 12]
    assert data[1].ranks == (0.0, 0.0, 1.0)
    assert all(r[-1] == raw_tokenizer.eos_token_id for g in data for r in g.responses)
    assert raw_tokenizer.decode(data[1].responses[2]) == "c<|endoftext|>"


def test_an_answer_that_was_cut_has_no_end(write, raw_tokenizer) -> None:
    """As engine.sample says it; PPO has the reward model score such answers at their last token."""
    row = {"prompt": "p", "responses": ["abc", "de", "f"], "ranks": [2, 0, 1]}
    row["finish_reasons"] = ["length", "stop", "length"]
    (group,) = load_rankings([write(row)], raw_tokenizer)
    assert [raw_tokenizer.decode(r) for r in group.responses] == ["de<|endoftext|>", "f", "abc"]
    for reasons in (["stop"], ["stop", "length", "eos"], "stop"):
        with pytest.raises(DataError, match=r":1: finish_reasons: got .*, want"):
            load_rankings([write({**row, "finish_reasons": reasons})], raw_tokenizer)


def test_the_best_answer_comes_first(write, raw_tokenizer) -> None:
    row = {"prompt": "p", "responses": list("abcde"), "ranks": [3, 1, 2.5, 1, -4]}
    group = load_rankings([write(row)], raw_tokenizer)[0]
    texts = [raw_tokenizer.decode(response[:-1]) for response in group.responses]
    assert (texts, group.ranks) == (list("ebdca"), (-4.0, 1.0, 1.0, 2.5, 3.0))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p"}, "no column 'responses' or 'completions' or 'chosen'"),
        ({"prompt": "p", "responses": ["a", "b"]}, "no column 'ranks'"),
        ({"prompt": "p", "chosen": "a"}, "no column 'rejected'"),
        ({"responses": ["a", "b"], "ranks": [0, 1]}, "no column 'prompt'"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "1 ranks for 2 answers"),
        ({"prompt": "p", "responses": ["a"], "ranks": [0]}, "K = 1 answer(s)"),
        ({"prompt": "p", "responses": ["a", ""], "ranks": [0, 1]}, "answer 1: the answer is empty"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, float("nan")]}, "ranks[1]: got nan"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, float("inf")]}, "ranks[1]: got inf"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 10**400]}, "ranks[1]: got 1000"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, "1"]}, "want a number"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, True]}, "want a number"),
        ({"prompt": "p", "responses": ["a", 5], "ranks": [0, 1]}, "answer 1: got int"),
        ({"prompt": "p", "responses": "ab", "ranks": [0, 1]}, "responses: got str, want a list"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": 3}, "ranks: got int, want a list"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "chosen: the answer is empty"),
        ({"context": "p", "completions": ["a", "b"]}, "completions[0]"),
        ({"context": "p", "completions": [{"rank": 0}]}, "want {'rank', 'completion'}"),
        ({"chosen": "same text", "rejected": "same text"}, "are equal"),
        ({"prompt": "p", "chosen": "same text", "rejected": "same text"}, "are equal"),
        ({"chosen": "one", "rejected": "two"}, "share no first word"),
        ({"chosen": [USER, says("a")], "rejected": [says("b")]}, "share no first message"),
    ],
)
def test_bad_rankings(write, raw_tokenizer, row, reason) -> None:
    path = write({"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(DataError) as caught:
        load_rankings([path], raw_tokenizer)
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)
    data = load_rankings([path], raw_tokenizer, bad_rows="skip")
    assert len(data) == 1 and data.report.skipped == {caught.value.kind: 1}


def test_a_group_is_too_long_by_its_longest_answer(write, raw_tokenizer) -> None:
    path = write({"prompt": "xx", "responses": ["q", "qqq"], "ranks": [0, 1]})
    assert len(load_rankings([path], raw_tokenizer, 6)) == 1
    with pytest.raises(DataError, match="longest answer has 6 tokens, more than the 5"):
        load_rankings([path], raw_tokenizer, 5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("What is it? A cat", "What is it? A dog", "What is it? A"),
        ("What is it? category", "What is it? cat", "What is it?"),
        ("say hello there", "say hello", "say"),
        ("one two\nthree", "one two four", "one two"),
        ("one  two", "one  three", "one"),
    ],
)
def test_texts_part_between_words(chosen: str, rejected: str, prompt: str) -> None:
    talk, (first, second) = split_pair(chosen, rejected)
    assert talk == Talk(prompt)
    assert prompt + first == chosen and prompt + second == rejected


def test_transcripts_part_after_the_last_shared_turn() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?\n\nAssistant:"
    talk, answers = split_pair(start + " I am a cat", start + " I am a dog")
    assert talk.text == start and answers == (" I am a cat", " I am a dog")
    assert talk.messages is not None
    assert [(m["role"], m["content"]) for m in talk.messages] == [
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "Who?"),
    ]


def test_without_a_template_a_transcript_keeps_its_text(write, raw_tokenizer) -> None:
    start = "\n\nHuman: Why not?\n\nAssistant:"
    path = write({"chosen": start + " four", "rejected": start + " five"})
    (group,) = load_rankings([path], raw_tokenizer)
    assert raw_tokenizer.decode(group.prompt) == start
    assert raw_tokenizer.decode(group.responses[1]) == " five<|endoftext|>"


def test_message_lists_that_part_after_an_answer_are_refused() -> None:
    shared = [USER, says("a")]
    with pytest.raises(BadRow, match="part after an assistant's turn"):
        split_pair([*shared, USER, says("b")], [*shared, says("c")])


def test_whole_talks_beside_their_prompt(write, chat_tokenizer) -> None:
    """The layout of HuggingFaceH4's pairs; `messages` are the chosen talk."""
    system = {"role": "system", "content": "Be kind"}
    plain = {"prompt": [USER], "chosen": "four", "rejected": "five"}
    chosen, rejected = [USER, says("four")], [USER, says("five")]
    pair = {"chosen": chosen, "rejected": rejected, "score_chosen": 8.0}
    rows = [plain, {**pair, "prompt": "Why not?", "messages": chosen}, {**pair, "prompt": [USER]}, pair]
    data = load_rankings([write(*rows)], chat_tokenizer)
    assert len(set(data.items)) == 1 and len(data) == 4
    spaced = {"chosen": [USER, says(" four")], "rejected": [USER, says("five ")]}
    data = load_rankings([write(pair, spaced, {**spaced, "prompt": "Why not?"})], chat_tokenizer)
    assert len(set(data.items)) == 1 and len(data) == 3
    longer = {"prompt": "Why not?", "chosen": [system, *chosen], "rejected": [system, *rejected]}
    (group,) = load_rankings([write(longer)], chat_tokenizer)
    assert group.prompt == tuple(TextEncoder(chat_tokenizer).prompt(Talk(None, (system, USER))))


@pytest.mark.parametrize("prompt", ["Why so?", [USER, says("a"), USER]])
def test_whole_talks_of_another_prompt_are_refused(write, chat_tokenizer, prompt) -> None:
    row = {"prompt": prompt, "chosen": [USER, says("four")], "rejected": [USER, says("five")]}
    with pytest.raises(DataError, match="prompt: is not among the 1 turns that chosen and rejected begin with"):
        load_rankings([write(row)], chat_tokenizer)


def test_a_talk_is_the_same_to_a_model_without_a_template(write, raw_tokenizer) -> None:
    """In messages and as the transcript of hh-rlhf, but for the white space that this one begins with."""
    talk = [USER, says("four"), USER]
    text = "Human: Why not?\n\nAssistant: four\n\nHuman: Why not?\n\nAssistant:"
    rows = [
        {"chosen": f"{text} yes", "rejected": f"{text} no"},
        {"chosen": [*talk, says("yes")], "rejected": [*talk, says("no")]},
        {"prompt": talk, "chosen": [says("yes")], "rejected": " no"},
        {"messages": talk, "responses": ["no", " yes"], "ranks": [1, 0]},
    ]
    data = load_rankings([write(*rows)], raw_tokenizer)
    assert len(set(data.items)) == 1 and len(data) == 4


def test_equal_talks_are_said_to_be_equal(write, chat_tokenizer) -> None:
    talk = [USER, says("four")]
    with pytest.raises(DataError, match="rows.jsonl:1: chosen and rejected are equal"):
        load_rankings([write({"prompt": "Why not?", "chosen": talk, "rejected": talk})], chat_tokenizer)
