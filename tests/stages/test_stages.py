"""Every stage on every family, through the front door, on tiny random models and ragged data."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_engines import FAMILIES, save_tiny
from stages.tiny_data import write_all
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import engine
from engine import ops
from engine.generate import steps
from engine.kernels._backend import kernels_usable
from engine.kernels.attention_decode import attention_decode
from engine.stages.ppo import score, update

COMMON = {"threads": 1, "progress": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return write_all(tmp_path_factory.mktemp("data"))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sft(model: Path, data: dict[str, str], out: Path, **more) -> Path:
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        **COMMON,
    }
    return engine.train_sft(
        engine.SFTConfig(
            model_name_or_path=str(model),
            output_dir=str(out),
            dataset_name=data["sft"],
            eval_dataset_name=data["sft"],
            max_length=80,
            **(options | more),
        )
    )


def rm(model: Path, data: dict[str, str], out: Path, **more) -> Path:
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        **COMMON,
    }
    return engine.train_reward_model(
        engine.RMConfig(
            model_name_or_path=str(model),
            output_dir=str(out),
            dataset_name=data["rankings"],
            eval_dataset_name=data["rankings"],
            demonstrations_name=data["sft"],
            max_length=80,
            **(options | more),
        )
    )


def ppo_config(
    policy: Path, reward: Path, data: dict[str, str], out: Path, **more
) -> engine.PPOConfig:
    options = {
        "total_episodes": 16,
        "batch_size": 8,
        "num_mini_batches": 2,
        "response_length": 8,
        "learning_rate": 1e-3,
        "ptx_coef": 2.0,
        "ptx_per_episode": 0.5,
        "ptx_length": 32,
        "eval_num_prompts": 4,
        "max_ratio_deviation": 1e-5,
        **COMMON,
    }
    return engine.PPOConfig(
        model_name_or_path=str(policy),
        output_dir=str(out),
        reward_model_path=str(reward),
        dataset_name=data["prompts"],
        eval_dataset_name=data["prompts"],
        ptx_dataset_name=data["text"],
        eval_ptx_dataset_name=data["text"],
        max_length=60,
        **(options | more),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_rm_ppo(family, data, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    policy = sft(base, data, tmp_path / "sft")
    losses = [r["loss"] for r in records(policy) if "loss" in r]
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(policy)

    reward = rm(policy, data, tmp_path / "rm")
    last = [r for r in records(reward) if "eval/accuracy" in r][-1]
    assert last["eval/accuracy"] > 0.6  # the same rows: it must learn them
    assert {"eval/by_k/2/accuracy", "eval/log_loss", "eval/accuracy_stderr"} <= last.keys()
    loaded = AutoModelForSequenceClassification.from_pretrained(reward)
    assert loaded.config.num_labels == 1

    final = engine.train_ppo(ppo_config(policy, reward, data, tmp_path / "ppo"))
    steps = [r for r in records(final) if "objective/kl" in r]
    assert len(steps) == 2
    for record in steps:
        assert record["parity/first_minibatch_ratio_deviation"] <= 1e-5
        assert record["parity/max_abs_logprob_diff"] == 0.0 or not kernels_usable()
        assert all(value is not None for value in record.values()), record
    assert steps[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the policy is the reference
    assert steps[0]["policy/grad_norm_ptx"] > 0 and steps[0]["policy/grad_norm_ppo"] > 0
    for folder in (final, final / "ema"):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(final / "value")
    names = {path.name for path in (final / "samples").iterdir()}
    assert {"before-0.jsonl", "after-2.jsonl", "step-1.jsonl", "step-2.jsonl"} <= names


@pytest.fixture(scope="module")
def models(data, tmp_path_factory) -> tuple[Path, Path]:
    """A policy and a reward model of the llama family."""
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny("llama", folder / "base")
    return base, rm(base, data, folder / "rm", num_train_epochs=1)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_coefficient_zero_is_plain_ppo_to_the_bit(models, data, tmp_path):
    zero = engine.train_ppo(ppo_config(*models, data, tmp_path / "zero", ptx_coef=0.0))
    plain = ppo_config(*models, data, tmp_path / "plain")
    plain = dataclasses.replace(plain, ptx_dataset_name=None)
    assert weights(engine.train_ppo(plain)) == weights(zero)


def test_the_cut_into_micro_batches_does_not_matter(models, data, tmp_path):
    whole = engine.train_ppo(ppo_config(*models, data, tmp_path / "whole"))
    cut = engine.train_ppo(ppo_config(*models, data, tmp_path / "cut", micro_batch_tokens=16))
    for a, b in zip(records(whole), records(cut), strict=True):
        for name in (
            "objective/kl",
            "loss/policy_avg",
            "loss/value_avg",
            "loss/ptx_avg",
            "val/ratio_var",
        ):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


def reward_of_length(prompts, completions, topic, **columns):
    assert len(prompts) == len(completions) == len(topic)
    return [float(len(text)) if index % 2 else None for index, text in enumerate(completions)]


def test_rewards_from_functions_and_models_are_added_up(models, data, tmp_path):
    rewards = [
        engine.RewardSource(source=str(models[1]), weight=2.0),
        engine.RewardSource(source="stages.test_stages:reward_of_length", weight=0.5),
    ]
    config = ppo_config(*models, data, tmp_path / "ppo", rewards=rewards, missing_eos_penalty=0.0)
    record = [
        r
        for r in records(engine.train_ppo(dataclasses.replace(config, reward_model_path=None)))
        if "objective/scores" in r
    ][0]
    assert {"rewards/rm", "rewards/reward_of_length"} <= record.keys()
    expected = 2.0 * record["rewards/rm"] + 0.5 * record["rewards/reward_of_length"] / 2
    assert record["objective/scores"] == pytest.approx(expected, rel=1e-5)


def test_the_low_level_loop(models, data, tmp_path):
    config = ppo_config(*models, data, tmp_path / "ppo")
    policy = engine.HybridEngine.from_pretrained(models[0], dtype="float32", trainable=True)
    value = engine.load_scalar(models[1], dtype="float32", trainable=True)
    reference = engine.load_policy(models[0], dtype="float32")
    ppo = engine.PPO(policy, value, reference, config)
    prompts = ["the cat", policy.encode("a dog"), [{"role": "user", "content": "one"}], "two"] * 2
    before = {name: p.detach().clone() for name, p in policy.model.parameters().items()}
    rollouts = ppo.rollout(prompts)
    stats = ppo.step(rollouts, [float(len(c.tokens)) for c in rollouts.completions])
    assert stats["parity/first_minibatch_ratio_deviation"] <= 1e-5
    assert stats["val/explained_variance"] <= 1.0
    changed = [n for n, p in policy.model.parameters().items() if not torch.equal(p, before[n])]
    assert changed
    again = ppo.rollout(prompts)
    assert [c.episode_id for c in again.completions] == list(range(8, 16))


def low_level(models, data, folder, dtype="float32"):
    config = ppo_config(*models, data, folder, dtype=dtype)
    policy = engine.HybridEngine.from_pretrained(models[0], dtype=dtype, trainable=True)
    value = engine.load_scalar(models[1], dtype=dtype, trainable=True)
    return engine.PPO(policy, value, engine.load_policy(models[0], dtype=dtype), config)


PROMPTS = ["the cat", "a dog", "one", "two"] * 2


def test_one_models_gradients_are_gone_before_the_others_come(models, data, tmp_path, monkeypatch):
    ppo, seen = low_level(models, data, tmp_path / "ppo"), []
    both = {"policy": ppo.policy.model, "value": ppo.value}

    def has_gradients(model):
        return any(p.grad is not None for p in model.parameters().values())

    def recording(name, real):
        def call(*arguments):
            out = real(*arguments)
            seen.append((name, [n for n, model in both.items() if has_gradients(model)]))
            return out

        return call

    for name in both:
        monkeypatch.setattr(update, f"{name}_backward", recording(name, getattr(update, f"{name}_backward")))
    ppo.step(ppo.rollout(PROMPTS), [1.0] * 8)
    assert {name for name, _ in seen} == set(both)
    assert all(held == [name] for name, held in seen)
    assert not any(map(has_gradients, both.values()))


@pytest.mark.skipif(not kernels_usable(), reason="torch's products are not batch-invariant")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_logprobs_are_the_samplers(dtype, models, data, tmp_path, monkeypatch):
    """No forward pass of the policy lies between sampling and training, and the ratio is 1 to the bit."""
    ppo = low_level(models, data, tmp_path / "ppo", dtype)
    for _ in range(2):  # the second time from weights that a step has changed
        rollouts = ppo.rollout(PROMPTS)
        stats = ppo.step(rollouts, [float(len(c.tokens)) for c in rollouts.completions])
        assert stats["parity/max_abs_logprob_diff"] == 0.0
        assert stats["parity/first_minibatch_ratio_deviation"] == 0.0

    scored: list[object] = []
    real = score.answer_logprobs

    def recording(model, *arguments):
        scored.append(model)
        return real(model, *arguments)

    monkeypatch.setattr(score, "answer_logprobs", recording)
    stale = ppo.rollout(PROMPTS)
    ppo.step(stale, [0.0] * 8)
    assert ppo.policy.model not in scored and ppo.reference in scored
    stats = ppo.step(stale, [1.0] * 8)  # sampled from weights that are no more: scored again
    assert ppo.policy.model in scored
    assert stats["parity/first_minibatch_ratio_deviation"] == 0.0
    assert stats["parity/max_abs_logprob_diff"] > 0.0


@pytest.mark.skipif(not kernels_usable(), reason="torch's products are not batch-invariant")
def test_another_order_of_sums_shows_as_parity(models, data, tmp_path, monkeypatch):
    """The sampler's attention sums its keys in another order than training's: the metric says so."""
    ppo = low_level(models, data, tmp_path / "ppo")

    def elsewise(*arguments, **options):
        with ops.backend("reference"):
            return attention_decode(*arguments, **options)

    monkeypatch.setattr(steps, "kernels_usable", lambda: False)  # layer by layer
    monkeypatch.setattr(steps, "attention_decode", elsewise)
    rollouts = ppo.rollout(PROMPTS)
    stats = ppo.step(rollouts, [0.0] * 8)
    assert 0.0 < stats["parity/max_abs_logprob_diff"] < 1e-4
    assert 0.0 < stats["parity/first_minibatch_ratio_deviation"] < 1e-4


def test_num_samples_share_a_prompt(models, data, tmp_path):
    """The same episodes, whether answers of one prompt are packed together or not, give the same first losses."""
    config = ppo_config(
        *models, data, tmp_path / "shared", num_samples=4, num_mini_batches=1, total_episodes=8
    )
    record = [r for r in records(engine.train_ppo(config)) if "objective/kl" in r][0]
    assert record["parity/max_abs_logprob_diff"] <= 1e-4
    assert record["parity/first_minibatch_ratio_deviation"] <= 1e-5


def test_rl_init_mixes_pretraining_rows(models, data, tmp_path):
    policy = sft(
        models[0],
        data,
        tmp_path / "init",
        ptx_dataset_name=data["text"],
        ptx_fraction=0.25,
        eval_ptx_dataset_name=data["text"],
        ptx_length=24,
    )
    found = records(policy)
    assert any("eval/ptx_loss" in r for r in found)
    per_step = [r for r in found if "loss" in r]
    assert len(per_step) == 8  # 12 rows in batches of 3 demonstrations and 1 text row, twice


def test_dropout_changes_training_but_not_with_the_cut(models, data, tmp_path):
    one = sft(models[0], data, tmp_path / "one", residual_dropout=0.3, max_steps=2)
    two = sft(
        models[0], data, tmp_path / "two", residual_dropout=0.3, max_steps=2, micro_batch_tokens=8
    )
    none = sft(models[0], data, tmp_path / "none", max_steps=2)
    first = [[r["loss"] for r in records(f) if "loss" in r][0] for f in (one, two, none)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert abs(first[0] - first[2]) > 1e-3


def test_the_best_checkpoint_by_reward_is_marked_and_exported(models, data, tmp_path):
    policy = sft(
        models[0],
        data,
        tmp_path / "selected",
        select_by_reward_model=str(models[1]),
        select_num_prompts=4,
        select_response_length=6,
        save_total_limit=5,
    )
    selection = json.loads((policy / "selection.json").read_text())
    assert len(selection["mean_reward"]) == 2
    assert selection["best"] == max(selection["mean_reward"], key=selection["mean_reward"].get)


def test_demonstrations_score_zero_after_training(models, data):
    config = json.loads((models[1] / "config.json").read_text())
    assert config["engine_score_constant"] != 0.0
    from engine.data.rankings import RankedGroup
    from engine.data.text import DataSource, load_sft
    from engine.hybrid import HybridEngine
    from engine.stages.rm import group_scores

    tokenizer = HybridEngine.from_pretrained(models[0], dtype="float32").tokenizer
    model = engine.load_scalar(models[1], dtype="float32")
    rows = load_sft([DataSource(path=data["sft"])], tokenizer, max_length=80)
    scores = [
        float(
            group_scores(
                model,
                [
                    RankedGroup(
                        r.tokens[: r.response_start], (r.tokens[r.response_start :],), (0.0,), ""
                    )
                ],
            )
        )
        for r in rows
    ]
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-4)
