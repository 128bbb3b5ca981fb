"""Commands with an output that cannot be written: one line and exit code 1, before the work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engine import report, sample
from engine.data import __main__ as data
from engine.demo import __main__ as demo
from engine.demo import model as demo_model
from engine.hybrid import HybridEngine
from engine.run import files


class Worked(Exception):
    """Stands for the work, which must not begin."""


@pytest.fixture
def no_work(monkeypatch):
    def work(*_, **__):
        raise Worked

    monkeypatch.setattr(HybridEngine, "from_pretrained", work)
    monkeypatch.setattr(report, "render", work)
    monkeypatch.setattr(data, "read_prompts", work)
    monkeypatch.setattr(demo_model, "prepare", work)
    monkeypatch.setattr(demo, "run", work)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    records = [{"step": step, "time": float(step), "loss": 1.0 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def command(name: str, output: Path, run_folder: Path) -> int:
    """The exit code of a command that would write to `output`."""
    if name == "sample":
        argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output", str(output)]
        return sample.main(argv)
    if name == "report":
        return report.main([str(run_folder), "--output", str(output)])
    if name == "data":
        return data.main(["prepare", "--input", "p", "--tokenizer", "t", "--output", str(output)])
    if name == "demo model":
        return demo.main(["model", "--output", str(output)])
    if name == "demo run":
        return demo.main(["run", "--output_dir", str(output)])
    return demo.main(["run", "--output_dir", str(run_folder), "--results", str(output)])


FILES, FOLDERS = ("sample", "report", "demo results"), ("data", "demo model", "demo run")


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("below", [False, True])
def test_an_output_that_cannot_be_is_said_before_the_work(
    name, below, run_folder, tmp_path, no_work, capsys
):
    """A folder where a file is to be, or a file where a folder is, itself or above it."""
    wanted = "file to write" if name in FILES else "want a folder"
    there = run_folder if name in FILES else run_folder / "metrics.jsonl"
    if below:
        there, wanted = run_folder / "metrics.jsonl" / "deep" / "out", "is a file, no folder"
    before = sorted(tmp_path.rglob("*"))
    assert command(name, there, run_folder) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(there) in said[0] and wanted in said[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_the_disk_refuses_is_one_line(name, run_folder, tmp_path, no_work, capsys):
    assert command(name, tmp_path / ("x" * 300), run_folder) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "File name too long" in said[0]


@pytest.mark.parametrize("file", ["train.jsonl", "validation.jsonl", "statistics.json"])
def test_splits_that_are_there_are_not_prepared_again(file, tmp_path, no_work, run_folder, capsys):
    (tmp_path / file).write_text("")
    assert command("data", tmp_path, run_folder) == 1
    assert f"{file}: is there already; give another --output" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("deep", [False, True])
def test_an_output_that_can_be_is_none_of_it(name, deep, run_folder, tmp_path, no_work):
    with pytest.raises(Worked):
        command(name, tmp_path / ("deep/new/out" if deep else "out"), run_folder)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_home_that_no_shell_has_put_in_is_refused(name, run_folder, no_work, capsys):
    assert command(name, Path("~/out"), run_folder) == 1
    assert "got '~/out', want a whole path" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_place_that_may_not_be_written_to_is_named(name, run_folder, tmp_path, no_work, monkeypatch, capsys):
    """Told by the system here, since who runs the tests may be allowed everything."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))
    assert command(name, tmp_path / "deep" / "out", run_folder) == 1
    assert f"but {tmp_path} cannot be written to" in capsys.readouterr().err
