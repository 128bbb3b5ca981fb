"""The prompt pipeline: each step against a plain definition, and the command as a user runs it."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.__main__ import main
from engine.data.chat import Talk
from engine.data.prepare import (
    PrepareSettings,
    PromptRow,
    apply_pii,
    capped,
    distinct_prompts,
    expand_few_shot,
    owner_groups,
    prepare,
    read_prompts,
    write_prepared,
)
from engine.data.split import assign_split
from engine.data.statistics import PromptRecord, lengths_of, statistics
from engine.errors import DataError


def row(text: str, **columns) -> PromptRow:
    return PromptRow({"prompt": text, **columns}, Talk(text), "mine", "here:1")


def duplicates(first: str, second: str, min_prefix: int) -> bool:
    first, second = first.strip(), second.strip()
    shared = len(os.path.commonprefix([first, second]))
    return first == second or shared >= min_prefix


@given(st.lists(st.text(alphabet="ab ", max_size=7), max_size=25), st.integers(1, 5))
@settings(deadline=None, max_examples=200)
def test_a_prompt_stays_unless_one_kept_before_is_its_duplicate(texts, min_prefix) -> None:
    kept: list[int] = []
    for i, text in enumerate(texts):
        if not any(duplicates(text, texts[k], min_prefix) for k in kept):
            kept.append(i)
    assert distinct_prompts(texts, min_prefix) == kept


def test_the_papers_kind_of_duplicate() -> None:
    long = "x" * 127
    assert distinct_prompts([long + "ya", long + "yb", long + "z"]) == [0, 2]
    assert distinct_prompts(["Tell me a story", " Tell me a story\n", "Tell him"]) == [0, 2]


def test_a_short_prompt_takes_no_longer_one_with_it() -> None:
    texts = ["Write", "Write a poem about the sea.", "Write a poem", "", "Hi", " Write "]
    assert distinct_prompts(texts) == [0, 1, 2, 3, 4]
    assert distinct_prompts(["Write a poem about the sea.", "Write"]) == [0, 1]


def test_cap_keeps_the_first_of_each_owner() -> None:
    assert capped(["a", "b", "a", "a", "b", "c"], 2) == [0, 1, 2, 4, 5]
    assert len(capped(["a"] * 300)) == 200


def test_owners_join_users_and_organizations() -> None:
    rows = [
        row("1", user_id="ann", org_id="one"),
        row("2", user_id="bob", org_id="one"),
        row("3", user_id="bob", org_id="two"),
        row("4", org_id="two"),
        row("5", user_id="cat"),
        row("6", user_id=None, org_id=""),
        row("7"),
    ]
    groups = owner_groups(rows, PrepareSettings())
    assert groups[:4] == ["organization:one"] * 4
    assert groups[4:] == ["user:cat", "prompt:6", "prompt:7"]
    backwards = owner_groups(rows[::-1], PrepareSettings())
    assert backwards[::-1] == groups


def test_a_user_and_an_organization_of_one_name_are_two_owners() -> None:
    rows = [row("1", user_id="ann"), row("2", org_id="ann")]
    assert len(set(owner_groups(rows, PrepareSettings()))) == 2


def test_split_shares_are_met_and_depend_on_the_owner_alone() -> None:
    shares = {"train": 0.7, "validation": 0.2, "test": 0.1}
    found = Counter(assign_split(f"user:{i}", shares, 5) for i in range(4000))
    for name, share in shares.items():
        assert abs(found[name] / 4000 - share) < 0.03
    assert assign_split("user:1", shares, 5) == assign_split("user:1", shares, 5)
    assert {assign_split(f"{i}", {"train": 1.0, "test": 0.0}, 0) for i in range(99)} == {"train"}
    with pytest.raises(DataError, match="sum to 1"):
        assign_split("a", {"train": 0.5}, 0)


def test_personal_data_is_masked_or_dropped_in_prompt_and_messages() -> None:
    def mask(text: str) -> str | None:
        return None if "secret" in text else text.replace("Ann", "NAME")

    talk = [{"role": "system", "content": ""}, {"role": "user", "content": "I am Ann"}]
    rows = [row("Ann?", note="Ann"), row("a secret"), row("x", messages=talk)]
    cleaned = apply_pii(rows, mask)
    assert [r.columns["prompt"] for r in cleaned] == ["NAME?", "x"]
    assert cleaned[0].columns["note"] == "Ann" and cleaned[0].talk.plain == "NAME?"
    assert cleaned[1].talk.messages == (talk[0], {"role": "user", "content": "I am NAME"})
    assert [r.columns["prompt"] for r in apply_pii(rows, lambda text: text.strip("x"))] == ["Ann?", "a secret"]
    with pytest.raises(DataError, match="PII filter: returned int"):
        apply_pii(rows, lambda text: 3)  # type: ignore[arg-type, return-value]


def test_few_shot_pairs_become_rows_that_show_the_others() -> None:
    rows = expand_few_shot("Sort.", [("a", "A"), ("b", "B"), ("c", "C")])
    assert [r["completion"] for r in rows] == ["A", "B", "C"]
    assert rows[1]["prompt"] == "Sort.\n\na\nA\n\nc\nC\n\nb\n"
    for text in rows:
        assert text["completion"] not in text["prompt"]
    with pytest.raises(DataError, match="got 1 pairs"):
        expand_few_shot("x", [("a", "A")])
    with pytest.raises(DataError, match="empty"):
        expand_few_shot("x", [("a", "A"), ("b", " ")])


def test_statistics_by_hand() -> None:
    spread = lengths_of([1, 2, 3, 4])
    assert spread is not None
    assert (spread.mean, spread.median, spread.quartile_25, spread.quartile_75) == (
        2.5,
        2.5,
        1.75,
        3.25,
    )
    assert (spread.min, spread.max, spread.count) == (1, 4, 4)
    assert spread.std == pytest.approx(1.25**0.5) and lengths_of([]) is None
    records = [
        PromptRecord(3, "labeler", "chat", None),
        PromptRecord(5, "customer", "chat", "user:a"),
        PromptRecord(7, "customer", None, "user:a"),
        PromptRecord(9, "customer", "chat", "user:b"),
    ]
    report = statistics({"train": records[:2], "test": records[2:]})["splits"]
    assert report["all"]["by_source"] == {"customer": 3, "labeler": 1}
    assert report["all"]["customers"] == 2 and report["train"]["customers"] == 1
    assert report["all"]["prompts_per_customer"]["mean"] == 1.5
    assert report["all"]["use_cases"]["chat"]["share"] == 0.75
    assert report["all"]["use_cases"]["(none)"]["median"] == 7
    assert report["test"]["prompt_tokens"]["mean"] == 8


def many(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{i} is the number", "user_id": f"u{i % 40}", "org_id": f"o{i % 20}",
         "use_case": "chat" if i % 3 else "other", "extra": f"é{i}"}
        for i in range(1000, 1000 + count)
    ]  # fmt: skip


def test_no_owner_is_in_two_splits_and_no_row_is_lost(write, raw_tokenizer) -> None:
    rows = [*many(200), *many(10), {"prompt": "q" * 400, "user_id": "long"}]
    read = read_prompts([write(*rows)])
    chosen = PrepareSettings(validation=0.3, test=0.2, cap=8, max_tokens=60)
    done = prepare(read.items, chosen, raw_tokenizer)
    assert done.removed["duplicate"] == 10 and done.removed["too long"] == 1
    assert done.removed["over the cap of its user or organization"] == 20 * 2
    assert sum(map(len, done.splits.values())) + sum(done.removed.values()) == len(rows)
    owners = [{r.columns["org_id"] for r in part} for part in done.splits.values()]
    users = [{r.columns["user_id"] for r in part} for part in done.splits.values()]
    assert all(owners) and len(set.union(*owners)) == sum(map(len, owners)) == 20
    assert len(set.union(*users)) == sum(map(len, users)) == 40
    assert done.statistics["splits"]["all"]["prompts"] == 160


def test_files_hold_the_rows_and_are_not_overwritten(write, tmp_path, raw_tokenizer) -> None:
    read = read_prompts([write(*many(30), '{"prompt": "last", "odd": "\\ud800"}')])
    done = prepare(read.items, PrepareSettings(), raw_tokenizer)
    paths = write_prepared(done, tmp_path / "out")
    found = [json.loads(s) for p in paths if p.suffix == ".jsonl" for s in p.open(encoding="utf-8")]
    assert sorted(r["prompt"] for r in found) == sorted(r.columns["prompt"] for r in read)
    assert {"é1003", "\ud800"} <= {r.get("extra", r.get("odd")) for r in found}
    assert not list((tmp_path / "out").glob("*.part"))
    with pytest.raises(DataError, match="is there already"):
        write_prepared(done, tmp_path / "out")


def drop_vowels(text: str) -> str | None:
    return None if "1007" in text else text.replace("the", "th_")


def test_the_command(write, tmp_path: Path, chat_tokenizer, capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    chat_tokenizer.save_pretrained(tmp_path / "model")
    source, out = write(*many(60), "broken"), tmp_path / "out"
    common = ["prepare", "--input", source, "--output", str(out)]
    common += ["--tokenizer", str(tmp_path / "model"), "--pii", "test_prepare:drop_vowels"]
    assert main(common) == 1
    assert f"{source}:61: not JSON" in capsys.readouterr().err
    assert main([*common, "--bad_rows", "skip", "--validation", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "left out, broken line: 1" in shown and "Use cases" in shown and "personal" in shown
    report = json.loads((out / "statistics.json").read_text())
    train = [json.loads(line) for line in (out / "train.jsonl").open()]
    held = [json.loads(line) for line in (out / "validation.jsonl").open()]
    assert report["splits"]["train"]["prompts"] == len(train)
    assert all("th_" in r["prompt"] for r in train) and all("the" in r["prompt"] for r in held)
    assert len(train) + len(held) + report["removed"]["personal data"] == 60
    assert main([*common, "--bad_rows", "skip"]) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation": 0.6, "test": 0.4}, "got validation 0.6 and test 0.4"),
        ({"validation": -0.1}, "got validation -0.1"),
        ({"cap": 0}, "cap: got 0"),
        ({"min_prefix": 0}, "min_prefix: got 0"),
    ],
)
def test_settings_are_checked(given, message) -> None:
    with pytest.raises(DataError, match=message):
        PrepareSettings(**given)


def test_a_filter_that_is_not_there_is_named(raw_tokenizer) -> None:
    for path in ("nothing_here:f", "json:nothing", "json", "json:decoder"):
        with pytest.raises(DataError, match=f"{path}: "):
            prepare([row("a")], PrepareSettings(pii=path), raw_tokenizer)


def test_rows_that_the_template_refuses(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer.__class__(
        tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}ok"
    )
    with pytest.raises(DataError, match="here:1: .*refuses the talk: never"):
        prepare([row("no"), row("yes")], PrepareSettings(), tokenizer)
    done = prepare([row("no"), row("yes")], PrepareSettings(bad_rows="skip"), tokenizer)
    assert done.removed["chat template"] == 1
    assert sum(map(len, done.splits.values())) == 1
