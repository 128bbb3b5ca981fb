"""Checkpoints in the background: training waits for the copy, one is in flight, errors surface at the next call."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, OutputError
from engine.run import checkpoint
from engine.run.checkpoint import load
from engine.run.saver import Saver


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is open."""
    opened = threading.Event()
    write = checkpoint.save_file

    def held(*arguments, **options):
        assert opened.wait(20)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", held)
    yield opened
    opened.set()


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, gate):
    weight = torch.arange(6.0).view(2, 3)
    saver = Saver(tmp_path, keep=2)
    saver.save(1, {"model": {"w": weight, "turned": weight.T}}, {"x": 1}, interim=False)
    assert list(tmp_path.glob("checkpoint-*")) == []  # save came back before anything was written
    weight += 100.0  # training goes on
    saver.check()
    gate.set()
    saver.wait()
    found = load(tmp_path / "checkpoint-1").tensors["model"]
    assert found["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert torch.equal(found["turned"], found["w"].T)


def test_at_most_one_is_in_flight(tmp_path, gate):
    saver = Saver(tmp_path, keep=3)
    saver.save(1, {"model": {"w": torch.ones(2)}}, {}, interim=False)
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    began = time.monotonic()
    saver.save(2, {"model": {"w": torch.ones(2)}}, {}, interim=False)
    assert time.monotonic() - began > 0.15
    saver.wait()
    first, second = saver.finished()
    assert [s.path.name for s in (first, second)] == ["checkpoint-1", "checkpoint-2"]
    assert second.waited > 0.15 > first.waited and first.wrote > 0.15
    assert saver.finished() == []
    metrics = second.metrics()
    assert (
        metrics["perf/checkpoint_gb"] == sum(p.stat().st_size for p in second.path.iterdir()) / 1e9
    )
    assert metrics["timing/checkpoint_wait"] == second.waited


@pytest.mark.parametrize("call", ["check", "wait", "save"])
def test_an_error_surfaces_at_the_next_call_and_only_once(tmp_path, monkeypatch, call):
    saver = Saver(tmp_path, keep=1)
    saver.save(1, {"model": {"w": torch.ones(2)}}, {}, interim=False)
    saver.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        saver.save(2, {"model": {"w": torch.ones(2)}}, {}, interim=False)
        saver._thread.join()
    calls = {
        "check": saver.check,
        "wait": saver.wait,
        "save": lambda: saver.save(3, {"model": {}}, {}, interim=False),
    }
    with pytest.raises(OutputError, match=r"checkpoint-2.*No space left.*newest checkpoint"):
        calls[call]()
    saver.check()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_mistake_of_the_caller_surfaces_too(tmp_path):
    saver = Saver(tmp_path, keep=1)
    saver.save(1, {"model": {}}, {"kl": float("nan")}, interim=False)
    with pytest.raises(CheckpointError, match="finite"):
        saver.wait()


def test_an_interim_one_goes_with_the_next_and_counts_for_none(tmp_path):
    saver = Saver(tmp_path, keep=2)
    for step, interim in ((2, False), (4, False), (5, True), (6, False)):
        saver.save(step, {"model": {"w": torch.ones(2)}}, {}, interim)
        saver.wait()
        if step == 5:
            assert {p.name for p in tmp_path.iterdir()} == {
                "checkpoint-2",
                "checkpoint-4",
                "checkpoint-5",
            }
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_an_interim_one_is_never_the_reason_that_a_good_one_goes(tmp_path):
    saver = Saver(tmp_path, keep=1)
    for step, interim in ((3, False), (4, True), (5, True)):
        saver.save(step, {"model": {"w": torch.ones(2)}}, {}, interim)
        saver.wait()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-5"}


def test_every_file_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """Files, the manifest last of them, their folder; then the one rename, and the folder above it."""
    done = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_sync(descriptor)

    def rename(self, target):
        done.append(f"rename to {Path(target).name}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    checkpoint.save(tmp_path, 3, {"model": {"w": torch.ones(1)}}, {"x": 1}, keep=1)
    aside = f".tmp-checkpoint-3-{os.getpid()}"
    names = ["model.safetensors", "state.json", "manifest.json", aside]
    assert done == [
        *(f"sync {n}" for n in names),
        "rename to checkpoint-3",
        f"sync {tmp_path.name}",
    ]
