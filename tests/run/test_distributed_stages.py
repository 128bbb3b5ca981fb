"""SFT, reward model and PPO over 2 and 4 processes: the trajectory of one process, the same tokens; 2 -> 4 -> 1.

Started once with 2 and once with 4 processes, for all that is checked about them. float32, so that what differs is the
order of sums alone.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_processes import flags, run_jobs, start, train
from small_engines import save_tiny
from stages.tiny_data import write_all
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.run import checkpoint
from engine.run.sharded_checkpoint import is_sharded_checkpoint

COMMON = {"threads": 1, "progress": False, "dtype": "float32", "max_length": 80}
TIMES = ("timing/", "perf/")
REWARDS = [{"source": "several_processes:reward_of_length"}]


class Setting:
    """Models, data, and the configs of the runs that are compared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_tiny("llama", folder / "model")
        self.data = write_all(folder, count=7)
        self.sft("one")
        self.rm("one")
        self.reward = folder / "one" / "rm"

    def _base(self, out: str, stage: str) -> dict:
        return {"model_name_or_path": str(self.model), "output_dir": str(self.folder / out / stage), **COMMON}

    def sft_config(self, out: str) -> dict:
        return {
            **self._base(out, "sft"), "dataset_name": self.data["sft"], "eval_dataset_name": self.data["sft"],
            "per_device_train_batch_size": 5, "num_train_epochs": 2, "learning_rate": 3e-3, "micro_batch_tokens": 30,
            "residual_dropout": 0.2, "ptx_dataset_name": self.data["text"], "ptx_fraction": 0.2, "ptx_length": 24,
        }  # fmt: skip

    def rm_config(self, out: str) -> dict:
        return {
            **self._base(out, "rm"), "dataset_name": self.data["rankings"], "eval_dataset_name": self.data["rankings"],
            "demonstrations_name": self.data["sft"], "per_device_train_batch_size": 5, "learning_rate": 3e-3,
            "micro_batch_tokens": 60,
        }  # fmt: skip

    def selection_config(self, out: str) -> dict:
        return {
            **self._base(out, "selection"), "dataset_name": self.data["sft"], "eval_dataset_name": self.data["sft"],
            "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 3e-3,
            "select_by_reward_model": str(self.reward), "select_num_prompts": 3, "select_response_length": 6,
        }  # fmt: skip

    def ppo_config(self, out: str) -> dict:
        return {
            **self._base(out, "ppo"), "max_length": 60, "dataset_name": self.data["prompts"],
            "eval_dataset_name": self.data["prompts"], "eval_num_prompts": 3, "ptx_dataset_name": self.data["text"],
            "eval_ptx_dataset_name": self.data["text"], "ptx_coef": 2.0, "ptx_per_episode": 0.5, "ptx_length": 32,
            "reward_model_path": str(self.reward), "rewards": REWARDS,
            "total_episodes": 24, "batch_size": 8, "num_samples": 2, "num_mini_batches": 2, "response_length": 8,
            "learning_rate": 1e-3, "micro_batch_tokens": 50, "save_steps": 1, "kl_target": 1.0,
            "whiten_rewards": True,
        }  # fmt: skip

    def sft(self, out: str) -> None:
        train("sft", self.sft_config(out))

    def rm(self, out: str) -> None:
        train("rm", self.rm_config(out))


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def runs(setting) -> Setting:
    """one/: one process. two/ and four/: so many. ppo of moved/: iteration 1 by 2, 2 by 4 as 2 x 2, 3 by 1."""
    train("ppo", setting.ppo_config("one"))
    train("sft", setting.selection_config("one"))
    moved = setting.ppo_config("moved")
    resumed = {**moved, "resume_from_checkpoint": "true"}
    checks = [("run.rank_checks:talk", {}), ("run.rank_checks:score_head", {"folder": str(setting.model)})]
    checks += [("run.rank_checks:modes", {"folder": str(setting.model)})]
    checks += [
        ("run.rank_checks:weights", {"folder": str(setting.model), "dtype": dtype, "replicate": 1})
        for dtype in ("float32", "bfloat16")
    ]
    two = [
        *checks,
        ("sft", {"config": setting.sft_config("two")}),
        ("rm", {"config": setting.rm_config("two")}),
        ("sft", {"config": setting.selection_config("two")}),
        ("ppo", {"config": moved, "saves": 1}),
    ]
    run_jobs(2, two, setting.folder)
    four = [
        ("run.rank_checks:weights", {"folder": str(setting.model), "dtype": "bfloat16", "replicate": 2}),
        ("ppo", {"config": {**resumed, "replicate": 2}, "saves": 1}),
        ("rm", {"config": setting.rm_config("four")}),
    ]
    run_jobs(4, four, setting.folder)
    train("ppo", resumed)
    return setting


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith(TIMES)} for line in lines]


