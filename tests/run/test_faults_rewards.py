"""Reward functions that fail in every way: one clear error that names them, and no iteration lost."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
from run import faulty

import engine
from engine.errors import EngineError
from engine.run import checkpoint
from engine.run.time_limit import TimeLimitError, time_limit
from engine.stages.ppo import loop
from engine.stages.ppo.reward_sources import checked


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def calls(monkeypatch):
    """How many calls a faulty function answers well before it fails."""

    def until(count: int) -> None:
        monkeypatch.setattr(faulty.State, "calls_until", count)

    until(0)
    return until


def records(folder: Path) -> list[dict]:
    return [
        {
            k: v
            for k, v in json.loads(x).items()
            if k != "time" and "timing/" not in k and "perf/" not in k
        }
        for x in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def renamed(lines: list[dict], old: str) -> list[dict]:
    """The metric of a reward is called after its function."""
    return [{k.replace(f"rewards/{old}", "rewards/length"): v for k, v in x.items()} for x in lines]


FAULTS = {
    "raises": r"'raises': raised KeyError: 'no such judge' \(line \d+ of .*faulty.py\)",
    "gives_nan": "value 3 is 'nan', want a list of 4 numbers or None",
    "gives_infinity": r"value 3 is '1e\+300'",
    "gives_none": "got NoneType, want a list of 4 numbers",
    "gives_only_nones": "every reward function returned None",
    "gives_too_few": "got 3 values, want a list of 4",
    "gives_text": "value 3 is '1.0', want a list of 4 numbers",
    "gives_a_number": "got float, want a list of 4",
    "gives_a_matrix": r"value 0 is '\[0.0, 0.0\]'",
    "hangs": r"no answer within 0.3 s for 4 completions; .*--reward_timeout_s",
    "hangs_and_swallows": "no answer within 0.3 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_costs_no_iteration(fault, setting, tmp_path, calls):
    """It fails in the third iteration; the first two are saved, and a resume with a good function ends like a run
    whose function never failed."""
    calls(2)
    config = faulty.ppo(setting, tmp_path / "run", fault, reward_timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(EngineError, match=FAULTS[fault]):
        engine.train_ppo(config)
    assert time.monotonic() - began < 20
    assert [p.name for p in checkpoint.kept(tmp_path / "run")] == ["checkpoint-2"]
    calls(1000)
    engine.train_ppo(dataclasses.replace(config, resume_from_checkpoint="true"))
    engine.train_ppo(faulty.ppo(setting, tmp_path / "whole"))
    assert renamed(records(tmp_path / "run"), fault) == records(tmp_path / "whole")
    ours, theirs = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("run", "whole"))
    assert ours == theirs


def test_a_fault_in_a_validation_loses_neither_iteration_nor_validation(setting, tmp_path, calls):
    more = {"eval_dataset_name": setting["prompts"], "eval_num_prompts": 2, "eval_steps": 1}
    calls(4)  # before; 1 and its validation; 2; then the validation of 2
    config = faulty.ppo(setting, tmp_path / "run", "raises", **more)
    with pytest.raises(EngineError, match="no such judge"):
        engine.train_ppo(config)
    assert [p.name for p in checkpoint.kept(tmp_path / "run")] == ["checkpoint-2"]
    calls(1000)
    engine.train_ppo(dataclasses.replace(config, resume_from_checkpoint="true"))
    engine.train_ppo(faulty.ppo(setting, tmp_path / "whole", **more))
    assert renamed(records(tmp_path / "run"), "raises") == records(tmp_path / "whole")


class Killed(BaseException):
    """Stands for a kill: nothing of the engine may catch it."""


def test_a_validation_that_was_made_up_is_not_made_twice(setting, tmp_path, calls, monkeypatch):
    """It failed, the resumed run made it and was killed before its next checkpoint, and another run goes on."""
    more = {"eval_dataset_name": setting["prompts"], "eval_num_prompts": 2, "eval_steps": 1}
    calls(4)  # as above: the validation of 2 fails
    config = faulty.ppo(setting, tmp_path / "run", "raises", **more)
    with pytest.raises(EngineError, match="no such judge"):
        engine.train_ppo(config)
    calls(1000)

    def die(*_):
        raise Killed

    again = dataclasses.replace(config, resume_from_checkpoint="true")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "iterate", die)
        with pytest.raises(Killed):
            engine.train_ppo(again)
    engine.train_ppo(again)
    engine.train_ppo(faulty.ppo(setting, tmp_path / "whole", **more))
    assert renamed(records(tmp_path / "run"), "raises") == records(tmp_path / "whole")
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / x / "samples").iterdir()} for x in ("run", "whole")
    )
    assert ours == theirs


def test_a_run_without_a_checkpoint_begins_with_its_validation_again(setting, tmp_path, calls, monkeypatch):
    """The records of the one that was killed before its first checkpoint are moved away, that validation's too."""
    calls(1000)
    more = {"eval_dataset_name": setting["prompts"], "eval_num_prompts": 2, "resume_from_checkpoint": "true"}

    def die(*_):
        raise Killed

    config = faulty.ppo(setting, tmp_path / "run", "raises", **more)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "iterate", die)
        with pytest.raises(Killed):
            engine.train_ppo(config)
    assert [r["step"] for r in records(tmp_path / "run")] == [0]
    engine.train_ppo(config)
    engine.train_ppo(faulty.ppo(setting, tmp_path / "whole", "raises", **more))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert (tmp_path / "run" / "samples" / "before-0.jsonl").exists()


