"""parity/* in the log of a PPO run: exactly 0 as things are, and what is measured when they are not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from small_engines import save_tiny
from stages.test_stages import PROMPTS, ppo_config
from stages.tiny_data import write_all

import engine
from engine.kernels._backend import kernels_usable
from engine.kernels.attention import attention_reference
from engine.kernels.linear_logprob import linear_logprob_reference
from engine.model import storage, transformer
from engine.model.weights import save_scalar, scalar_from_policy

DIFFERENCE = "parity/max_abs_logprob_diff"
RATIO = "parity/first_minibatch_ratio_deviation"

pytestmark = pytest.mark.skipif(
    not kernels_usable(), reason="torch's products are not batch-invariant"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny("llama", folder / "base")
    save_scalar(scalar_from_policy(base, seed=0, dtype="float32"), folder / "reward")
    return base, folder / "reward"


def logged(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if DIFFERENCE in record]


def in_two_halves(x, weight, bias=None, master=None, out_dtype=None):
    """`linear` with the second half of the depth added to the first: torch's product of a depth this small sums as
    ours does, in order."""
    dense = weight.dense if master is None else master.to(weight.dtype)
    parts = zip(x.chunk(2, dim=1), dense.to(x.dtype).chunk(2, dim=1), strict=True)
    y = sum(a @ b.T for a, b in parts).to(out_dtype or x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def head_by_the_definition(hidden, weight, targets, loss, temperature, *, master=None):
    logprob, entropy = linear_logprob_reference(
        hidden, weight, targets, temperature, master=master
    )
    return loss(logprob, entropy, slice(0, len(targets))), logprob.detach(), entropy.detach()


# A part of the training forward and the same in another order of sums. The sampler's fused step uses none of them.
BROKEN = {
    "products": (storage, "linear", in_two_halves),
    "attention": (transformer, "attention", attention_reference),
    "head": (transformer, "linear_logprob_loss", head_by_the_definition),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_logs_zero_and_another_order_of_sums_in_training_shows(
    models, data, tmp_path, monkeypatch, dtype
):
    def run(name: str) -> list[dict]:
        config = ppo_config(
            *models, data, tmp_path / name, dtype=dtype, ptx_coef=0.0, max_ratio_deviation=None
        )
        return logged(engine.train_ppo(config))

    whole = run("whole")
    assert len(whole) == 2  # the second iteration samples from weights that steps have changed
    assert all(record[DIFFERENCE] == 0.0 and record[RATIO] == 0.0 for record in whole)
    for name, (module, attribute, other) in BROKEN.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, other)
            broken = run(name)
        limit = 1e-3 if dtype == "float32" else 1.0  # some of these round to bfloat16
        for record in broken:
            assert 0.0 < record[DIFFERENCE] < limit, name
            assert 0.0 < record["parity/mean_abs_logprob_diff"] < record[DIFFERENCE], name
            assert 0.0 < record[RATIO] < math.expm1(limit), name


def test_it_is_the_distance_between_the_sampler_and_the_trainer(models, data, tmp_path):
    """One log-prob of a whole batch that is reported wrong is found, at its size."""
    config = ppo_config(*models, data, tmp_path / "ppo", num_mini_batches=1, max_ratio_deviation=None)
    policy = engine.HybridEngine.from_pretrained(models[0], dtype="float32", trainable=True)
    value = engine.load_scalar(models[1], dtype="float32", trainable=True)
    ppo = engine.PPO(policy, value, engine.load_policy(models[0], dtype="float32"), config)
    rollouts = ppo.rollout(PROMPTS)
    third = rollouts.completions[3]
    wrong = third.logprobs.clone()
    wrong[-1] -= 0.25
    said = dataclasses.replace(third, logprobs=wrong)
    completions = (*rollouts.completions[:3], said, *rollouts.completions[4:])
    stats = ppo.step(dataclasses.replace(rollouts, completions=completions), [0.0] * 8)
    difference = float((third.logprobs[-1] - wrong[-1]).abs())
    assert stats[DIFFERENCE] == difference > 0.2
    count = sum(rollouts.lengths)
    assert stats["parity/mean_abs_logprob_diff"] == pytest.approx(difference / count, rel=1e-6)
    assert stats[RATIO] == pytest.approx(math.expm1(0.25), rel=1e-5)


def test_a_run_with_a_limit_stops_when_the_trainer_leaves_the_sampler(
    models, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "linear", in_two_halves)
    config = ppo_config(*models, data, tmp_path / "ppo", ptx_coef=0.0, max_ratio_deviation=1e-9)
    with pytest.raises(engine.errors.EngineError, match="parity: the first minibatch's ratio is"):
        engine.train_ppo(config)
