"""Configs made in Python: natural values are taken, anything else is one message that names the key."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

import engine
from engine.config_sample import SampleConfig
from engine.errors import ConfigError
from engine.train import main, parse

REWARD = engine.RewardSource(source="m:f")


def sft(**more) -> engine.SFTConfig:
    return engine.SFTConfig(**({"model_name_or_path": "m", "output_dir": "o"} | more))


def ppo(**more) -> engine.PPOConfig:
    return engine.PPOConfig(**({"model_name_or_path": "m", "output_dir": "o", "rewards": [REWARD]} | more))


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [
        ("output_dir", Path("runs") / "sft", "runs/sft"),
        ("model_name_or_path", Path("m"), "m"),
        ("dataset_name", Path("rows.jsonl"), "rows.jsonl"),
        ("num_train_epochs", 2.0, 2),
        ("per_device_train_batch_size", np.int64(4), 4),
        ("learning_rate", 1, 1.0),
        ("learning_rate", np.float32(0.5), 0.5),
        ("allow_config_change", ("seed",), ["seed"]),
        ("dataset_mixture", [{"path": "a", "weight": 2}], [engine.DataSource("a", weight=2)]),
        ("cpu_class", None, None),
    ],
)
def test_natural_values_become_what_the_field_declares(key, given, taken):
    found = getattr(sft(**{key: given}), key)
    assert found == taken and type(found) is type(taken)
    assert yaml.safe_load(yaml.safe_dump(asdict(sft(**{key: given})))) == asdict(sft(**{key: taken}))


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("completion_only_loss", "False", "True or False"),
        ("activation_checkpointing", "Full", "one of 'none', 'selective', 'full'"),
        ("activation_checkpointing", True, "one of 'none', 'selective', 'full'"),
        ("cpu_class", "avx", "one of 'amx', 'avx512', 'avx2', 'plain'"),
        ("seed", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("max_steps", "2", "a whole number"),
        ("learning_rate", "1e-5", "a number"),
        ("eval_fraction", None, "a number"),
        ("output_dir", None, "text"),
        ("dataset_mixture", "a.jsonl", "a list, each of it a DataSource"),
        ("dataset_mixture", ["a.jsonl"], "a DataSource, or a mapping"),
        ("dataset_mixture", [{"file": "a"}], "keys of path, split, name, weight"),
        ("resume_from_checkpoint", 3, "text or True or False or None"),
    ],
)
def test_another_type_or_choice_is_refused(key, given, wanted):
    with pytest.raises(ConfigError, match=rf"^{key}(\[0\])?: got .*, want {wanted}"):
        sft(**{key: given})


@pytest.mark.parametrize(
    ("key", "given"),
    [("missing_eos_mode", "Replace"), ("score_at", "last"), ("whiten_advantages", "false"), ("kl_estimator", "K1")],
)
def test_a_misspelt_choice_of_ppo_is_not_another_one(key, given):
    with pytest.raises(ConfigError, match=f"^{key}: got '{given}', want"):
        ppo(**{key: given})


def test_rewards_are_sources_or_mappings():
    made = ppo(rewards=[{"source": "runs/rm"}, {"source": "m:f", "weight": 2}]).rewards
    assert made == [engine.RewardSource(source="runs/rm"), engine.RewardSource(source="m:f", weight=2.0)]
    for wrong in (len, "m:f"):
        with pytest.raises(ConfigError, match=r"^rewards\[0\]: got .*, want a RewardSource"):
            ppo(rewards=[wrong])


def test_a_run_needs_a_reward_and_a_loop_of_ones_own_none(capsys):
    config = engine.PPOConfig(model_name_or_path="m", output_dir="o")
    wanted = "reward_model_path: got None, want a reward-model folder, or `rewards`"
    with pytest.raises(ConfigError, match=wanted):
        engine.train_ppo(config)
    assert main(["--stage", "ppo", "--model_name_or_path", "m", "--output_dir", "o"]) == 2
    assert wanted in capsys.readouterr().err


def test_samples_too():
    with pytest.raises(ConfigError, match="^num_samples: got '4', want a whole number"):
        SampleConfig(model_name_or_path="m", dataset_name="d", output="o", num_samples="4")
    assert SampleConfig(model_name_or_path=Path("m"), dataset_name="d", output="o").model_name_or_path == "m"


@pytest.mark.parametrize(("given", "taken"), [("true", "true"), ("false", None), ("runs/a/checkpoint-2",) * 2])
def test_going_on_is_true_or_a_path_in_yaml_and_python(given, taken, tmp_path):
    (tmp_path / "c.yaml").write_text(f"resume_from_checkpoint: {given}\n")
    words = ["--stage", "sft", "--model_name_or_path", "m", "--output_dir", "o"]
    assert parse([*words, "--config", str(tmp_path / "c.yaml")])[1].goes_on_from == taken
    assert parse([*words, "--resume_from_checkpoint", given])[1].goes_on_from == taken
    assert sft(resume_from_checkpoint={"true": True, "false": False}.get(given, given)).goes_on_from == taken
