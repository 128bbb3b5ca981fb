"""Reading files, mixtures, and what is said about rows that cannot be used."""

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from engine.data.prompts import load_prompts
from engine.data.rows import DataSource, Row, collect, read_rows
from engine.errors import DataError


def columns(row: Row) -> dict:
    return row.columns


def test_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": f"é {i}", "n": i} for i in range(700)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n")  # mark and blank line
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.rstrip()))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        found = list(read_rows(DataSource(str(tmp_path / name))))
        assert [row.columns for row in found] == rows
        assert found[0].source == name[0]
    assert found[699].where.endswith("c.parquet:row 700")


def test_folders_are_read_by_split(tmp_path: Path, write: Callable[..., str]) -> None:
    (tmp_path / "data").mkdir()
    write({"n": 2}, name="data/train-00001-of-00002.jsonl")
    write({"n": 1}, name="data/train-00000-of-00002.jsonl")
    write({"n": 3}, name="data/test.jsonl")
    write({"n": 4}, name="constraint-test.jsonl")  # holds "train" inside a word
    folder = str(tmp_path)
    assert [r.columns["n"] for r in read_rows(DataSource(folder))] == [1, 2]
    assert [r.columns["n"] for r in read_rows(DataSource(folder, split="test"))] == [4, 3]
    with pytest.raises(DataError, match="no split 'dev'; there are test, train"):
        list(read_rows(DataSource(folder, split="dev")))


def test_a_folder_without_split_names_is_all_train(tmp_path: Path, write) -> None:
    write({"n": 1}, name="b.jsonl")
    write({"n": 2}, name="a.jsonl")
    assert [r.columns["n"] for r in read_rows(DataSource(str(tmp_path)))] == [2, 1]
    with pytest.raises(DataError, match="no split 'test'; there are train"):
        list(read_rows(DataSource(str(tmp_path), split="test")))


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_dict({"n": [name]}) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    parts["test"].save_to_disk(str(tmp_path / "one"))
    found = list(read_rows(DataSource(str(tmp_path / "all"), split="test")))
    assert found[0].columns == {"n": "test"} and found[0].where.endswith("all[test]:row 1")
    assert [r.columns["n"] for r in read_rows(DataSource(str(tmp_path / "one")))] == ["test"]
    with pytest.raises(DataError, match="no split 'dev'"):
        list(read_rows(DataSource(str(tmp_path / "all"), split="dev")))


def test_hub_ids_go_to_datasets_without_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows(DataSource("some/thing", split="test", name="small")))
    assert asked == [(("some/thing", "small"), {"split": "test"})]
    assert rows[1].where == "some/thing[test]:row 2" and rows[1].source == "thing"

    def fail(*args, **kwargs):
        raise FileNotFoundError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"some/thing: cannot be loaded.*offline"):
        list(read_rows(DataSource("some/thing")))


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/missing/x", "a/b/c", "what is it"]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_rows(DataSource(path)))


@pytest.mark.parametrize(
    ("weight", "taken"),
    [
        (1.0, [0, 1, 2, 3, 4, 5]),
        (0.5, [1, 3, 5]),
        (2.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (1.5, [0, 1, 1, 2, 3, 3, 4, 5, 5]),
        (1 / 3, [2, 5]),
    ],
)
def test_weights_are_shares_of_rows(write, weight: float, taken: list[int]) -> None:
    path = write(*[{"n": i} for i in range(6)])
    data = collect([DataSource(path, weight=weight)], lambda row: row.columns["n"])
    assert list(data) == taken
    assert (data.report.read, data.report.kept) == (6, len(taken))
    assert data.report.not_drawn == 6 - len(set(taken))


def test_mixtures_keep_their_order_and_count_together(write) -> None:
    first, second = write({"n": 1}, {"n": 2}), write({"n": 3}, name="other.jsonl")
    data = collect([DataSource(first, weight=0.5), second], lambda row: (row.source, row.columns))
    assert list(data) == [("rows", {"n": 2}), ("other", {"n": 3})]
    assert data.report.lines() == ["3 rows read, 2 kept", "  left out by mixture weight: 1"]


def test_a_weight_is_a_finite_number_above_0() -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="weight: got"):
            DataSource("a", weight=weight)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[1, 2]", "the line holds a list"),
        ('"text"', "the line holds a str"),
        ('{"text": "a"}', "no column 'prompt' or 'messages'; it has text"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_a_broken_row_names_file_line_and_reason(write, raw_tokenizer, line, reason) -> None:
    path = write({"prompt": "fine"}, line, {"prompt": "fine"})
    with pytest.raises(DataError) as caught:
        load_prompts([path], raw_tokenizer)
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)
    assert isinstance(caught.value, ValueError)
    data = load_prompts([path], raw_tokenizer, bad_rows="skip")
    assert len(data) == 2 and data.report.read == 3
    assert data.report.skipped == {caught.value.kind: 1}
    assert any(f"{path}:2" in line for line in data.report.lines())


