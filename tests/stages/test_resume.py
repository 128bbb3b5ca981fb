"""A run that was killed and went on ends with the bytes of a run that was never stopped: every stage, one process."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from small_engines import save_tiny
from stages.test_stages import COMMON, ppo_config
from stages.tiny_data import write_all

import engine
from engine.run.session import Session


class Killed(BaseException):
    """Stands for a kill: nothing of the engine may catch it."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("resume")
    save_tiny("llama", folder / "model")
    data = write_all(folder)
    config = engine.RMConfig(
        model_name_or_path=str(folder / "model"),
        output_dir=str(folder / "rm"),
        dataset_name=data["rankings"],
        max_length=80,
        **COMMON,
    )
    engine.train_reward_model(config)
    return {"model": str(folder / "model"), "rm": str(folder / "rm"), **data}


def stage(name: str, setting: dict[str, str], out: Path):
    """(function, config) of a short run that saves at every step."""
    common = {
        "model_name_or_path": setting["model"],
        "output_dir": str(out),
        "max_length": 80,
        "save_steps": 1,
        **COMMON,
    }
    epochs = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    if name == "sft":
        more = {"dataset_name": setting["sft"], "eval_fraction": 0.2, "residual_dropout": 0.2}
        return engine.train_sft, engine.SFTConfig(**common, **epochs, **more)
    if name == "rm":
        return engine.train_reward_model, engine.RMConfig(
            dataset_name=setting["rankings"], eval_fraction=0.2, **common, **epochs
        )
    config = ppo_config(
        Path(setting["model"]), Path(setting["rm"]), setting, out, total_episodes=32, eval_steps=2,
        save_steps=1, kl_target=1.0, num_ppo_epochs=2,
    )  # fmt: skip
    return engine.train_ppo, config


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith(("timing/", "perf/"))}
        for line in lines
    ]


def files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" or path.parent.name == "samples":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
@pytest.mark.parametrize("after_save", [True, False])
def test_resumed_equals_never_stopped(name, after_save, setting, tmp_path, monkeypatch):
    """Killed at the third save, before or after it: what came after the last whole checkpoint is done again."""
    train, config = stage(name, setting, tmp_path / "whole")
    train(config)
    _, config = stage(name, setting, tmp_path / "killed")
    save, calls = Session.save, []

    def dying_save(self, *arguments, **options):
        calls.append(1)
        if after_save or len(calls) < 3:
            save(self, *arguments, **options)
        if len(calls) == 3:
            raise Killed

    monkeypatch.setattr(Session, "save", dying_save)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.setattr(Session, "save", save)
    train(dataclasses.replace(config, resume_from_checkpoint="true"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert records(killed) == records(whole)
    assert files(killed) == files(whole)


def test_the_checkpoint_matters(setting, tmp_path):
    """A resume that forgot the optimizer would not give the same bytes: the test above can fail."""
    train, config = stage("sft", setting, tmp_path / "one")
    train(config)
    _, other = stage("sft", setting, tmp_path / "two")
    train(dataclasses.replace(other, adam_beta2=0.9))
    assert files(tmp_path / "one") != files(tmp_path / "two")


def test_resume_from_a_named_checkpoint(setting, tmp_path):
    train, config = stage("sft", setting, tmp_path / "run")
    train(config)
    before = files(tmp_path / "run")
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    earlier = newest.with_name(f"checkpoint-{int(newest.name.split('-')[1]) - 1}")
    train(dataclasses.replace(config, resume_from_checkpoint=str(earlier)))
    shutil.rmtree(tmp_path / "run" / "previous-1")  # the checkpoint that was passed by
    assert files(tmp_path / "run") == before