def test_a_checkpoint_that_was_due_is_kept_though_its_validation_failed(setting, tmp_path, calls):
    more = {"eval_dataset_name": setting["prompts"], "eval_num_prompts": 2, "eval_steps": 1}
    more |= {"save_steps": 2, "total_episodes": 16, "save_total_limit": 3}
    calls(4)  # as above: the validation of 2 fails
    config = faulty.ppo(setting, tmp_path / "run", "raises", **more)
    with pytest.raises(EngineError, match="no such judge"):
        engine.train_ppo(config)
    calls(1000)
    engine.train_ppo(dataclasses.replace(config, resume_from_checkpoint="true"))
    engine.train_ppo(faulty.ppo(setting, tmp_path / "whole", **more))
    ours, theirs = (
        [(p.name, checkpoint.read_manifest(p)["interim"]) for p in checkpoint.kept(tmp_path / x)]
        for x in ("run", "whole")
    )
    assert ours == theirs == [("checkpoint-2", False), ("checkpoint-4", False)]


def test_the_first_iteration_has_nothing_to_save(setting, tmp_path, calls):
    with pytest.raises(EngineError):
        engine.train_ppo(faulty.ppo(setting, tmp_path / "run", "raises"))
    assert checkpoint.kept(tmp_path / "run") == []


@pytest.mark.parametrize("kind", ["as_tensor", "as_numpy_scalars"])
def test_numbers_of_torch_and_numpy_are_numbers(kind, setting, tmp_path):
    engine.train_ppo(faulty.ppo(setting, tmp_path / "ours", kind))
    engine.train_ppo(faulty.ppo(setting, tmp_path / "plain"))
    ours, theirs = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("ours", "plain"))
    assert ours == theirs


def test_a_constant_reward_trains_on_finite_numbers(setting, tmp_path):
    engine.train_ppo(
        faulty.ppo(setting, tmp_path / "run", "constant", missing_eos_penalty=0.0, kl_coef=0.0)
    )
    for record in records(tmp_path / "run"):
        assert "non_finite" not in record and record["policy/skipped_steps"] == 0.0
        assert record["objective/scores_std"] == 0.0 and record["objective/scores"] == 0.25


def test_a_reward_model_that_scores_nan_is_named(setting, tmp_path, monkeypatch):
    """NaN of a model is no None of a function."""
    from engine.stages.ppo import reward_sources

    def broken(model, answers):
        return reward_sources.torch.full((len(answers.episodes),), float("nan"))

    monkeypatch.setattr(reward_sources, "answer_scores", broken)
    engine.train_reward_model(faulty.rm(setting, tmp_path / "rm", max_steps=1))
    config = faulty.ppo(
        setting, tmp_path / "run", rewards=[], reward_model_path=str(tmp_path / "rm")
    )
    with pytest.raises(
        EngineError, match="reward 'rm': the model scores 4 of 4 answers with a number that is not"
    ):
        engine.train_ppo(config)


def test_a_boundary_of_float32():
    assert checked("r", [3.4e38, None], 2)[0] == 3.4e38
    with pytest.raises(EngineError, match="value 0 is '3.5e"):
        checked("r", [3.5e38], 1)


def test_the_time_limit_leaves_nothing_behind():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # an alarm that was left would raise here
    with pytest.raises(TimeLimitError), time_limit(0.05):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_no_alarm_outside_the_main_thread():
    import threading

    errors = []

    def elsewhere() -> None:
        try:
            with time_limit(1.0):
                pass
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "--reward_timeout_s null" in errors[0]


def test_a_weighted_sum_beyond_float32_ends_the_run(setting, tmp_path):
    sources = [engine.RewardSource(source="run.faulty:constant", weight=1e40)]
    with pytest.raises(EngineError, match="scores: got inf for episode 0, want 4 finite numbers"):
        engine.train_ppo(faulty.ppo(setting, tmp_path / "run", rewards=sources))
