"""Thirty steps of each stage: the engine's kernels against the torch definitions, other cuts, other threads.

Float32 storage on both sides, other orders of sums: a gradient of these models is exact to about 1e-6 of its norm. Adam
divides each element by its own size, so one that is rounding only moves by the learning rate in any direction; such
elements are few and small in what they do. The bound on losses is what thirty steps of that may add up to, 1e-4; the
bound on the move of all weights together is 2 % of its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_engines import save_tiny
from stages.tiny_data import write_all

import engine
from engine import ops
from engine.kernels._backend import kernels_usable
from engine.model.weights import save_scalar, scalar_from_policy

STEPS = 30
COMMON = {"progress": False, "dtype": "float32", "device": "cpu", "max_length": 80}
WATCHED = ("loss", "entropy", "objective/", "policy/entropy", "val/", "margin", "grad_norm")

pytestmark = pytest.mark.skipif(not kernels_usable(), reason="compares the engine's kernels with the definitions")


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("trajectory")
    save_tiny("llama", folder / "base")
    save_scalar(scalar_from_policy(folder / "base", seed=0, dtype="float32"), folder / "reward")
    return {"base": str(folder / "base"), "reward": str(folder / "reward"), **write_all(folder)}


def epochs(setting: dict[str, str], out: Path, data: str, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": setting["base"], "output_dir": str(out), "dataset_name": setting[data],
        "per_device_train_batch_size": 4, "num_train_epochs": STEPS, "max_steps": STEPS,
        "learning_rate": 1e-4, "eval_steps": STEPS, "save_steps": STEPS, **COMMON, **more,
    }  # fmt: skip


def sft(setting: dict[str, str], out: Path, **more: Any) -> Path:
    return engine.train_sft(engine.SFTConfig(**epochs(setting, out, "sft", **more)))


def rm(setting: dict[str, str], out: Path, **more: Any) -> Path:
    config = engine.RMConfig(**epochs(setting, out, "rankings", **more), demonstrations_limit=2)
    return engine.train_reward_model(config)


def ppo(setting: dict[str, str], out: Path, **more: Any) -> Path:
    """Fifteen iterations of two optimizer steps; a learning rate at which no draw changes."""
    return engine.train_ppo(
        engine.PPOConfig(
            model_name_or_path=setting["base"], reward_model_path=setting["reward"],
            output_dir=str(out), dataset_name=setting["prompts"], ptx_dataset_name=setting["text"],
            total_episodes=4 * STEPS // 2, batch_size=4, num_samples=2, num_mini_batches=2,
            response_length=5, ptx_length=12, ptx_per_episode=0.5, learning_rate=1e-5,
            value_learning_rate=1e-5, save_steps=STEPS, eval_steps=STEPS, **COMMON, **more,
        )
    )  # fmt: skip


STAGES: dict[str, Callable[..., Path]] = {"sft": sft, "rm": rm, "ppo": ppo}


def losses(folder: Path) -> list[dict[str, float]]:
    """What is watched of each step, whatever it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(WATCHED) and "norm_p" not in k} for line in lines]


def moved(setting: dict[str, str], folder: Path) -> torch.Tensor:
    start, end = (load_file(Path(f) / "model.safetensors") for f in (setting["base"], folder))
    return torch.cat([(end[n] - start[n]).flatten() for n in sorted(start) if n in end]).double()


def check_agree(setting: dict[str, str], ours: Path, theirs: Path) -> None:
    found, wanted = losses(ours), losses(theirs)
    assert len(found) == len(wanted) >= STEPS // 2
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            bound = 1e-4 * max(1.0, abs(value))
            assert abs(one[name] - value) <= bound, f"step {step}: {name}: {one[name]}, want {value}"
    move, want = moved(setting, ours), moved(setting, theirs)
    assert want.norm() > 0
    assert (move - want).norm() <= 0.02 * want.norm()


@pytest.fixture(scope="module")
def own(setting, tmp_path_factory) -> dict[str, Path]:
    """Each stage as it runs by default, on one thread."""
    folder = tmp_path_factory.mktemp("own")
    return {name: run(setting, folder / name, threads=1) for name, run in STAGES.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_thirty_steps_are_those_of_the_definitions(stage, setting, own, tmp_path):
    with ops.backend("reference"):
        theirs = STAGES[stage](setting, tmp_path / "run", threads=1)
    check_agree(setting, own[stage], theirs)


@pytest.mark.parametrize("stage", STAGES)
def test_thirty_steps_do_not_depend_on_how_micro_batches_are_cut(stage, setting, own, tmp_path):
    cut = STAGES[stage](setting, tmp_path / "run", threads=1, micro_batch_tokens=40)
    check_agree(setting, own[stage], cut)


@pytest.mark.parametrize("stage", STAGES)
def test_thirty_steps_have_the_same_bytes_on_two_threads(stage, setting, own, tmp_path):
    two = STAGES[stage](setting, tmp_path / "run", threads=2)
    name = "model.safetensors"
    assert (two / name).read_bytes() == (own[stage] / name).read_bytes()
    assert losses(two) == losses(own[stage])
