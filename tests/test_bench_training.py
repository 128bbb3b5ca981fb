"""bench.ppo and bench.train without timing anything: cases, ratios with fake sides, flags, tables."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
from small_engines import save_tiny

from bench import (
    opponent,
    ppo,
    ppo_phases,
    rollout,
    table,
    train,
    training,
    training_cases,
    training_table,
)
from bench.opponent import Missing
from bench.training_cases import Case
from engine import ops


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("tiny")))


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Side:
    """A side that answers what it is told to, and notes its orders."""

    def __init__(self, *answers: dict) -> None:
        self.answers, self.orders = list(answers), []

    def turn(self, order: dict) -> dict:
        self.orders.append(order)
        return self.answers.pop(0)


def answer(seconds: float, tokens: int = 10, memory: float = 2.0, **checks: float) -> dict:
    found = {name: [value] for name, value in checks.items()}
    return {"seconds": seconds, "tokens": tokens, "checks": found, "peak_memory_gb": memory}


CASE = Case("sft", "hf", 16, {}, {"loss": 1e-2})


def test_a_row_by_hand():
    ours = Side(answer(9.0, loss=2.0), answer(1.0), answer(2.0, memory=3.0), answer(4.0))
    theirs = Side(answer(9.0, loss=2.01), *(answer(8.0, memory=6.0) for _ in range(3)))
    row = training.compared(CASE, ours, theirs, 3)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (4.0, 2.0, 8.0)
    assert (row["seconds"], row["peer_seconds"], row["memory_ratio"]) == (2.0, 8.0, 0.5)
    assert row["checked"] == {"loss": 2.0} and row["repeats"] == 3
    assert ours.orders == theirs.orders == [{"warm_up": True}, {}, {}, {}]


def test_ratios_of_sampled_answers_are_of_seconds_a_token():
    case = Case("ppo-ragged", "trl", 2, {"stop": True}, {"log-prob": 1e-2})
    sampled = [{"tokens": [1, 2], "start": 1}]
    theirs = Side({**answer(0.0, **{"log-prob": -3.0}), "sampled": sampled}, answer(30.0, 20))
    ours = Side(answer(0.0, **{"log-prob": -3.01}), answer(5.0), answer(5.0, 10))
    assert training.compared(case, ours, theirs, 1)["ratio"] == (30.0 / 20) / (5.0 / 10)
    # the peer's answers are scored before the engine's own first iteration moves its weights
    assert ours.orders == [{"score": sampled}, {"warm_up": True}, {}]


def test_sides_that_do_other_work_are_refused():
    with pytest.raises(RuntimeError, match="loss: the engine has 2.1, the peer 2, want 0.01"):
        training.compared(CASE, Side(answer(1.0, loss=2.1)), Side(answer(1.0, loss=2.0)), 1)
    with pytest.raises(RuntimeError, match="loss: the engine has nan"):
        training.compared(CASE, Side(answer(1.0, loss=math.nan)), Side(answer(1.0, loss=2.0)), 1)
    with pytest.raises(RuntimeError, match="different numbers of tokens"):
        ours = Side(answer(1.0, loss=2.0), answer(1.0, 10))
        training.compared(CASE, ours, Side(answer(1.0, loss=2.0), answer(1.0, 11)), 1)


def test_the_dtype_of_a_peer_is_its_best():
    assert {c: opponent.best_dtype(c) for c in ("amx", "avx512", "avx2")} == {
        "amx": "bfloat16",
        "avx512": "float32",
        "avx2": "float32",
    }


@pytest.mark.parametrize("program", [ppo, train, rollout])
def test_a_peer_of_another_dtype_is_asked_for(program, monkeypatch):
    monkeypatch.setattr(ops, "cpu_class", lambda: "avx2")
    assert program.parsed(["--model", "m"]).peer_dtype == "float32"
    assert program.parsed(["--model", "m", "--peer_dtype", "bfloat16"]).peer_dtype == "bfloat16"


def test_a_peer_is_told_its_dtype(monkeypatch):
    told = []
    monkeypatch.setattr(training, "Served", lambda name, command, environment: told.extend(command))
    training.peer_side(CASE, Path("w"), training.Setting("m", "float32", "bfloat16", 2), Path("p"))
    assert told[told.index("--dtype") + 1] == "bfloat16"


def flags(*words: str) -> argparse.Namespace:
    return ppo.parsed(["--model", "m", *words])


def test_a_peer_that_is_not_there(tmp_path, capsys):
    setting = training.Setting("m", "bfloat16", "float32", 1)
    found = training.rows_against(
        "bench.ppo", iter([CASE]), flags("--peers", str(tmp_path)), setting
    )
    assert list(found) == []
    told = f"bench.ppo: sft against hf is skipped: no {tmp_path}/hf/bin/python; want"
    assert capsys.readouterr().out.startswith(told)
    named = flags("--peer", "hf", "--peer_python", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match="is skipped: no .*/python; want an environment"):
        list(training.rows_against("bench.ppo", iter([CASE]), named, setting))
    with pytest.raises(Missing, match="no --peers DIR"):
        training.python_of("trl", flags())


def test_of_a_peer_asked_for_by_name_only_its_workloads_run(monkeypatch):
    cases = iter([Case("ppo", "trl", 1, {}, {}), CASE])
    monkeypatch.setattr(training, "against", lambda case, python, *_: {"workload": case.name})
    named = flags("--peer", "hf", "--peer_python", sys.executable)
    setting = training.Setting("m", "bfloat16", "float32", 1)
    assert list(training.rows_against("bench.ppo", cases, named, setting)) == [{"workload": "sft"}]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--repeats", "0"], "--repeats: got 0, want 1 or more"),
        (["--episodes", "0"], "--episodes: got 0"),
        (["--peer_python", "p"], "--peer_python: got it without --peer"),
        (["--peer", "vllm"], "invalid choice: 'vllm'"),
    ],
)
def test_arguments_that_say_nothing_are_refused(words, told, capsys):
    with pytest.raises(SystemExit):
        flags(*words)
    assert told in capsys.readouterr().err


def test_what_has_no_data_is_left_out_and_said(capsys):
    args = train.parsed(["--model", "m", "--only", "sft", "sft-ragged", "rm"])
    assert [case.name for case in train.cases(args)] == ["sft"]
    told = capsys.readouterr().out
    assert "sft-ragged is left out: it wants --sft FILE.jsonl" in told
    assert "rm is left out: it wants --rankings FILE.jsonl" in told
    assert [case.name for case in ppo.cases(flags("--only", "ppo-ragged"))] == []
    assert "ppo-ragged is left out" in capsys.readouterr().out


def test_cases_of_random_rows(tiny):
    case = training_cases.ppo(flags("--episodes", "32"))
    assert (len(case.work["prompts"]), case.work["micro_batch"], case.work["stop"]) == (
        32,
        16,
        False,
    )
    assert training_cases.ppo(flags("--episodes", "4")).work["micro_batch"] == 4
    with pytest.raises(SystemExit, match="--episodes: got 24, want a multiple of 16"):
        training_cases.ppo(flags("--episodes", "24"))
    update = training_cases.ppo_update(ppo.parsed(["--model", tiny, "--episodes", "3"])).work
    assert [len(row) for row in update["episodes"]] == [128] * 3
    assert [len(row) for row in (*update["advantage"], *update["returns"])] == [64] * 6
    assert update["advantage"][0] != update["returns"][0]
    assert len(update["head"]) == 36


def test_cases_of_real_rows(tiny, tmp_path):
    demonstrations = [{"prompt": f"q{i}", "completion": "a" * (i + 1)} for i in range(20)]
    path = lines(tmp_path / "sft.jsonl", demonstrations)
    args = train.parsed(["--model", tiny, "--sft", str(path), "--rows", "18"])
    case = training_cases.sft_ragged(args)
    assert [len(batch) for batch in case.work["batches"]] == [16, 2]
    row = case.work["batches"][0][2]
    assert len(row["tokens"]) - row["start"] == 4  # three letters and the end of sequence
    args.rows = 21
    with pytest.raises(SystemExit, match="got 20 demonstrations, want 21"):
        training_cases.sft_ragged(args)


def test_ranked_groups_are_chosen_by_their_sizes(tiny, tmp_path):
    answers = ["a", "bb", "ccc", "dddd"]
    short = {"prompt": "p", "responses": answers, "ranks": [0, 1, 2, 3]}
    tied = {**short, "prompt": "p" * 700, "ranks": [0, 0, 1, 2]}
    good = {**short, "prompt": "q" * 700, "ranks": [3, 0, 2, 1]}
    path = lines(tmp_path / "rankings.jsonl", [short, tied, good])
    args = train.parsed(["--model", tiny, "--rankings", str(path), "--groups", "1"])
    work = training_cases.rm(args).work
    ((group,),) = work["batches"]
    assert group["ranks"] == [0, 1, 2, 3]  # best first
    assert [len(r) for r in group["responses"]] == [3, 5, 4, 2]  # a token a letter, and the end
    assert work["warm_up"][0]["responses"] == group["responses"][:2]
    args.groups = 2
    with pytest.raises(SystemExit, match="got 1 prompts of 500 to 1000 tokens"):
        training_cases.rm(args)


def test_the_table_by_hand(tmp_path):
    own = {
        "dtype": "bfloat16",
        "seconds": 12.345,
        "ratio": 1.5,
        "ratio_min": 1.404,
        "ratio_max": 1.6,
    }
    hf = {
        "peer": "hf",
        "peer_dtype": "float32",
        "memory_ratio": 0.5,
        "peer_versions": {"torch": "2"},
    }
    phases = dict.fromkeys(ppo_phases.PHASES, {"seconds": 2.0, "share": 0.25, "of_peak": 0.8})
    phases["optimizer"] = {"seconds": 0.05, "share": 0.01, "of_copy": 0.7}
    rows = [
        {"workload": "sft", "sequences": 16, **hf, **own},
        {"workload": "sft-ragged", "sequences": 8, **hf, **own},  # of another size: not the table's
        {"workload": "rm-repeated", "sequences": 2, "peer": "prompts repeated", "memory_ratio": None, **own},
        {"workload": "gae", "sequences": 512, "peer": "one pass over its bytes", **own},
    ]  # fmt: skip
    (tmp_path / "train-avx2.json").write_text(json.dumps({"rows": rows}))
    alone = [{"workload": "phases", "sequences": 32, "phases": phases, **own}]
    (tmp_path / "ppo-avx2.json").write_text(json.dumps({"rows": alone}))
    text = training_table.render(tmp_path)
    none = " | ".join([table.NONE] * 3)
    assert f"| `amx` | all | {' | '.join([table.NONE] * 4)} |" in text
    told = "| `avx2` | SFT step, 16 rows of 128 tokens | transformers in float32 | 12.3 s |"
    assert f"{told} 1.50 (1.40 to 1.60) | 0.50 |" in text
    assert f"| `avx2` | SFT steps, 64 real demonstrations | transformers | {none} |" in text
    assert "| the same | itself, prompts repeated | 12.3 s | 1.50 (1.40 to 1.60) | – |" in text
    assert "| rollout | 2.00 s (25 %), 0.80 of peak |" in text
    assert "| optimizer | 50.0 ms (1 %), 0.70 of copy |" in text
    assert "| `gae`, 512 × 1024 tokens | 1.50 passes |" in text
    assert "- `avx2`: torch 2" in text
