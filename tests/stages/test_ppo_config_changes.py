"""PPO's config: numbers that do not fit together are refused, and a change that is allowed on a resume is made."""

import json

import pytest
from run import faulty

import engine
from engine.errors import ConfigError
from engine.run.kl_control import AdaptiveKL


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("changes"))


def config(**more) -> engine.PPOConfig:
    values = {"model_name_or_path": "m", "output_dir": "o", "reward_model_path": "r"}
    return engine.PPOConfig(**(values | more))


def test_a_coefficient_that_is_allowed_to_change_changes(setting, tmp_path):
    """One that is fixed comes from the config; what the checkpoint had is not put back."""
    engine.train_ppo(faulty.ppo(setting, tmp_path / "run", max_steps=1))
    engine.train_ppo(
        faulty.ppo(
            setting, tmp_path / "run", max_steps=2, kl_coef=0.5, resume_from_checkpoint="true",
            allow_config_change=["max_steps", "kl_coef"],
        )
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["objective/kl_coef"] for line in lines] == [0.02, 0.5]


def test_a_coefficient_that_adapts_goes_on_unless_it_is_changed(setting, tmp_path):
    """From what it had become; from the new value where that is given."""
    adapting = {"kl_target": 0.5, "kl_horizon": 100}
    engine.train_ppo(faulty.ppo(setting, tmp_path / "whole", max_steps=3, **adapting))

    def coefficients(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["objective/kl_coef"] for line in lines]

    whole = coefficients("whole")
    assert len(set(whole)) == 3
    for name, more, want in (("same", {}, whole[2]), ("changed", {"kl_coef": 0.5}, 0.5)):
        engine.train_ppo(faulty.ppo(setting, tmp_path / name, max_steps=2, **adapting))
        engine.train_ppo(
            faulty.ppo(
                setting, tmp_path / name, max_steps=3, resume_from_checkpoint="true",
                allow_config_change=["max_steps", "kl_coef"], **adapting, **more,
            )
        )  # fmt: skip
        assert coefficients(name) == [*whole[:2], want]


@pytest.mark.parametrize("samples,parts", [(4, 3), (8, 2), (1, 9)])
def test_more_minibatches_than_prompts_are_refused(samples, parts):
    wanted = f"at most batch_size / num_samples = 8 / {samples} = {8 // samples}"
    with pytest.raises(ConfigError, match=f"^num_mini_batches: got {parts}, want {wanted}"):
        config(batch_size=8, num_samples=samples, num_mini_batches=parts)
    config(batch_size=8, num_samples=samples, num_mini_batches=8 // samples)


def test_a_horizon_that_makes_the_coefficient_negative_is_refused():
    want = r"want more than 0.2 \* batch_size = 102.4 together with kl_target: .*kl_coef 0 or negative"
    for horizon in (100, 102):
        with pytest.raises(ConfigError, match=f"^kl_horizon: got {horizon}, {want}"):
            config(batch_size=512, kl_target=6.0, kl_horizon=horizon)
    with pytest.raises(ConfigError, match="kl_horizon: got 1,"):  # exactly a fifth: the coefficient would be 0
        config(batch_size=5, num_mini_batches=1, kl_target=6.0, kl_horizon=1)
    smallest = config(batch_size=512, kl_target=6.0, kl_horizon=103)
    control = AdaptiveKL(smallest.kl_coef, 6.0, smallest.kl_horizon)
    assert control.after(0.0, smallest.batch_size).beta > 0
    config(batch_size=512, kl_horizon=100)  # without a target nobody asks


def test_a_controller_refuses_a_batch_beyond_its_horizon():
    """Somebody else's loop gives batches of any size."""
    with pytest.raises(ConfigError, match="got 500 episodes at once with a horizon of 100, want a horizon above 100;"):
        AdaptiveKL(0.02, 6.0, 100).after(0.0, 500)
    assert AdaptiveKL(0.02, 6.0, 100).after(0.0, 499).beta > 0


def test_a_kl_controller_cannot_begin_at_zero():
    want = r"kl_coef: got 0.0, want a number above 0 together with kl_target: .* raise kl_coef"
    with pytest.raises(ConfigError, match=want):
        config(kl_target=6.0, kl_coef=0.0)
    assert config(kl_coef=0.0).kl_target is None
