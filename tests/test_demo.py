"""The demo: its data, labeler and formulas, and the whole flow on a tiny random model."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import Console
from small_engines import save_tiny

from engine.demo import closing, compare, flow, labeler, model
from engine.demo.plan import DATA, Plan
from engine.errors import ConfigError, EngineError

FORMS = (
    r"Write a short review of (.+)\.",
    r"Write a one-sentence review of (.+)\.",
    r"Review (.+) in a sentence or two\.",
)
ROWS = {
    "demonstrations": 300,
    "demonstrations_valid": 24,
    "prompts": 400,
    "prompts_heldout": 120,
    "prose": 80,
    "prose_heldout": 14,
}
TEXT = {name: "completion" if "demo" in name else "text" for name in ROWS if "prompts" not in name}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def thing(prompt: str) -> str:
    found = [m for form in FORMS if (m := re.fullmatch(form, prompt))]
    assert len(found) == 1, prompt
    return found[0][1]


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_files_are_ascii_and_large_enough(name):
    (DATA / f"{name}.jsonl").read_text(encoding="ascii")
    assert len(rows(name)) >= ROWS[name]
    listed = re.search(rf"`{name}\.jsonl` \| (\d+)", (DATA / "README.md").read_text())
    assert listed and int(listed[1]) == len(rows(name))


def test_the_data_says_whose_it_is():
    note = (DATA / "README.md").read_text()
    assert "Written for this project" in note and "Apache-2.0" in note


def test_nothing_reviewed_stands_in_two_files_or_twice():
    seen: dict[str, str] = {}
    for name in ("demonstrations", "demonstrations_valid", "prompts", "prompts_heldout"):
        for row in rows(name):
            item = thing(row["prompt"])
            assert item not in seen, f"{item}: in {seen[item]} and in {name}"
            seen[item] = name


def test_demonstrations_are_short_reviews_of_mixed_sentiment():
    texts = [row["completion"] for row in rows("demonstrations")]
    assert all(25 <= len(text) <= 180 and text[-1] in ".!?" for text in texts if len(text) > 25)
    assert all(len(re.findall(r"[.!?](?: |$)", text)) <= 3 for text in texts)
    scores = labeler.score([""] * len(texts), texts)
    assert abs(sum(scores) / len(scores)) < 0.15
    assert min(sum(s > 0.2 for s in scores), sum(s < -0.2 for s in scores)) > len(scores) / 5


@pytest.mark.parametrize("name", TEXT)
def test_no_near_duplicates_and_no_held_out_text_in_training(name):
    own = [(i, shingles(row[TEXT[name]], 4)) for i, row in enumerate(rows(name))]
    for (i, a), (j, b) in combinations(own, 2):
        shared = len(a & b) / max(1, min(len(a), len(b)))
        assert shared < 0.3, f"{name}: rows {i} and {j} share {shared:.0%} of their 4-word runs"
    if name in ("demonstrations_valid", "prose_heldout"):
        train = name.split("_")[0]
        seen = set().union(*(shingles(row[TEXT[train]], 6) for row in rows(train)))
        assert all(not (shingles(row[TEXT[name]], 6) & seen) for row in rows(name))


def test_prose_is_long_enough():
    assert sum(len(row["text"]) for row in rows("prose")) > 40_000
    assert sum(len(row["text"]) for row in rows("prose_heldout")) > 8_000


# --- labeler and formulas -------------------------------------------------------------------------


def test_labeler_prefers_positive_reviews_and_ignores_the_prompt():
    texts = ["A wonderful, delicious meal.", "The table is round.", "Awful, dirty and rude."]
    good, plain, bad = labeler.score(["Review a pub."] * 3, texts, kind=["x"] * 3)
    assert good > 0.5 > plain == 0.0 > -0.5 > bad
    assert labeler.score(["I hate everything"] * 3, texts) == [good, plain, bad]
    assert labeler.score([], []) == []


def test_win_rate_is_golden(golden):
    for case in golden["win_rate"]:
        rate = compare.WinRate(**case["inputs"])
        assert rate.rate == pytest.approx(case["outputs"]["win_rate"], rel=1e-12)
        assert rate.half_width == pytest.approx(case["outputs"]["ci95_half_width"], rel=1e-12)


def test_an_interval_of_a_rate_stays_within_0_and_1():
    high, low = compare.WinRate(126, 2, 2), compare.WinRate(2, 2, 126)
    assert high.rate + high.half_width > 1.0 == high.interval[1]
    assert low.rate - low.half_width < 0.0 == low.interval[0]
    even = compare.WinRate(40, 20, 40)
    assert even.interval == (0.5 - even.half_width, 0.5 + even.half_width)


def test_win_rate_counts_ties_by_the_margin():
    before, after = [0.0, 0.0, 0.0, 0.5, 0.5], [0.04, 0.06, -0.04, 0.3, 0.9]
    rate = compare.win_rate(before, after, margin=0.05)
    assert (rate.wins, rate.ties, rate.losses) == (2, 2, 1)
    assert rate.rate == pytest.approx(0.6)
    with pytest.raises(EngineError, match="at least 2"):
        _ = compare.WinRate(1, 0, 0).half_width


# --- the model ------------------------------------------------------------------------------------


def test_a_missing_package_names_the_extra():
    with pytest.raises(EngineError, match=r"no_such_package.*rlhf-engine\[demo\]"):
        model.require("json", "no_such_package")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EngineError, match="Give another --output"):
        model.prepare(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_folder_is_valid_when_every_file_has_its_size(tmp_path):
    assert not model.is_valid(tmp_path)
    for name in model.FILES:
        (tmp_path / name).write_text("x" * 7)
    mark = {"sizes": dict.fromkeys(model.FILES, 7)}
    (tmp_path / model.MARK).write_text(json.dumps(mark))
    assert model.is_valid(tmp_path)
    assert model.prepare(tmp_path) is False
    (tmp_path / "model.safetensors").write_text("x" * 6)
    assert not model.is_valid(tmp_path)


# --- the flow, on a tiny random model ---------------------------------------------------------------


def tiny_data(folder: Path) -> Path:
    """A few rows of the real files; prompts cut to fit the tiny model's context."""
    folder.mkdir()
    for name, count in (("demonstrations", 10), ("demonstrations_valid", 4), ("prompts", 8)):
        short = [r for r in rows(name) if len(r["prompt"]) < 50][:count]
        lines = [{k: v[: 50 if k == "prompt" else 30] for k, v in r.items()} for r in short]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    held = [r for r in rows("prompts_heldout") if len(r["prompt"]) < 50][:5]
    (folder / "prompts_heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    for name in ("prose", "prose_heldout"):
        lines = [{"text": r["text"][:80]} for r in rows(name)[:3]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


def tiny_plan(folder: Path, **changes) -> Plan:
    source = folder / "model"
    if not source.exists():
        save_tiny("llama", source)
        sizes = {name: 0 for name in model.FILES}
        for name in model.FILES:
            path = source / name
            path.touch()
            sizes[name] = path.stat().st_size
        (source / model.MARK).write_text(json.dumps({"sizes": sizes}))
    data = folder / "data" if (folder / "data").exists() else tiny_data(folder / "data")
    settings = {
        "sft": {"num_train_epochs": 1, "per_device_train_batch_size": 5, "max_length": 96},
        "rm": {"per_device_train_batch_size": 2, "max_length": 96},
        "ppo": {
            "max_length": 60, "response_length": 8, "total_episodes": 8, "batch_size": 4,
            "num_mini_batches": 2, "ptx_length": 16, "ptx_per_episode": 0.5, "ptx_coef": 1.0,
            "eval_num_prompts": 2, "save_steps": 1,
        },
    }  # fmt: skip
    own = {"ranked_prompts": 4, "ranked_heldout": 5, "samples": 3, "tie_margin": 0.0}
    fixed = {"output": folder / "out", "model": source, "data": data, "progress": False}
    return Plan(**{**fixed, **settings, **own, "threads": 1, **changes})


@pytest.fixture
def other_labeler(monkeypatch):
    """Random bytes hold no words of the lexicon: here the labeler likes some letters better."""

    def count(prompts, completions, **columns):
        return [sum(map(ord, text)) % 97 / 97 for text in completions]

    monkeypatch.setattr(labeler, "score", count)
    monkeypatch.setattr(compare, "score", count)


def test_flow_from_demonstrations_to_the_closing_table(tmp_path, other_labeler):
    plan, told = tiny_plan(tmp_path), []
    found = flow.run(plan, told.append)
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == json.loads(json.dumps(found))
    assert list(found["seconds"]) == ["model", "sft", "rankings", "rm", "ppo", "evaluation"]
    assert found["phases"]["ppo"]["iterations"] == 2 and found["phases"]["ppo"]["episodes"] == 8
    assert sum(found["wins_ties_losses"]) == 5
    low, high = found["win_rate_ci95"]
    assert low <= found["win_rate"] <= high
    for key in ("reward_true_before", "reward_true_after", "kl", "rm_accuracy", "commit"):
        assert key in found
    assert found["perplexity_before"] > 1 and found["machine"]["cpu_class"]
    assert not found["went_on_after_a_stop"]
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200].lower()
    assert not list((tmp_path / "out").glob("*/checkpoint-*"))
    console = Console(record=True, width=120, file=(tmp_path / "console").open("w"))
    closing.show(plan, found, console)
    text = console.export_text()
    for part in ("win rate", "perplexity", "tokens/s", "report.html", "standing in for people"):
        assert part in text

    # all is done: another call changes no file of any stage
    stamp = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/model.safetensors")}
    again = flow.run(plan, told.append)
    assert stamp == {p: p.stat().st_mtime_ns for p in stamp}
    assert again["kl"] == found["kl"] and told[-1] == "evaluation: done before"


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_model(tmp_path, other_labeler, monkeypatch):
    straight = flow.run(tiny_plan(tmp_path, output=tmp_path / "straight"), lambda line: None)

    import engine.stages.ppo.loop as loop

    iterate, calls = loop.iterate, []

    def die_in_the_second(session, ppo, *more):
        calls.append(ppo.iteration)
        if len(calls) == 2:
            raise Killed
        return iterate(session, ppo, *more)

    plan = tiny_plan(tmp_path)
    monkeypatch.setattr(loop, "iterate", die_in_the_second)
    with pytest.raises(Killed):
        flow.run(plan, lambda line: None)
    told: list[str] = []
    found = flow.run(plan, told.append)
    assert calls == [0, 1, 1], "the finished iteration was not trained again"
    assert [line for line in told if line.endswith("done before")] == [
        f"{name}: done before" for name in ("model", "sft", "rankings", "rm")
    ]
    assert found["went_on_after_a_stop"] == ["ppo"]
    files = [tmp_path / name / "ppo" / "model.safetensors" for name in ("straight", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert found["kl"] == straight["kl"]


def test_rankings_stopped_after_their_first_file_are_made_again(tmp_path, other_labeler, monkeypatch):
    plan, sample, outputs = tiny_plan(tmp_path), flow.sample, []

    def die_in_the_second(config):
        if outputs:
            raise Killed
        outputs.append(sample(config))
        return outputs[0]

    plan.claim()
    flow.unpack(plan)
    flow.sft(plan)
    monkeypatch.setattr(flow, "sample", die_in_the_second)
    with pytest.raises(Killed):
        flow.rankings(plan)
    first = outputs[0].read_bytes()
    monkeypatch.setattr(flow, "sample", sample)
    assert flow.rankings(plan)["tokens"] > 0
    assert outputs[0].read_bytes() == first


def test_a_folder_of_another_run_is_refused(tmp_path):
    tiny_plan(tmp_path).claim()
    tiny_plan(tmp_path).claim()
    with pytest.raises(ConfigError, match=r"seed was 0, is 1"):
        tiny_plan(tmp_path, seed=1).claim()
    with (tmp_path / "data" / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "Write a short review of a hat."}\n')
    with pytest.raises(ConfigError, match="data"):
        tiny_plan(tmp_path).claim()


def test_ppo_optimises_the_reward_model_and_never_the_labeler(tmp_path):
    config = tiny_plan(tmp_path).ppo_config()
    assert config.rewards == [] and config.reward_model_path == str(tmp_path / "out" / "rm")


def test_kl_and_perplexity_by_hand(tmp_path):
    import math

    from engine import HybridEngine

    first = HybridEngine.from_pretrained(save_tiny("llama", tmp_path / "a"), dtype="float32")
    second = HybridEngine.from_pretrained(save_tiny("llama", tmp_path / "b", 1), dtype="float32")
    found = compare.answers(first, ["one", "another"], 6, 0)
    kl = compare.sequence_kl(found, second)
    for answer, value in zip(found, kl, strict=True):
        n = len(answer.logprobs)
        ours, theirs = (e.logprobs([answer.sequence])[0][-n:].sum() for e in (first, second))
        assert value == pytest.approx(float(ours - theirs), abs=1e-4)
    assert all(abs(k) < 1e-4 for k in compare.sequence_kl(found, first))
    ids = [first.tokenizer(text)["input_ids"] for text in ("a line", "b")]
    eos = first.tokenizer.eos_token_id
    values = first.logprobs([[*i, eos] for i in ids])
    mean = sum(float(v.sum()) for v in values) / 7  # every token but the first of each, the end token too
    assert compare.perplexity(first, ["a line", "b"]) == pytest.approx(math.exp(-mean), rel=1e-4)
