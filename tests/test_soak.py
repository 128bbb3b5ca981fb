"""The soak on a handful of iterations, through its front door; and that each of its verdicts can be the other one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.soak import SoakError, faults, play, system, verdict
from bench.soak.__main__ import main, parsed, told
from bench.soak.setting import MARK, Setting
from bench.soak.start import Start, last_step, newest
from bench.soak.system import Sample
from engine.run import checkpoint


def test_a_short_one_passes(tmp_path, capsys):
    """Killed, its newest checkpoint damaged, started again: the bytes of the undisturbed run."""
    results, folder = tmp_path / "results", tmp_path / "soak"
    words = ["--iterations", "8", "--faults", "damaged checkpoint"]
    assert main([*words, "--output_dir", str(folder), "--results", str(results)]) == 0, capsys.readouterr()
    (path,) = results.iterdir()
    found = json.loads(path.read_text())
    assert path.read_text() == (folder / "soak.json").read_text() and len(list(folder.iterdir())) == 1
    assert found["verdict"] == "passed" and found["iterations"] == 8
    assert found["starts"] == sum(found["ends"].values()) >= 4 and found["ends"]["signal 9"] >= 2
    assert found["faults"]["damaged checkpoint"] >= 1
    assert {"commit", "torch"} <= set(found["versions"]) and found["machine"]["cores"] >= 1
    said = capsys.readouterr().out
    assert told(found) in said and "slope" in said


class Placed:
    """What a start looks like to the verdicts, without one."""

    def __init__(self, folder: Path, *events: str) -> None:
        self.came_from, self.base = newest(folder)
        self.log, self.metrics, self.said = folder / "log", folder / "metrics.jsonl", events
        self.log.write_text("")

    def events(self) -> list[str]:
        return list(self.said)

    def printed(self) -> str:
        return self.log.read_text()

    def step(self) -> int:
        return last_step(self.metrics)


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"policy": {"w": torch.ones(3)}}, {"step": step}, keep=9)


def a_run(folder: Path, loss: float = 1.0) -> Path:
    saved(folder, 2, 4)
    (folder / "model.safetensors").write_bytes(b"weights")
    lines = [{"step": i, "time": time.time(), "timing/x": time.time(), "loss": loss} for i in (1, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_other_bytes_are_refused(tmp_path):
    ours, whole = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    verdict.same_bytes(ours, whole)
    (ours / "model.safetensors").write_bytes(b"weight!")
    with pytest.raises(SoakError, match="not the bytes .*model.safetensors: differs"):
        verdict.same_bytes(ours, whole)
    with pytest.raises(SoakError, match="metrics.jsonl: differs"):
        verdict.same_bytes(a_run(tmp_path / "c", loss=1.0 + 1e-16 * 2), a_run(tmp_path / "d", loss=1.0 + 1e-15))
    (tmp_path / "d" / ".tmp-left").write_text("")
    with pytest.raises(SoakError, match=r"\.tmp-left: only in"):
        verdict.same_bytes(tmp_path / "d", whole)


def test_memory_that_rises_is_refused():
    steps, rng = range(1, 10_001), random.Random(0)
    flat = verdict.course(steps, [400 + rng.random() for _ in steps])
    assert abs(flat.per_1000) < 0.1 and flat.iterations == 7999
    verdict.memory_is_flat("peak memory", flat)
    warming = verdict.course(steps, [400.0 if step > 1000 else 300 + step / 10 for step in steps])
    assert abs(warming.per_1000) < 1e-6
    leak = verdict.course(steps, [400 + 0.004 * step for step in steps])  # four kilobytes an iteration
    with pytest.raises(SoakError, match=r"peak memory rises by 4 MB per 1,000 iterations, 32 MB over 7999"):
        verdict.memory_is_flat("peak memory", leak)
    with pytest.raises(SoakError, match="want 3 or more"):
        verdict.course([1, 2], [1.0, 1.0])


def test_files_and_threads_that_grow_are_refused():
    def samples(files: float, threads: float) -> list[Sample]:
        return [Sample(i, 1, 1, 9 + round(i * files), 3 + round(i * threads), 1) for i in range(100)]

    busy = [Sample(i, 1, 1, 9 + i % 3, 3 + i % 2, 1) for i in range(8)]
    assert verdict.counts_are_flat(busy) == {"open files": (9, 9), "threads": (3, 3)}
    assert verdict.counts_are_flat(samples(0, 0)) == {"open files": (9, 9), "threads": (3, 3)}
    with pytest.raises(SoakError, match="open files: "):
        verdict.counts_are_flat(samples(0.1, 0))
    with pytest.raises(SoakError, match="threads: "):
        verdict.counts_are_flat(samples(0, 0.1))


def test_what_is_left_behind_is_refused(tmp_path, monkeypatch):
    verdict.no_temporary_files(tmp_path)
    (tmp_path / "tmpabc").write_text("")
    with pytest.raises(SoakError, match="tmpabc"):
        verdict.no_temporary_files(tmp_path)
    monkeypatch.setattr(system, "SHARED", tmp_path)
    before = system.shared_memory()
    verdict.no_shared_memory(before)
    segment = tmp_path / "torch_1_2"
    segment.write_text("")
    with pytest.raises(SoakError, match="shared memory is left: .*torch_1_2"):
        verdict.no_shared_memory(before)
    with segment.open():  # somebody's who lives
        verdict.no_shared_memory(before)


def test_a_process_that_outlives_its_run_is_refused():
    verdict.no_processes("a mark")
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, MARK: "a mark"},
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(SoakError, match=f"outlive the run .*process {child.pid} "):
            verdict.no_processes("a mark", looks=1)
        sample = system.sample(child.pid, 7)
        assert sample is not None and sample.resident > 1 and sample.files >= 3 and sample.threads == 1
    verdict.no_processes("a mark")
    assert system.sample(child.pid, 7) is None


def test_a_start_that_went_on_from_elsewhere_is_refused(tmp_path):
    saved(tmp_path, 2, 4)
    verdict.went_on_from(Placed(tmp_path, f"going on from {tmp_path}/checkpoint-4"), None)
    verdict.went_on_from(Placed(tmp_path), None)  # killed before it could say so
    with pytest.raises(SoakError, match="checkpoint-2'"):
        verdict.went_on_from(Placed(tmp_path, f"going on from {tmp_path}/checkpoint-2"), None)
    with pytest.raises(SoakError, match="no event says that it is passed over"):
        verdict.went_on_from(
            Placed(tmp_path, f"going on from {tmp_path}/checkpoint-4"), tmp_path / "checkpoint-6"
        )


def a_play(tmp_path: Path, iterations: int = 100) -> play.Play:
    setting = Setting(tmp_path, iterations, 2, 0)
    return play.Play(setting, tmp_path / "run", faults.FAULTS, 3, None, 1.0, 0.1)


def by_name(name: str) -> faults.Fault:
    return next(fault for fault in faults.FAULTS if fault.name == name)


def test_ends_that_are_not_as_documented_are_refused(tmp_path):
    found = a_play(tmp_path)
    start = Placed(a_run(found.out))
    with pytest.raises(SoakError, match="SIGTERM: ended with 1, want 3"):
        found.expect(by_name("SIGTERM"), start, 1)
    with pytest.raises(SoakError, match="exit code 0 at iteration 4, not done"):
        found.expect(by_name("SIGKILL"), start, 0)
    with pytest.raises(SoakError, match="does not say 'No space"):
        found.expect(by_name("disk full"), start, 1)
    start.log.write_text("cannot be written (No space left on device)")
    found.expect(by_name("disk full"), start, 1)
    found.expect(by_name("disk full"), start, -9)
    assert found.counts == {"disk full, did not come": 1}
    start.log.write_text("stopped; go on with --resume_from_checkpoint true")
    found.expect(by_name("SIGTERM"), start, 3)
    (found.out / "checkpoint-4" / "manifest.json").unlink()
    with pytest.raises(SoakError, match="iteration 4 is on record, but the newest checkpoint is .*checkpoint-2"):
        found.expect(by_name("SIGTERM"), start, 3)


class Told(Setting):
    """Of a start that says what it does with Ctrl-C."""

    def words(self, out: Path, flags: tuple[str, ...] = ()) -> list[str]:
        return [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT))"]


def test_a_start_does_not_ignore_what_its_shell_ignores(tmp_path):
    (tmp_path / "logs").mkdir()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Start(Told(tmp_path, 10, 2, 0), tmp_path / "run", 1) as start:
            assert start.process.wait() == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in start.log.read_text()


@pytest.mark.parametrize("ends", [True, False])
def test_a_signal_that_is_lost_is_refused(ends, tmp_path):
    sent: list[int] = []
    start = SimpleNamespace(base=4, log=tmp_path, send=sent.append, wait_until=lambda step: step == 15 and not ends)
    stage = SimpleNamespace(rng=random.Random(0), start_s=0.0, pace=3)
    with nullcontext() if ends else pytest.raises(SoakError, match="SIG(TERM|INT) goes on and on"):
        faults.early_signal(stage, start)
    assert len(sent) == 1


def test_damage_that_nobody_did_is_refused(tmp_path):
    found = a_play(tmp_path)
    found.setting.write()
    start = Placed(a_run(found.out))
    found.after(start, 3, faults.Plan())
    (found.out / "checkpoint-2" / "state.json").unlink()
    with pytest.raises(SoakError, match="after exit code 3 checkpoints are damaged: .*state.json"):
        found.after(start, 3, faults.Plan())
    found.after(start, -9, faults.Plan())  # killed while it was removing one
    found.after(start, 3, faults.Plan())


@pytest.mark.parametrize("seed", range(8))
def test_damage_is_of_the_newest_and_leaves_one(tmp_path, seed):
    stage = SimpleNamespace(out=tmp_path, rng=random.Random(seed), setting=Setting(tmp_path, 100, 2, 0))
    saved(tmp_path, 2)
    assert faults.damage(stage) is None  # the only one
    saved(tmp_path, 4)
    assert faults.damage(stage).damaged == tmp_path / "checkpoint-4"
    assert newest(tmp_path) == (tmp_path / "checkpoint-2", 2)
    assert faults.damage(stage) is None
    saved(tmp_path, 4, 98)
    assert faults.damage(stage) is None  # too late to write it again


def test_the_pace_makes_up_for_time():
    """1,000 iterations of 0.1 s in 400 s, with starts of 5 s that lose 3: 20 starts that last 70 iterations..."""
    pace = play.aimed_pace(1000, 400, 5, 0.1, 3)
    assert 1000 / (pace - 3) * (5 + pace * 0.1) == pytest.approx(400)
    assert play.aimed_pace(1000, 90, 5, 0.1, 3) == float("inf")


def test_flags_and_folders(tmp_path, capsys):
    assert parsed([]).minutes == 60 and len(parsed([]).faults) == len(faults.FAULTS) + 1 == 15
    (tmp_path / "mine").write_text("")
    for words in (["--output_dir", str(tmp_path)], ["--minutes", "0"], ["--iterations", "1"]):
        with pytest.raises(SystemExit):
            parsed(words)
    assert "is not empty" in capsys.readouterr().err


def test_every_point_of_a_kill_is_tried_or_named():
    from killing import POINTS

    assert {*faults.RARE, *faults.OFTEN, "while the model is written"} == {*POINTS}
