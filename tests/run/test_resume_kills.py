"""A run that is killed again and again, at named and at random moments, ends with the bytes of an undisturbed one."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from killing import POINTS, Victims
from same_run import assert_same
from small_engines import save_tiny
from stages.tiny_data import write_all

from engine.run.files import folder_lock

KILLS = 24
STAGES = ("sft", "rm", "ppo")


@pytest.fixture(scope="module")
def victims():
    with Victims() as found:
        yield found


@pytest.fixture(scope="module")
def setting(tmp_path_factory, victims) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("kills")
    save_tiny("llama", folder / "model")
    found = {"model": str(folder / "model"), "folder": str(folder), **write_all(folder)}
    assert victims.run(argv("rm", found, folder / "rm"), folder / "rm.log") == 0
    return found | {"rm": str(folder / "rm")}


@pytest.fixture(scope="module")
def whole(setting, victims):
    """The undisturbed run of each stage, and the seconds it took."""
    found = {}

    def of(stage: str) -> tuple[Path, float]:
        if stage not in found:
            out = Path(setting["folder"]) / f"whole-{stage}"
            began = time.monotonic()
            assert victims.run(argv(stage, setting, out), out.with_suffix(".log")) == 0
            found[stage] = out, time.monotonic() - began
        return found[stage]

    return of


def options(stage: str, setting: dict[str, str]) -> dict[str, object]:
    """A short run that validates and saves on the way and rotates."""
    more: dict[str, object] = {
        "max_length": 80,
        "threads": 1,
        "dtype": "float32",
        "progress": False,
    }
    more |= {"model_name_or_path": setting["model"], "resume_from_checkpoint": "true"}
    if stage == "ppo":
        return more | {
            "reward_model_path": setting["rm"], "dataset_name": setting["prompts"], "total_episodes": 20,
            "batch_size": 4, "num_mini_batches": 2, "response_length": 5, "eval_steps": 2, "save_steps": 2,
            "eval_dataset_name": setting["prompts"], "eval_num_prompts": 2, "ptx_dataset_name": setting["text"],
            "ptx_per_episode": 0.5, "ptx_length": 24, "kl_target": 1.0, "save_samples": 2,
        }  # fmt: skip
    more |= {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "eval_fraction": 0.2,
        "save_steps": 2,
    }
    data = {"dataset_name": setting["sft" if stage == "sft" else "rankings"]}
    if stage == "sft":
        data |= {"residual_dropout": 0.2, "select_by_reward_model": setting["rm"]}
        data |= {"select_num_prompts": 2, "select_response_length": 4}
    return more | data


def argv(stage: str, setting: dict[str, str], out: Path, **more: object) -> list[str]:
    values = options(stage, setting) | {"output_dir": str(out)} | more
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.name}.yaml")
    file.write_text(yaml.safe_dump(values))
    return ["--stage", stage, "--config", str(file)]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed(stage, setting, whole, victims, tmp_path):
    """At least KILLS times, half of them at named points, half after a random time; some runs are killed many times."""
    undisturbed, seconds = whole(stage)
    rng = random.Random(f"{stage} 0")
    points = [*POINTS]
    rng.shuffle(points)
    seen: list[str] = []
    killed = attempt = 0
    out = tmp_path / "run-0"
    while killed < KILLS or out.exists():
        kill: dict[str, object] = {"signal": int(signal.SIGKILL)}
        if killed >= KILLS:
            kill = {}
        elif attempt % 2:
            kill["after_s"] = rng.uniform(0.3 * seconds, seconds)
        else:
            point = points[attempt // 2 % len(points)]
            kill |= {"point": point, "count": rng.choice([1, 1, 2, 3, 5, 8])}
        attempt += 1
        code = victims.run(argv(stage, setting, out), tmp_path / "log", **kill)
        if code == -signal.SIGKILL:
            killed += 1
            seen.append(str(kill.get("point", "time")))
            continue
        assert code == 0, (tmp_path / "log").read_text()[-3000:]
        assert_same(out, undisturbed)
        out = tmp_path / f"run-{attempt}"
        if killed >= KILLS:
            break
    assert "time" in seen and len(set(seen)) > 5, seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_asked_to_stop_saves_first(stage, number, setting, whole, victims, tmp_path):
    """In the middle of a step: the step is finished and saved, exit code 3; gone on with, it ends like the whole run,
    with the same checkpoints kept."""
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = argv(stage, setting, out)
    count = 15 if stage == "ppo" else 5  # in the third iteration, in the fifth step
    kill = {"point": "before a backward pass", "count": count, "signal": int(number)}
    assert victims.run(arguments, log, **kill) == 3, log.read_text()[-3000:]
    assert "--resume_from_checkpoint true" in log.read_text()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    saved = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert saved == max(steps) and saved % 2 == 1  # beside the schedule
    assert not (out / "model.safetensors").exists()
    assert victims.run(arguments, log) == 0, log.read_text()[-3000:]
    assert_same(out, whole(stage)[0])


def test_another_number_of_threads_gives_the_same_samples(setting, whole, victims, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    kill = {"point": "before an optimizer step", "count": 5, "signal": int(signal.SIGTERM)}
    assert victims.run(argv("ppo", setting, out), log, **kill) == 3
    assert victims.run(argv("ppo", setting, out, threads=2), log) == 0, log.read_text()[-3000:]
    undisturbed = whole("ppo")[0]
    for path in sorted((undisturbed / "samples").iterdir()):
        ours, theirs = (
            [json.loads(line)["tokens"] for line in p.read_text().splitlines()]
            for p in (out / "samples" / path.name, path)
        )
        assert ours == theirs, path.name
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, undisturbed)
    )
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if "loss/policy_avg" in a:
            assert a["loss/value_avg"] == pytest.approx(b["loss/value_avg"], rel=1e-4)


def test_two_runs_in_one_folder(setting, victims, tmp_path):
    """The second one is refused and touches nothing; the lock goes with a kill."""
    out, log = tmp_path / "run", tmp_path / "log"
    with folder_lock(make(out)):
        before = {path: path.read_bytes() for path in out.iterdir()}
        assert victims.run(argv("sft", setting, out), log) == 1
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert "another run writes to" in log.read_text() and str(os.getpid()) in log.read_text()
    kill = {"point": "before a save", "count": 1, "signal": int(signal.SIGKILL)}
    assert victims.run(argv("sft", setting, out), log, **kill) == -signal.SIGKILL
    assert victims.run(argv("sft", setting, out), log) == 0


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
