"""torchrun: a process that dies ends all, elastic restart goes on by itself, what is left resumes on one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run.test_distributed_stages import COMMON, assert_same_trajectory, assert_same_weights
from several_processes import ROOT, environment, flags, train
from small_engines import save_tiny
from stages.tiny_data import write_all

from engine.run import checkpoint

MINUTE = 60.0


def workers(parent: int) -> dict[int, int]:
    """rank -> process id of the children of torchrun."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            settings = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        rank = next((s for s in settings if s.startswith(b"RANK=")), None)
        if int(fields[1]) == parent and fields[0] != "Z" and rank is not None:
            found[int(rank[5:])] = int(entry.name)
    return found


def wait_until(condition, process: subprocess.Popen[str], seconds: float = MINUTE):
    """What the condition gives once it is true; the run must live as long."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return value


def newest(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in checkpoint.kept(folder)), default=0)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("faults")
    data = write_all(folder)
    common = {
        **COMMON, "model_name_or_path": str(save_tiny("llama", folder / "model")), "dataset_name": data["sft"],
        "per_device_train_batch_size": 2, "num_train_epochs": 3, "save_steps": 1, "learning_rate": 3e-3,
    }  # fmt: skip
    return {name: {**common, "output_dir": str(folder / name)} for name in ("one", "killed")}


def test_killed_twice_then_finished_by_one(configs):
    train("sft", configs["one"])
    config, folder = configs["killed"], Path(configs["killed"]["output_dir"])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1",
        "-m", "engine.train", "--stage", "sft", *flags(config), "--resume_from_checkpoint", "true",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)
    wait_until(lambda: newest(folder) >= 2, run)
    first = workers(run.pid)
    assert sorted(first) == [0, 1]
    os.kill(first[1], signal.SIGKILL)
    wait_until(lambda: set(workers(run.pid).values()).isdisjoint(first.values()) and workers(run.pid), run)
    reached = newest(folder)
    wait_until(lambda: newest(folder) > reached, run)  # it goes on by itself, within a minute

    second = workers(run.pid)
    os.kill(second[0], signal.SIGKILL)
    output, _ = run.communicate(timeout=MINUTE)
    assert run.returncode not in (0, None), output
    assert f"going on from {folder}" in (folder / "events.jsonl").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*first.values(), *second.values()))

    left = newest(folder)
    assert 0 < left < 18 and checkpoint.latest(folder) is not None
    train("sft", {**config, "resume_from_checkpoint": "true"})
    assert_same_trajectory(folder, Path(configs["one"]["output_dir"]))
    assert_same_weights(folder, Path(configs["one"]["output_dir"]))
