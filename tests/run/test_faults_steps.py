"""Losses and gradients that are not finite: skipped and counted; so many in a row end the run with its state saved."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from run import faulty

import engine
from engine.errors import EngineError
from engine.run import checkpoint
from engine.run.optim import Optimizer
from engine.stages.rm import RMStage
from engine.stages.sft import SFTStage


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("steps"))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def poison_gradients(monkeypatch, bad: set[int], value: float = math.nan) -> None:
    """The optimizer steps with these numbers (from 0, over the whole test) find one bad number in their gradient."""
    step, calls = Optimizer.step, iter(range(10**6))

    def poisoned(self, *arguments, **options):
        if next(calls) in bad:
            parameter = next(iter(self.parameters.values()))
            parameter.grad.view(-1)[0] = value
        return step(self, *arguments, **options)

    monkeypatch.setattr(Optimizer, "step", poisoned)


def poison_loss(monkeypatch, stage: type, bad: set[int]) -> None:
    """The loss of these steps is said to be infinite, though the gradient is finite."""
    train_step = stage.train_step

    def poisoned(self, rows, step):
        metrics = train_step(self, rows, step)
        return metrics | {"loss": math.inf} if step in bad else metrics

    monkeypatch.setattr(stage, "train_step", poisoned)


KINDS = {
    "sft": (engine.train_sft, faulty.sft, SFTStage),
    "rm": (engine.train_reward_model, faulty.rm, RMStage),
}


@pytest.mark.parametrize("what", ["nan gradient", "infinite gradient", "infinite loss"])
@pytest.mark.parametrize("stage", KINDS)
def test_a_bad_step_is_skipped_and_counted(stage, what, setting, tmp_path, monkeypatch):
    train, config, kind = KINDS[stage]
    if what == "infinite loss":
        poison_loss(monkeypatch, kind, {1})
    else:
        poison_gradients(monkeypatch, {1}, math.nan if "nan" in what else math.inf)
    train(config(setting, tmp_path / "run", save_total_limit=5))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert [r["skipped_steps"] for r in steps] == [0.0, 1.0, 1.0]
    first, second, third = (
        checkpoint.load(tmp_path / "run" / f"checkpoint-{i}").tensors["model"] for i in (1, 2, 3)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(bool(t.isfinite().all()) for t in third.values())


@pytest.mark.parametrize("stage", KINDS)
def test_many_in_a_row_end_the_run_and_save_it(stage, setting, tmp_path, monkeypatch):
    """Not so many with a good one between; a resume goes on counting and a good step forgets."""
    train, config, kind = KINDS[stage]
    bad = {1, 3, 4, 5}
    poison_loss(monkeypatch, kind, bad)
    more = {"max_skipped_steps": 3, "save_steps": 100, "max_steps": 8, "num_train_epochs": 4}
    run = config(setting, tmp_path / "run", **more)
    with pytest.raises(
        EngineError, match=r"step 6: 3 optimizer steps in a row .*max_skipped_steps"
    ):
        train(run)
    (saved,) = checkpoint.kept(tmp_path / "run")
    assert saved.name == "checkpoint-6" and checkpoint.load(saved).state["skipped_in_a_row"] == 3
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = dataclasses.replace(run, resume_from_checkpoint="true")
    with monkeypatch.context() as patch:
        poison_loss(patch, kind, {6})
        with pytest.raises(EngineError, match="step 7: 4 optimizer steps in a row"):
            train(resumed)
    train(resumed)
    assert (tmp_path / "run" / "model.safetensors").exists()
    last = [r for r in records(tmp_path / "run") if "loss" in r][-1]
    assert last["skipped_steps"] == 5.0


def test_ppo_skips_counts_and_ends(setting, tmp_path, monkeypatch):
    """Two minibatches an iteration, a policy and a value step each: calls 4 to 7 are the second iteration's."""
    poison_gradients(monkeypatch, {4, 8, 9, 10, 11, 12, 13, 14, 15})
    config = faulty.ppo(setting, tmp_path / "run", total_episodes=24, max_skipped_steps=4)
    with pytest.raises(EngineError, match="step 4: 4 optimizer steps in a row"):
        engine.train_ppo(config)
    found = [r for r in records(tmp_path / "run") if "policy/skipped_steps" in r]
    assert [r["policy/skipped_steps"] for r in found] == [0.0, 1.0, 3.0, 5.0]
    assert [r["val/skipped_steps"] for r in found] == [0.0, 0.0, 2.0, 4.0]
    assert [r["policy/skipped_in_a_row"] for r in found] == [0.0, 0.0, 2.0, 4.0]
    (saved,) = checkpoint.kept(tmp_path / "run")
    assert saved.name == "checkpoint-4"
    with monkeypatch.context() as patch:
        poison_gradients(patch, {0, 1, 2, 3})
        with pytest.raises(EngineError, match="step 5: 6 optimizer steps in a row"):
            engine.train_ppo(dataclasses.replace(config, resume_from_checkpoint="true"))
    engine.train_ppo(dataclasses.replace(config, resume_from_checkpoint="true"))
    assert (tmp_path / "run" / "model.safetensors").exists()
    last = records(tmp_path / "run")[-1]
    assert last["policy/skipped_steps"] == 7.0 and last["val/skipped_steps"] == 6.0


def test_ppo_lines_that_are_not_logged_lose_no_skip(setting, tmp_path, monkeypatch):
    poison_gradients(monkeypatch, {4})
    engine.train_ppo(faulty.ppo(setting, tmp_path / "run", total_episodes=16, logging_steps=4))
    (line,) = records(tmp_path / "run")
    assert line["step"] == 4 and line["policy/skipped_steps"] == 1.0 and line["val/skipped_steps"] == 0.0
