"""A disk that is full, or a folder that refuses, at each write of a run: one clear error, nothing half-written,
nothing lost."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import pytest
from full_disk import FullDisk
from run import faulty
from same_run import timeless

import engine
from engine.errors import OutputError
from engine.run import checkpoint
from engine.train import main

DISK = FullDisk()


@pytest.fixture
def disk(monkeypatch):
    DISK.unannounced(monkeypatch.setattr)
    yield DISK
    DISK.folder = ""


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("disk"))


sft = partial(faulty.sft, per_device_train_batch_size=6, max_steps=2)


def records(folder: Path) -> list[dict]:
    return [timeless(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_full_at_each_write(setting, tmp_path, disk):
    """One write after the other fails. Each time: our error, no file that is half there, and a resume that ends like
    a run on a disk with room."""
    engine.train_sft(sft(setting, tmp_path / "whole"))
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    writes, failed = 0, 0
    while True:
        out = tmp_path / f"run-{writes}"
        config = sft(setting, out)
        disk.folder, disk.left = str(out), writes
        try:
            engine.train_sft(config)
            done = True
        except OutputError as error:
            assert "No space left on device" in str(error) and str(out) in str(error)
            done = False
        finally:
            disk.folder = ""
        if done:
            break
        failed += 1
        for path in checkpoint.kept(out):
            checkpoint.verify(path)
        if out.exists():
            assert not list(out.glob(".tmp-*"))
            for line in (
                (out / "metrics.jsonl").read_text().splitlines()
                if (out / "metrics.jsonl").exists()
                else ()
            ):
                json.loads(line)
        if writes % 3 == 0:
            engine.train_sft(dataclasses.replace(config, resume_from_checkpoint="true"))
            assert (out / "model.safetensors").read_bytes() == whole
            assert records(out) == records(tmp_path / "whole")
        writes += 1
    assert failed > 30


def test_a_folder_that_refuses(setting, tmp_path, capsys):
    """A file stands where the folder should be; through the command line it is one message and exit code 1."""
    (tmp_path / "run").write_text("not a folder")
    assert main(faulty.sft_words(setting, tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "cannot be written (File exists)" in said and "Traceback" not in said
    assert (tmp_path / "run").read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(setting, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        engine.train_sft(sft(setting, tmp_path / "run"))


def test_a_clock_that_goes_backwards(setting, tmp_path, monkeypatch):
    """Nothing but the records' own times reads the clock: the run and its resume end with the same bytes."""
    engine.train_sft(sft(setting, tmp_path / "whole"))
    import time

    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    out = tmp_path / "run"
    engine.train_sft(sft(setting, out, max_steps=2, save_total_limit=5))
    config = sft(setting, out, save_total_limit=5)
    engine.train_sft(dataclasses.replace(config, resume_from_checkpoint=str(out / "checkpoint-1")))
    assert records(out) == records(tmp_path / "whole")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    times = [json.loads(x)["time"] for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times, reverse=True) and len(set(times)) > 1
