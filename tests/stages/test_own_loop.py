"""engine.PPO in somebody else's loop: addresses of episodes, limits of the config, and what it refuses."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from small_engines import save_tiny
from stages.test_stages import ppo_config
from stages.tiny_data import write_all

import engine
from engine.errors import ConfigError, EngineError
from engine.generate import generator
from engine.generate.scheduler import Limits
from engine.model.weights import save_scalar, scalar_from_policy
from engine.run.checkpoint import Checkpoint

PROMPTS = ["the cat", "a dog", "one", "two"] * 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny("llama", folder / "base")
    save_scalar(scalar_from_policy(base, seed=0, dtype="float32"), folder / "reward")
    return base, folder / "reward"


@pytest.fixture
def make(models, data, tmp_path):
    """A PPO whose config has the changes given."""

    def call(policy_limits=None, **changes):
        config = ppo_config(*models, data, tmp_path / "ppo", **changes)
        policy = engine.HybridEngine.from_pretrained(models[0], "float32", trainable=True, limits=policy_limits)
        value = engine.load_scalar(models[1], "float32", trainable=True)
        return engine.PPO(policy, value, engine.load_policy(models[0], "float32"), config)

    return call


def test_the_readmes_own_loop_runs(models, tmp_path):
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "engine.PPO(" in b)
    for place, folder in (("runs/sft", models[0]), ("runs/rm", models[1]), ("runs/ppo", tmp_path / "ppo")):
        block = block.replace(f'"{place}', f'"{folder}')
    block = block.replace("output_dir", "response_length=8, output_dir")  # the model's context is small
    names = {"engine": engine}
    exec(block, names)
    assert names["stats"]["val/num_eos_tokens"] >= 0 and names["ppo"].iteration == 1
    saved = engine.load_policy(tmp_path / "ppo", "float32")
    assert type(saved) is type(names["reference"])
    assert engine.load_scalar(tmp_path / "ppo" / "value").constant == names["value"].constant


def test_parts_of_another_type_are_named(models, data, tmp_path):
    config = ppo_config(*models, data, tmp_path / "ppo")
    good = {
        "policy": engine.HybridEngine.from_pretrained(models[0], "float32", trainable=True),
        "value": engine.scalar_from_policy(models[0], 0, "float32"),
        "reference": engine.load_policy(models[0], "float32"),
        "config": config,
    }
    engine.PPO(**good)
    frozen_scalar = engine.load_scalar(models[1], "float32")
    for name, given, message in (
        ("policy", good["policy"].model, r"got Model, want HybridEngine; give engine\.HybridEngine"),
        ("policy", engine.HybridEngine.from_pretrained(models[0], "float32"), "got a frozen model, want a trainable"),
        ("value", good["reference"], r"got Model, want ScalarModel; give engine\.load_scalar"),
        ("value", frozen_scalar, "got a frozen model, want a trainable one"),
        ("reference", good["policy"], r"got HybridEngine, want Model; give engine\.load_policy"),
        ("reference", frozen_scalar, "got ScalarModel, want Model"),
        ("reference", good["policy"].model, "got the policy's own model, whose KL to itself is always 0"),
        ("config", vars(config), "got dict, want PPOConfig"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: {message}"):
            engine.PPO(**good | {name: given})


def ids(rollouts):
    return [c.episode_id for c in rollouts.completions]


def tokens(rollouts):
    return [c.tokens for c in rollouts.completions]


def as_checkpoint(ppo, path, without=()):
    tensors, state = ppo.state()
    copied = {group: {n: t.clone() for n, t in named.items()} for group, named in tensors.items()}
    return Checkpoint(path, ppo.iteration, copied, {k: v for k, v in state.items() if k not in without})


def test_no_two_episodes_have_the_same_address(make):
    """However many prompts are given, and however many rollouts lie before a step."""
    ppo = make(batch_size=4)
    first, second = ppo.rollout(PROMPTS), ppo.rollout(PROMPTS[:3])
    assert (ids(first), ids(second)) == (list(range(8)), [8, 9, 10])
    assert tokens(first)[:3] != tokens(second)  # the same prompts and weights
    ppo.step(first, [0.0] * 8)
    assert ids(ppo.rollout(PROMPTS)) == list(range(11, 19))


def test_who_goes_on_from_a_state_is_given_the_rollouts_that_had_no_step_again(make, tmp_path):
    ppo = make(batch_size=4)
    ppo.step(ppo.rollout(PROMPTS), [1.0] * 8)
    saved, lost = as_checkpoint(ppo, tmp_path), ppo.rollout(PROMPTS)
    assert as_checkpoint(ppo, tmp_path).state == saved.state
    other = make(batch_size=4)
    other.load_state(saved)
    again = other.rollout(PROMPTS)
    assert ids(again) == ids(lost) == list(range(8, 16)) and tokens(again) == tokens(lost)


def test_a_checkpoint_without_the_count_goes_on_as_it_did(make, tmp_path):
    ppo = make(batch_size=8)
    ppo.step(ppo.rollout(PROMPTS), [1.0] * 8)
    assert ppo.state()[1]["episodes"] == 8
    other = make(batch_size=8)
    other.load_state(as_checkpoint(ppo, tmp_path, without=("episodes",)))
    assert ids(other.rollout(PROMPTS)) == list(range(8, 16))


def test_rollouts_keep_to_the_configs_limits(make, monkeypatch):
    seen, real = [], generator.Scheduler

    def recording(requests, longest, limits, *rest):
        seen.append(limits)
        return real(requests, longest, limits, *rest)

    monkeypatch.setattr(generator, "Scheduler", recording)
    ppo = make(Limits(9, 1.0, 77), max_active=3, kv_cache_gb=0.25)
    ppo.rollout(PROMPTS)
    assert seen == [Limits(3, 0.25, 77)]


def test_one_string_is_not_five_prompts(make):
    with pytest.raises(ConfigError, match=r"prompts: got one string; give a list of prompts, \[prompt\] for one"):
        make().rollout("hello")


def weights_of(ppo):
    named = [*ppo.policy.model.parameters().items(), *ppo.value.parameters().items()]
    return [p.detach().clone() for _, p in named]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (1.0, r"got 1.0, want 4 finite numbers, one an episode"),
        ([2.5], r"got 1 of them, want 4"),
        ([0.0] * 5, r"got 5 of them, want 4"),
        ([0.0, math.nan, 0.0, 0.0], r"got nan for episode 1, want 4"),
        ([0.0, 0.0, 1e39, 0.0], r"got 1e\+39 for episode 2, want 4"),
        ([0.0, 0.0, 0.0, None], r"got None for episode 3, want 4"),
        ([0.0, 0.0, 0.0, "1"], r"got '1' for episode 3, want 4"),
        (torch.zeros(4, 1), r"got the shape \(4, 1\), want 4"),
        (torch.tensor(1.0), r"got the shape \(\), want 4"),
        (torch.tensor([0.0, 0.0, math.inf, 0.0]), r"got inf for episode 2, want 4"),
    ],
    ids=str,
)
def test_scores_that_are_not_one_number_an_episode_are_refused_before_anything_runs(scores, message, make):
    ppo = make(batch_size=4)
    rollouts, before = ppo.rollout(PROMPTS[:4]), weights_of(ppo)
    with pytest.raises(ConfigError, match=f"^scores: {message}"):
        ppo.step(rollouts, scores)
    assert ppo.iteration == 0 and all(map(torch.equal, weights_of(ppo), before))


def test_a_step_without_episodes_is_refused(make):
    ppo = make()
    with pytest.raises(ConfigError, match="rollouts: got no episodes, want at least one"):
        ppo.step(ppo.rollout([]), [])


def test_scores_of_every_kind_are_the_same(make):
    given = [0.5, 1.0, -2.0, 0.0]
    tensor = torch.tensor(given)
    found = []
    for scores in (given, tensor, tensor.double().numpy(), tuple(tensor), list(tensor.numpy())):
        ppo = make(batch_size=4)
        ppo.step(ppo.rollout(PROMPTS[:4]), scores)
        found.append(weights_of(ppo))
    assert all(all(map(torch.equal, one, found[0])) for one in found)


def test_steps_that_only_skip_end_in_an_error(make, monkeypatch):
    ppo = make(max_skipped_steps=4, num_mini_batches=2)
    for optimizer in (ppo.learner.policy_optimizer, ppo.learner.value_optimizer):
        monkeypatch.setattr(optimizer, "grad_norm", lambda: math.nan)
    ppo.step(ppo.rollout(PROMPTS), [1.0] * 8)
    with pytest.raises(EngineError, match="step 2: got 4 optimizer steps in a row .* max_skipped_steps = 4"):
        ppo.step(ppo.rollout(PROMPTS), [1.0] * 8)
    assert ppo.iteration == 2


def test_a_sampler_that_is_not_the_trainer_ends_in_an_error(make):
    ppo = make(max_ratio_deviation=0.1, num_mini_batches=1)
    rollouts = ppo.rollout(PROMPTS)
    if not ppo.policy.model.batch_invariant:
        pytest.skip("the policy scores its answers again")
    wrong = [dataclasses.replace(c, logprobs=c.logprobs - 0.25) for c in rollouts.completions]
    with pytest.raises(EngineError, match="parity: the first minibatch's ratio is"):
        ppo.step(dataclasses.replace(rollouts, completions=tuple(wrong)), [0.0] * 8)


@pytest.mark.parametrize("clamp", [None, 2.0])
def test_a_log_ratio_beyond_the_clamp_has_no_gradient(clamp, make):
    """All log-ratios are 3. The clip alone leaves tokens of negative advantage their gradient."""
    ppo = make(max_ratio_deviation=None, num_mini_batches=1, log_ratio_clamp=clamp)
    if not ppo.policy.model.batch_invariant:
        pytest.skip("the policy scores its answers again")
    rollouts = ppo.rollout(PROMPTS)
    moved = [dataclasses.replace(c, logprobs=c.logprobs - 3.0) for c in rollouts.completions]
    stats = ppo.step(dataclasses.replace(rollouts, completions=tuple(moved)), [float(i) for i in range(8)])
    assert (stats["policy/grad_norm_ppo"] > 0) == (clamp is None)
    u = clamp or 3.0
    assert stats["policy/approxkl_k1_avg"] == pytest.approx(-u, rel=1e-5)
    assert stats["policy/approxkl_avg"] == pytest.approx(u**2 / 2, rel=1e-5)
    assert stats["policy/approxkl_k3_avg"] == pytest.approx(math.expm1(u) - u, rel=1e-5)


def test_a_clamp_is_above_0(make):
    with pytest.raises(ConfigError, match="log_ratio_clamp: got 0"):
        make(log_ratio_clamp=0)
