"""The choice among SFT checkpoints: what it needs is checked before anything is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_engines import CONTEXT, save_tiny
from stages.tiny_data import write, write_all

import engine
from engine.errors import CheckpointError, ConfigError, EngineError, ModelError
from engine.model.weights import save_scalar, scalar_from_policy
from engine.stages import select
from engine.stages.dry_run import describe


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    """A policy, its reward model, and demonstrations."""
    folder = tmp_path_factory.mktemp("select")
    model = save_tiny("llama", folder / "model")
    save_scalar(scalar_from_policy(model, 0, "float32"), folder / "rm")
    return {"model": str(model), "rm": str(folder / "rm"), **write_all(folder)}


def config(setting: dict[str, str], out: Path, **more) -> engine.SFTConfig:
    values = {
        "dataset_name": setting["sft"],
        "max_length": 80,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "select_by_reward_model": setting["rm"],
        "select_num_prompts": 2,
        "select_response_length": 4,
        "threads": 1,
        "progress": False,
        "dtype": "float32",
    }
    return engine.SFTConfig(
        model_name_or_path=setting["model"], output_dir=str(out), **(values | more)
    )


def changed(setting: dict[str, str], folder: Path, **keys: int) -> str:
    """The reward model with other values in its config.json."""
    folder.mkdir()
    for file in Path(setting["rm"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | keys))
    return str(folder)


def refused(given: engine.SFTConfig, kind: type[EngineError], message: str) -> None:
    """Before the run's folder is made."""
    with pytest.raises(kind, match=message):
        engine.train_sft(given)
    assert not Path(given.output_dir).exists()


def test_answers_longer_than_the_context_are_refused_before_training(setting, tmp_path):
    given = config(setting, tmp_path / "run", select_response_length=CONTEXT)
    message = rf"select_response_length: got {CONTEXT}, the model's context of {CONTEXT} leaves \d+ beside"
    refused(given, ConfigError, message)
    with pytest.raises(ConfigError, match=message):
        describe("sft", given)


def test_the_reward_models_context_counts_too(setting, tmp_path):
    short = changed(setting, tmp_path / "rm", max_position_embeddings=8)
    given = config(setting, tmp_path / "run", select_by_reward_model=short)
    refused(given, ConfigError, "select_response_length: got 4, select_by_reward_model's context of 8 leaves")


def test_the_longest_answer_that_fits_is_taken(setting, tmp_path):
    """Also beside a longer prompt that is not among those to answer."""
    prompts = ["abcdef", "abcdef"]
    prompts[next(i for i in range(2) if select.some_of(range(2), 1, "selection prompts") == [i])] = "ab"
    rows = [{"prompt": prompt, "completion": "c"} for prompt in prompts]
    data = write(tmp_path / "rows.jsonl", rows)
    given = config(setting, tmp_path / "run", dataset_name=data, select_num_prompts=1)
    length = CONTEXT - 5  # the chat template gives the prompt of two bytes three tokens more
    done = engine.train_sft(replace(given, select_response_length=length))
    assert json.loads((done / "selection.json").read_text())["best"] == "checkpoint-1"
    given = replace(given, output_dir=str(tmp_path / "more"), select_response_length=length + 1)
    refused(given, ConfigError, f"select_response_length: got {length + 1}")


def test_rows_without_a_prompt_are_refused_before_training(setting, tmp_path):
    """Of the rows that are sampled for: those of the validation, where there are some."""
    texts = write(tmp_path / "texts.jsonl", [{"text": f"number {i}"} for i in range(8)])
    given = config(setting, tmp_path / "run", dataset_name=texts)
    refused(given, ConfigError, "select_by_reward_model: got .*none of the training rows has a prompt")
    given = config(setting, tmp_path / "run", eval_dataset_name=texts)
    refused(given, ConfigError, "select_by_reward_model: got .*none of the validation rows has a prompt")


def test_a_reward_model_of_another_vocabulary_is_refused_before_training(setting, tmp_path):
    small = changed(setting, tmp_path / "rm", vocab_size=100)
    given = config(setting, tmp_path / "run", select_by_reward_model=small)
    refused(given, ModelError, r"select_by_reward_model .*the model has 0\.\.99")


def test_a_folder_without_checkpoints_is_an_error_that_says_so(setting, tmp_path):
    """Gone on from the last checkpoint of another folder: no step is left that would save one."""
    whole = engine.train_sft(config(setting, tmp_path / "whole"))
    (last,) = whole.glob("checkpoint-*")
    given = config(setting, tmp_path / "other", resume_from_checkpoint=str(last))
    with pytest.raises(CheckpointError, match="other: holds no checkpoint for select_by_reward_model"):
        engine.train_sft(given)


def test_a_score_that_is_not_finite_chooses_nothing(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(select, "model_scores", lambda *_: torch.tensor([1.0, float("nan")]))
    with pytest.raises(EngineError, match="select_by_reward_model: .*checkpoint-3 .*not finite"):
        engine.train_sft(config(setting, tmp_path / "run"))
    assert not (tmp_path / "run" / "selection.json").exists()


def test_all_epochs_are_compared_and_a_finished_run_can_be_asked_for_it(setting, tmp_path):
    """The reward model is made from this model, so the choice may come after the training."""
    given = config(setting, tmp_path / "run", num_train_epochs=4)
    engine.train_sft(given)
    chosen = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert len(chosen["mean_reward"]) == 4

    later = config(setting, tmp_path / "later", num_train_epochs=4, save_total_limit=4, select_by_reward_model=None)
    engine.train_sft(later)
    assert not (tmp_path / "later" / "selection.json").exists()
    engine.train_sft(replace(later, select_by_reward_model=setting["rm"], resume_from_checkpoint="true"))
    assert json.loads((tmp_path / "later" / "selection.json").read_text()) == chosen
    few = replace(given, save_total_limit=2, output_dir=str(tmp_path / "few"))
    engine.train_sft(few)
    assert len(json.loads((tmp_path / "few" / "selection.json").read_text())["mean_reward"]) == 2
