"""What a run of one process guarantees, over two: damaged shards, skipped steps, stops, refusals, the lock."""

import json
import time
from pathlib import Path

import pytest
from run.test_distributed_stages import COMMON
from several_processes import ROOT, finish, flags, run_jobs, start
from small_engines import save_tiny
from stages.tiny_data import write_all

WAIT = 600.0  # a machine may be busy


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("guarantees")
    return {"model": str(save_tiny("llama", folder / "model")), **write_all(folder, count=7)}


def sft_config(setting: dict[str, str], out: Path) -> dict:
    return {
        **COMMON, "model_name_or_path": setting["model"], "output_dir": str(out), "dataset_name": setting["sft"],
        "per_device_train_batch_size": 4, "num_train_epochs": 9, "learning_rate": 3e-3, "micro_batch_tokens": 60,
        "save_steps": 100,
    }  # fmt: skip


def ppo_config(setting: dict[str, str], out: Path) -> dict:
    return {
        **COMMON, "model_name_or_path": setting["model"], "output_dir": str(out), "dataset_name": setting["prompts"],
        "max_length": 60, "total_episodes": 12, "batch_size": 4, "num_mini_batches": 2, "response_length": 6,
        "micro_batch_tokens": 60,
    }  # fmt: skip


# Together, since a start of two processes takes longer than what most of these do.
@pytest.mark.parametrize(
    "checks",
    [
        ("a_damaged_shard", "a_bad_gradient", "bad_losses", "a_stop", "from_an_earlier_checkpoint"),
        ("a_full_disk", "writing_beside_training", "another_config", "the_same_choice", "a_reward_that_fails"),
    ],
    ids=["faults", "folders"],
)
def test_of_a_run(checks, setting, tmp_path):
    jobs = []
    for check in checks:
        config = sft_config(setting, tmp_path / check)
        if check == "the_same_choice":
            config["micro_batch_tokens"] = None
        if check != "a_reward_that_fails":
            jobs.append((f"run.rank_faults:{check}", {"config": config}))
            continue
        for how in ("raises", "hangs"):
            jobs.append((f"run.rank_faults:{check}", {"config": ppo_config(setting, tmp_path / how), "how": how}))
    run_jobs(2, jobs, tmp_path)


def test_two_runs_in_one_folder(setting, tmp_path):
    """The second ends, on all ranks, with a message; the first goes on."""
    config, file, jobs = sft_config(setting, tmp_path / "run"), tmp_path / "go on", tmp_path / "jobs.json"
    jobs.write_text(json.dumps([("run.rank_faults:until", {"config": config, "file": str(file)})]))
    first = start(2, [str(ROOT / "tests" / "several_processes.py"), str(jobs)])
    try:
        ended = time.monotonic() + WAIT
        while not (tmp_path / "run" / "config.yaml").exists() and time.monotonic() < ended:
            assert all(process.poll() is None for process in first)
            time.sleep(0.1)
        second = start(2, ["-m", "engine.train", "--stage", "sft", *flags(config)])
        said = [process.communicate(timeout=WAIT)[0] for process in second]
        assert [process.returncode for process in second] == [1, 1], said
        assert all("another run writes to" in text and "Traceback" not in text for text in said), said
    finally:
        file.touch()
        finish(first)