def test_bytes_that_are_no_text(tmp_path: Path, raw_tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8"):
        load_prompts([str(tmp_path / "a.jsonl")], raw_tokenizer)


def test_a_file_that_breaks_off_is_an_error_even_when_rows_may_be_skipped(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"n": i, "text": str(i) * 50}) + "\n" for i in range(3000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-40])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    for name, reason in (("a.jsonl.gz", "breaks off here"), ("b.parquet", "not a parquet file")):
        with pytest.raises(DataError, match=reason):
            collect([str(tmp_path / name)], columns, "skip")


def test_nothing_usable_is_an_error(write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row\n1 rows read, 0 kept\n  left out, broken"):
        collect([write("nonsense")], columns, "skip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        list(read_rows(DataSource(str(tmp_path / "empty"))))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_rows(DataSource(str(tmp_path / "a.txt"))))
    with pytest.raises(DataError, match="bad_rows: got 'ignore'"):
        collect([], columns, "ignore")  # type: ignore[arg-type]


def test_lines_are_read_one_by_one(write) -> None:
    path = write({"n": 1}, "nonsense")
    rows = read_rows(DataSource(path))
    assert next(rows).columns == {"n": 1}
    Path(path).unlink()  # the rest comes from the open file, nothing was read ahead by us
    assert next(rows).problem is not None


def test_hidden_files_are_nobodys_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".cache/deep/b.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"from": name}) + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [row.columns for row in read_rows(DataSource(str(tmp_path)))] == [{"from": "a.jsonl"}]


def test_a_file_without_a_split_beside_those_with_one_is_an_error(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        (tmp_path / name).write_text('{"n": 1}\n')
    with pytest.raises(DataError, match=r"more.jsonl: names no split, but other files of .* do \(test, train\)"):
        list(read_rows(DataSource(str(tmp_path))))
    (tmp_path / "more.jsonl").unlink()
    assert [row.where for row in read_rows(DataSource(str(tmp_path)))] == [f"{tmp_path / 'train.jsonl'}:1"]


def test_one_array_is_its_objects(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "alpaca.json"
    path.write_bytes(codecs.BOM_UTF8 + b' \n[{"n": 1},\n {"n": 2}, 3]')
    rows = list(read_rows(DataSource(str(path))))
    assert [(row.where, row.columns) for row in rows[:2]] == [
        (f"{path}:item 1", {"n": 1}),
        (f"{path}:item 2", {"n": 2}),
    ]
    assert "the item holds a int" in str(rows[2].problem)
    path.write_text('[{"n": 1}, ')
    with pytest.raises(DataError, match="begins as one JSON array, but is none"):
        list(read_rows(DataSource(str(path))))
    monkeypatch.setattr("engine.data.rows.ARRAY_BYTES", 4)
    with pytest.raises(DataError, match="more than 4 bytes; write JSON lines"):
        list(read_rows(DataSource(str(path))))
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert len(list(read_rows(DataSource(str(path))))) == 2


def test_a_first_line_that_only_marks_the_order_of_bytes_is_blank(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'\n{"n": 1}\n')
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"n": 1}\n')
    for name, line in (("a", 2), ("b", 1)):
        rows = list(read_rows(DataSource(str(tmp_path / f"{name}.jsonl"))))
        assert [(row.where, row.columns) for row in rows] == [(f"{tmp_path}/{name}.jsonl:{line}", {"n": 1})]


@pytest.mark.parametrize("name", ["DatasetGenerationError", "DataFilesNotFoundError", "DatasetNotFoundError"])
def test_errors_of_the_hub_are_messages(monkeypatch, name) -> None:
    def refuses(*_, **__):
        raise getattr(datasets.exceptions, name)("nothing there")

    monkeypatch.setattr(datasets, "load_dataset", refuses)
    with pytest.raises(DataError, match=r"org/set: cannot be loaded from the hub \(nothing there\)"):
        list(read_rows(DataSource("org/set")))


def test_files_that_were_joined_with_their_marks(tmp_path: Path) -> None:
    one = codecs.BOM_UTF8 + b'{"n": 1}\n'
    (tmp_path / "a.jsonl").write_bytes(one + one)
    assert [row.columns for row in read_rows(DataSource(str(tmp_path / "a.jsonl")))] == [{"n": 1}] * 2


def test_a_row_over_several_lines_is_told_what_is_wanted(tmp_path: Path) -> None:
    for text in ('[\n{"n": 1}]\n', '{\n"n": 1\n}\n'):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(DataError, match="a.jsonl:1: not JSON: .*; want an object a line"):
            collect([str(tmp_path / "a.jsonl")], columns)


def test_a_source_that_is_none_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data source: got \{'path': 'a'\}; want a path or DataSource"):
        collect([{"path": "a"}], columns)  # type: ignore[list-item]
