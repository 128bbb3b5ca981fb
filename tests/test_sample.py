"""python -m engine.sample: candidates files, and rankings made with a scorer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet
from small_engines import byte_tokenizer, save_tiny

from engine.config_sample import SampleConfig
from engine.data.prompts import Prompt, load_prompts
from engine.data.rankings import load_rankings
from engine.errors import EngineError
from engine.hybrid import HybridEngine
from engine.sample import main, parse, ranked, ranks_of, score_rows

PROMPT = Prompt((1,), "p", None, {}, "")
SCORER = """
seen = []
def length(prompts, completions, **columns):
    seen.append((prompts, completions, columns))
    return [float(len(c)) for c in completions]
def never(prompts, completions, **columns):
    return [None for _ in completions]
def broken(prompts, completions, **columns):
    return columns["x"]
def short(prompts, completions, **columns):
    return [0.0]
"""
ROWS = [
    {"prompt": "hello", "topic": "a", "seed": 9},
    {"prompt": "a longer one", "topic": "b", "seed": 9},
    {"messages": [{"role": "user", "content": "hi"}], "topic": "c", "seed": 9},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("gpt2", tmp_path_factory.mktemp("sample") / "gpt2")


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    (tmp_path / "own_scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_scorers"
    sys.modules.pop("own_scorers", None)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(folder, prompts, output, *more):
    argv = ["--model_name_or_path", folder, "--dataset_name", prompts, "--output", output]
    argv += ["--num_samples", 3, "--max_new_tokens", 8, "--dtype", "float32", "--threads", 1, *more]
    return main([str(part) for part in argv])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_holds_what_the_engine_sampled_and_the_prompts_columns(
    folder, prompts, tmp_path, capsys
):
    output = tmp_path / "deep" / "candidates.jsonl"
    assert run(folder, prompts, output, "--seed", 4, "--temperature", 0.9) == 0
    rows = read(output)
    assert [row["prompt"] for row in rows] == ["hello", "a longer one", ROWS[2]["messages"]]
    assert [row["topic"] for row in rows] == ["a", "b", "c"]
    engine = HybridEngine.from_pretrained(folder, dtype="float32")
    inputs = ["hello", "a longer one", ROWS[2]["messages"]]
    want = engine.generate(inputs, n=3, max_new_tokens=8, seed=4, temperature=0.9)
    for index, row in enumerate(rows):
        samples = want[index * 3 : index * 3 + 3]
        assert row["responses"] == [s.text for s in samples]
        assert row["tokens"] == [list(s.tokens) for s in samples]
        assert row["logprobs"] == [s.logprobs.tolist() for s in samples]
        assert row["finish_reasons"] == [s.finish_reason for s in samples]
        assert row["episode_ids"] == [3 * index, 3 * index + 1, 3 * index + 2]
        assert (row["seed"], row["temperature"], row["model"]) == (4, 0.9, str(folder))
        assert "ranks" not in row
    said = capsys.readouterr().err
    assert "3 of 3 prompts" in said and "3 rows read, 3 kept" in said
    assert "columns of the prompts that the file's own replace: seed" in said


def test_the_batch_changes_nothing(folder, prompts, tmp_path):
    files = [tmp_path / "one.jsonl", tmp_path / "all.jsonl"]
    assert run(folder, prompts, files[0], "--batch", 1) == 0
    assert run(folder, prompts, files[1]) == 0
    one, other = (
        [{k: v for k, v in row.items() if k != "logprobs"} for row in read(f)] for f in files
    )
    assert one == other
    assert not list(tmp_path.glob("*.partial"))


def test_a_ranked_file_is_a_rankings_data_set(folder, prompts, tmp_path, scorers, capsys):
    output = tmp_path / "ranked.jsonl"
    assert run(folder, prompts, output, "--rank_with", f"{scorers}:length") == 0
    rows = read(output)
    for row in rows:
        assert row["scores"] == [float(len(text)) for text in row["responses"]]
        assert row["ranks"] == ranks_of(row["scores"]) and min(row["ranks"]) == 0
    (call,) = sys.modules[scorers].seen
    texts, completions, columns = call
    assert texts == ["hello"] * 3 + ["a longer one"] * 3 + ["hi"] * 3 and len(completions) == 9
    talks = [None] * 6 + [ROWS[2]["messages"]] * 3
    assert columns == {"topic": list("aaabbbccc"), "seed": [9] * 9, "messages": talks}
    assert all("messages" not in row for row in rows)  # they are its prompt
    groups = load_rankings([str(output)], byte_tokenizer())
    assert [group.ranks for group in groups] == [tuple(sorted(row["ranks"])) for row in rows]


def test_ranks_are_dense_lower_is_better_and_equal_scores_tie():
    assert ranks_of([0.5, 2.0, 0.5, -1.0]) == [1, 0, 1, 2]
    assert ranks_of([3.0, 3.0]) == [0, 0]
    assert ranks_of([1.0, 2.0, 3.0]) == [2, 1, 0]
    assert ranks_of([]) == []


def test_a_margin_ties_scores_near_a_groups_best_and_does_not_chain():
    assert ranks_of([1.0, 1.4, 1.8, 2.2], tie_margin=0.5) == [1, 1, 0, 0]
    assert ranks_of([1.0, 1.5], tie_margin=0.5) == [0, 0]


def test_what_cannot_be_ranked_is_left_out_and_counted():
    row = {
        "prompt": "p",
        "responses": ["a", " ", "b", "c"],
        "tokens": [[1], [2], [3], [4]],
        "seed": 0,
    }
    left_out = Counter()
    result = ranked(row, [1.0, 5.0, None, 2.0], 0.0, left_out)
    assert (result["responses"], result["tokens"]) == (["a", "c"], [[1], [4]])
    assert (result["scores"], result["ranks"], result["seed"]) == ([1.0, 2.0], [1, 0], 0)
    assert left_out == {"empty completions": 1, "completions without a score": 1}
    assert ranked(row, [None, 1.0, 1.0, None], 0.0, left_out) is None
    assert left_out["prompts with fewer than two completions to rank"] == 1


def test_a_file_appears_only_when_it_is_complete(folder, prompts, tmp_path, scorers, capsys):
    output = tmp_path / "never.jsonl"
    assert run(folder, prompts, output, "--rank_with", f"{scorers}:short") == 1
    assert "rank_with: got 1 values, want a list of 9 numbers" in capsys.readouterr().err
    assert run(folder, prompts, output, "--rank_with", f"{scorers}:broken") == 1
    assert "rank_with: raised KeyError: 'x'" in capsys.readouterr().err
    assert not output.exists()
    assert run(folder, prompts, output, "--rank_with", f"{scorers}:never") == 0
    assert output.read_text() == ""
    said = capsys.readouterr().err
    assert "left out, completions without a score: 9" in said
    assert "left out, prompts with fewer than two completions to rank: 3" in said


def test_a_score_that_is_no_number_is_an_error():
    with pytest.raises(EngineError, match="rank_with: value 0 is 'nan'"):
        score_rows(lambda prompts, completions: [float("nan")], [{"responses": ["x"]}], [PROMPT])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_samples", "1", "--rank_with", "m:f"], "at least 2 with rank_with"),
        (["--tie_margin", "-1"], "tie_margin: got -1"),
        (["--batch", "0"], "batch: got 0"),
        (["--num_sample", "3"], "num_samples"),
    ],
)
def test_bad_usage_is_a_message_and_exit_code_2(more, message, capsys):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output", "o", *more]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_every_key_reaches_the_config():
    argv = (
        "--model_name_or_path m --dataset_name d --output o --num_samples 5 --top_k 7 --top_p 0.5"
    )
    config = parse([*argv.split(), "--tie_margin", "0.25", "--num_prompts", "9"])
    assert config == SampleConfig(
        model_name_or_path="m",
        dataset_name="d",
        output="o",
        num_samples=5,
        top_k=7,
        top_p=0.5,
        tie_margin=0.25,
        num_prompts=9,
    )


@pytest.mark.parametrize("template", [True, False])
def test_a_row_holds_the_prompt_that_was_answered(template, tmp_path):
    """Of a row with a text and messages a model without a template answers the text."""
    model = save_tiny("gpt2", tmp_path / "model")
    if not template:
        (model / "chat_template.jinja").unlink()
    turns = (("user", "hi"), ("assistant", "yes"), ("user", "so"))
    talk = [{"role": role, "content": content} for role, content in turns]
    rows = [{"prompt": "a text", "messages": talk}, {"messages": talk}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(model, path, tmp_path / "out.jsonl", "--num_samples", 2) == 0
    found = read(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in found] == [talk if template else "a text", talk]
    engine = HybridEngine.from_pretrained(model, dtype="float32")
    given = load_prompts([str(path)], engine.tokenizer)
    assert [prompt.tokens for prompt in load_prompts([str(tmp_path / "out.jsonl")], engine.tokenizer)] == [
        prompt.tokens for prompt in given
    ]


def test_columns_that_are_no_json_are_written_as_text(folder, tmp_path, capsys):
    day = datetime(2026, 1, 2, tzinfo=UTC)
    values = {"day": [day], "price": [Decimal("1.50")], "rate": [[1.5, math.nan]], "topic": ["a"]}
    parquet.write_table(pyarrow.table({"prompt": ["hello"], **values}), tmp_path / "prompts.parquet")
    assert run(folder, tmp_path / "prompts.parquet", tmp_path / "out.jsonl") == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["day"], row["price"], row["rate"], row["topic"]) == (str(day), "1.50", [1.5, None], "a")
    said = capsys.readouterr().err
    assert said.count("written as text or, for NaN, as null: day, price, rate\n") == 1


def test_columns_named_as_a_scorers_arguments_are_not_given_to_it(folder, tmp_path, scorers, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "hello", "completions": ["x"], "prompts": 1, "topic": "a"}) + "\n")
    assert run(folder, path, tmp_path / "out.jsonl", "--rank_with", f"{scorers}:length") == 0
    assert sys.modules[scorers].seen[0][2] == {"topic": ["a"] * 3}
    said = capsys.readouterr().err
    assert "no reward function gets, since prompts, completions are its own arguments: prompts, completions" in said
    assert read(tmp_path / "out.jsonl")[0]["topic"] == "a"


def test_an_output_that_cannot_be_written_is_said_before_the_work(folder, prompts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(folder, prompts, tmp_path) == 1
    assert f"output: got '{tmp_path}', which is a folder" in capsys.readouterr().err
    assert run(folder, prompts, tmp_path / "file" / "out.jsonl") == 1
    said = capsys.readouterr().err
    assert "sample: " in said and "file" in said and "rows read" not in said


def test_an_output_that_is_there_is_refused_before_the_work(prompts, tmp_path, capsys):
    """Somebody may have ranked it; the model, which is not there, is never asked for."""
    output = tmp_path / "candidates.jsonl"
    output.write_text("ranked by hand")
    assert run(tmp_path / "no model", prompts, output) == 1
    want = f"output: got '{output}', which is there already; move it away, give another --output, or replace it"
    assert want in capsys.readouterr().err
    assert output.read_text() == "ranked by hand"


def test_an_output_is_replaced_where_that_is_asked_for(folder, prompts, tmp_path):
    output = tmp_path / "candidates.jsonl"
    output.write_text("old")
    assert run(folder, prompts, output, "--overwrite", "true") == 0
    assert [row["prompt"] for row in read(output)][:2] == ["hello", "a longer one"]


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_the_prompts_own_file_is_never_the_output(as_folder, link, folder, prompts, tmp_path, capsys):
    before, output = prompts.read_text(), prompts
    if link:
        output = tmp_path / "deep" / "linked.jsonl"
        output.parent.mkdir()
        output.symlink_to(prompts)
    source = tmp_path if as_folder else prompts
    assert run(folder, source, output, "--num_prompts", 2, "--overwrite", "true") == 1
    said = capsys.readouterr().err
    assert f"output: got '{output}', a file of dataset_name '{source}', whose rows would be lost" in said
    assert prompts.read_text() == before


def test_reading_the_command_line_warns_of_nothing_and_leaves_torch_for_later():
    """Later its threads and the class of CPU are settled; and help comes at once."""
    code = (
        "import sys; from engine.sample import parse;"
        " parse(['--model_name_or_path=m', '--dataset_name=d', '--output=o']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False", "")
