"""Short configs of every stage on tiny models, and reward functions that misbehave, for the tests of faults."""

import time
from pathlib import Path

import torch
from small_engines import save_tiny
from stages.tiny_data import write_all

import engine
from engine.run.session import Session

COMMON = {"threads": 1, "progress": False, "dtype": "float32"}


def make_setting(folder: Path) -> dict[str, str]:
    save_tiny("llama", folder / "model")
    return {"model": str(folder / "model"), **write_all(folder)}


def sft_words(setting: dict[str, str], out: Path, **more: object) -> list[str]:
    """The command line of a small SFT run."""
    values = {"stage": "sft", "model_name_or_path": setting["model"], "output_dir": out}
    values |= {"dataset_name": setting["sft"], "max_length": 80, "progress": "false", "threads": 1}
    return [word for key, value in (values | more).items() for word in (f"--{key}", str(value))]


def sft(setting: dict[str, str], out: Path, **more) -> engine.SFTConfig:
    values = {"per_device_train_batch_size": 4, "max_steps": 3, "max_length": 80, "save_steps": 1}
    values |= {"dataset_name": setting["sft"], "model_name_or_path": setting["model"]} | COMMON
    return engine.SFTConfig(output_dir=str(out), **(values | more))


def rm(setting: dict[str, str], out: Path, **more) -> engine.RMConfig:
    values = {"per_device_train_batch_size": 4, "max_steps": 3, "max_length": 80, "save_steps": 1}
    values |= {"dataset_name": setting["rankings"], "model_name_or_path": setting["model"]} | COMMON
    return engine.RMConfig(output_dir=str(out), **(values | more))


def ppo(setting: dict[str, str], out: Path, reward: str = "length", **more) -> engine.PPOConfig:
    values = {
        "total_episodes": 12,
        "batch_size": 4,
        "num_mini_batches": 2,
        "response_length": 6,
        "max_length": 60,
    }
    values |= {"rewards": [engine.RewardSource(source=f"run.faulty:{reward}")], "save_steps": 100}
    values |= {"dataset_name": setting["prompts"], "model_name_or_path": setting["model"]} | COMMON
    return engine.PPOConfig(output_dir=str(out), **(values | more))


def written_at_once(monkeypatch) -> None:
    """The metrics of a checkpoint are there at the step after it, however slow the disk is."""
    real = Session.check

    def check(session: Session) -> dict[str, float]:
        session._saver.wait()  # wait_for_save would take its metrics
        return real(session)

    monkeypatch.setattr(Session, "check", check)


class State:
    """What the functions below do from the n-th call on; a test sets it and takes it back."""

    calls_until = 0


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def constant(prompts, completions, **columns):
    return [0.25] * len(completions)


def faulty(fault):
    """A reward that is right until State.calls_until calls have been made."""

    def function(prompts, completions, **columns):
        State.calls_until -= 1
        good = length(prompts, completions)
        return good if State.calls_until >= 0 else fault(good)

    return function


def _raise(good):
    raise KeyError("no such judge")


def _hang(good):
    while True:
        time.sleep(0.01)


def _hang_and_swallow(good):
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


raises = faulty(_raise)
hangs = faulty(_hang)
hangs_and_swallows = faulty(_hang_and_swallow)
gives_nan = faulty(lambda good: [*good[:-1], float("nan")])
gives_infinity = faulty(lambda good: [*good[:-1], 1e300])
gives_none = faulty(lambda good: None)
gives_only_nones = faulty(lambda good: [None] * len(good))
gives_too_few = faulty(lambda good: good[:-1])
gives_text = faulty(lambda good: [*good[:-1], "1.0"])
gives_a_number = faulty(lambda good: 1.0)
gives_a_matrix = faulty(lambda good: torch.zeros(len(good), 2))


def as_tensor(prompts, completions, **columns):
    return torch.tensor(length(prompts, completions))


def as_numpy_scalars(prompts, completions, **columns):
    return list(torch.tensor(length(prompts, completions)).numpy())