def assert_same_trajectory(ours: Path, one: Path) -> None:
    """Every metric of every line, to the rounding of float32 sums."""
    found, wanted = records(ours), records(one)
    assert len(found) == len(wanted) > 1
    for line, truth in zip(found, wanted, strict=True):
        assert line.keys() == truth.keys()
        for name, value in truth.items():
            assert line[name] == pytest.approx(value, rel=2e-4, abs=2e-6), (truth["step"], name)


def assert_same_weights(ours: Path, one: Path) -> None:
    """Of families whose every parameter has a gradient: Adam makes whole steps of one that is rounding alone."""
    found, wanted = load_file(ours / "model.safetensors"), load_file(one / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = float(tensor.abs().max())
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-4 * scale), name


@pytest.mark.parametrize("stage, out", [("sft", "two"), ("rm", "two"), ("rm", "four"), ("ppo", "moved")])
def test_trajectory_is_that_of_one_process(stage, out, runs):
    ours, one = runs.folder / out / stage, runs.folder / "one" / stage
    assert_same_trajectory(ours, one)
    assert_same_weights(ours, one)


def test_the_same_tokens_are_sampled(runs):
    ours, one = runs.folder / "moved" / "ppo" / "samples", runs.folder / "one" / "ppo" / "samples"
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in ours.iterdir()) and len(names) == 5
    for name in names:
        for line, truth in zip(*((f / name).read_text().splitlines() for f in (ours, one)), strict=True):
            row, wanted = json.loads(line), json.loads(truth)
            assert row["tokens"] == wanted["tokens"] and row["episode"] == wanted["episode"]


def test_the_same_checkpoint_is_selected(runs):
    ours, one = (json.loads((runs.folder / out / "selection" / "selection.json").read_text()) for out in ("two", "one"))
    assert ours["best"] == one["best"] and len(one["mean_reward"]) > 1
    assert ours["mean_reward"] == pytest.approx(one["mean_reward"], rel=2e-4, abs=2e-6)
    assert_same_weights(runs.folder / "two" / "selection", runs.folder / "one" / "selection")


def test_a_dry_run_speaks_once_and_for_each_process(setting):
    processes = start(2, ["-m", "engine.train", "--stage", "sft", *flags(setting.sft_config("dry")), "--dry_run"])
    first, second = (process.communicate(timeout=600)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "dry run: nothing is trained" in first and "of each of 2 processes" in " ".join(first.split())
    assert "dry run" not in second and not (setting.folder / "dry").exists()


def test_exports_are_plain_folders(runs):
    AutoModelForCausalLM.from_pretrained(runs.folder / "two" / "sft")
    AutoModelForSequenceClassification.from_pretrained(runs.folder / "four" / "rm")
    folder = runs.folder / "moved" / "ppo"
    assert_same_weights(folder / "ema", runs.folder / "one" / "ppo" / "ema")
    assert_same_weights(folder / "value", runs.folder / "one" / "ppo" / "value")


def test_checkpoints_are_of_the_ranks_that_wrote_them(runs):
    folder = runs.folder / "moved" / "ppo"
    by_four, by_one = checkpoint.kept(folder)
    assert is_sharded_checkpoint(by_four) and len(list(by_four.glob("shard-*"))) == 4
    assert not is_sharded_checkpoint(by_one)
    checkpoint.verify(by_four)
    assert not list(folder.glob(".tmp*"))


def test_one_rank_writes_and_says_its_memory_first(runs):
    events = (runs.folder / "two" / "sft" / "events.jsonl").read_text()
    assert events.count("estimated peak of each of 2 processes") == 1
    steps = [r["step"] for r in records(runs.folder / "two" / "sft") if "loss" in r]
    assert steps == sorted(set(steps))
    assert "of each of" not in (runs.folder / "one" / "sft" / "events.jsonl").read_text()
