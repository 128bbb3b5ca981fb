"""What PPO writes about itself: rewards of equal names, rates of tokens, the perplexity of a policy that diverged."""

import json
from pathlib import Path

import pytest
from run import faulty
from small_engines import CONTEXT, byte_tokenizer
from stages.tiny_data import write

import engine
from engine.data.tokenizer import load_tokenizer
from engine.model.weights import save_scalar, scalar_from_policy
from engine.stages.inputs import load_ppo_data
from engine.stages.ppo import evaluate
from engine.stages.ppo.reward_sources import load_rewards, term_names


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("records"))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def source(text: str) -> engine.RewardSource:
    return engine.RewardSource(source=text)


def constant(prompts, completions, **columns):
    return [-100.0] * len(completions)


def test_rewards_of_equal_names_are_all_in_the_metrics(setting, tmp_path):
    both = [source("run.faulty:constant"), source("stages.test_ppo_records:constant")]
    engine.train_ppo(
        faulty.ppo(setting, tmp_path / "run", rewards=both, max_steps=1, missing_eos_penalty=0.0)
    )
    (record,) = records(tmp_path / "run")
    assert record["rewards/constant"] == 0.25 and record["rewards/constant_2"] == -100.0
    assert record["objective/scores"] == -99.75


def test_validation_prompts_are_of_every_part_of_a_mixture(setting, tmp_path):
    parts = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(60)]) for name in "ab"]
    more = {"dataset_name": None, "dataset_mixture": [engine.DataSource(part) for part in parts]}
    given = faulty.ppo(setting, tmp_path / "run", eval_fraction=0.5, eval_num_prompts=10, **more)
    found = load_ppo_data(given, load_tokenizer(setting["model"]), CONTEXT).eval_prompts
    assert len(found) == 10 and len({prompt.source for prompt in found}) == 2


def test_scores_are_what_was_paid_and_raw_scores_what_the_reward_gave(setting, tmp_path):
    """TRL's names, with TRL's sum."""
    engine.train_ppo(
        faulty.ppo(
            setting, tmp_path / "run", "constant", max_steps=1, missing_eos_penalty=3.0, response_length=1, kl_coef=0.5
        )
    )  # fmt: skip
    (record,) = records(tmp_path / "run")
    assert record["objective/raw_scores"] == 0.25 and record["val/eos_rate"] < 1
    assert record["objective/scores"] == pytest.approx(0.25 - 3.0 * (1 - record["val/eos_rate"]))
    sum_ = record["objective/non_score_reward"] + record["objective/scores"]
    assert record["objective/rlhf_reward"] == pytest.approx(sum_)


def test_reward_models_of_equal_names_are_told_apart(setting, tmp_path):
    folders = [tmp_path / name / "rm" for name in ("one", "two")]
    for folder in folders:
        model = scalar_from_policy(setting["model"], 0, "float32")
        save_scalar(model, folder, tokenizer=byte_tokenizer())
    config = faulty.ppo(
        setting, tmp_path / "run", rewards=[source(str(folders[1]))], reward_model_path=str(folders[0])
    )
    assert [reward.name for reward in load_rewards(config)] == ["rm", "rm_2"]


def test_a_numbered_name_takes_nobody_elses():
    sources = [source(text) for text in ("a:r", "b:r", "c:r", "d:r_2", "e/r/", "f:other", "/")]
    assert term_names(sources) == ["r", "r_3", "r_4", "r_2", "r_5", "other", "reward"]


@pytest.mark.parametrize("epochs,coefficient", [(1, 2.0), (3, 2.0), (1, 0.0), (3, 0.0)])
def test_rates_count_the_tokens_that_were_trained_on(epochs, coefficient, setting, tmp_path):
    """Every inner epoch for the update; pretraining text only where it has a weight."""
    engine.train_ppo(
        faulty.ppo(
            setting, tmp_path / "run", max_steps=1, num_ppo_epochs=epochs, ptx_coef=coefficient,
            ptx_dataset_name=setting["text"], ptx_per_episode=1.5, ptx_length=16,
        )
    )  # fmt: skip
    (record,) = records(tmp_path / "run")

    def tokens(rate: str, phase: str) -> float:
        return record[f"perf/{rate}"] * record[f"timing/{phase}"]

    episodes = tokens("score_tokens_per_s", "score")
    ptx = 6 * 16 if coefficient else 0
    assert episodes > tokens("rollout_tokens_per_s", "rollout") > 0
    assert tokens("update_tokens_per_s", "update") == pytest.approx(epochs * episodes + ptx)
    assert tokens("tokens_per_s", "iteration") == pytest.approx(episodes + ptx)


@pytest.mark.parametrize("loss", [1000.0, float("inf")])
def test_the_perplexity_of_a_diverged_policy_is_infinite(loss, setting, tmp_path, monkeypatch):
    """Written as every number that is not finite; the run goes on."""
    monkeypatch.setattr(evaluate, "mean_lm_loss", lambda *_: loss)
    engine.train_ppo(
        faulty.ppo(setting, tmp_path / "run", max_steps=1, eval_ptx_dataset_name=setting["text"], ptx_length=16)
    )
    found = [r for r in records(tmp_path / "run") if "timing/evaluate" in r]
    assert [r["step"] for r in found] == [0, 1]
    for record in found:
        assert record["eval/ptx_perplexity"] is None and "eval/ptx_perplexity" in record["non_finite"]
        assert loss > 1000 or record["eval/ptx_loss"] == loss


@pytest.mark.parametrize("logging_steps,lines", [(1, [3, 5]), (2, [4, 6]), (5, [5])])
def test_metrics_of_a_checkpoint_wait_for_the_next_line(logging_steps, lines, setting, tmp_path, monkeypatch):
    """Written at once here: those of iterations 2 and 4 are known of at 3 and 5, that of 6 at the end."""
    faulty.written_at_once(monkeypatch)
    config = faulty.ppo(
        setting, tmp_path / "run", total_episodes=24, save_steps=2, logging_steps=logging_steps
    )
    engine.train_ppo(config)
    assert [r["step"] for r in records(tmp_path / "run") if "timing/checkpoint_write" in r] == lines


def of_talks(prompts, completions, messages, **columns):
    """1 where the prompt's text and the column say the same."""
    assert all(isinstance(text, str) for text in (*prompts, *completions))
    said = ["hi" if talk is None else talk[-1]["content"] for talk in messages]
    return [float(text == want) for text, want in zip(prompts, said, strict=True)]


def test_a_reward_function_gets_prompts_as_text_and_talks_as_a_column(setting, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}]} for i in range(4)] + [{"prompt": "hi"}]
    data = write(tmp_path / "prompts.jsonl", rows)
    rewards = [source("stages.test_ppo_records:of_talks")]
    engine.train_ppo(faulty.ppo(setting, tmp_path / "run", rewards=rewards, dataset_name=data, max_steps=2))
    assert [record["rewards/of_talks"] for record in records(tmp_path / "run")] == [1.0, 1.0]


def test_columns_named_as_a_rewards_arguments_are_not_given_to_it(setting, tmp_path):
    rows = [{"prompt": f"say {i}", "prompts": i, "completions": ["x"]} for i in range(8)]
    data = write(tmp_path / "prompts.jsonl", rows)
    engine.train_ppo(faulty.ppo(setting, tmp_path / "run", dataset_name=data, max_steps=1))
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert events.count("are its own arguments: prompts, completions") == 1
