"""What a stage finds of its process: threads in which Python sets no signal handlers, kernels that are loaded."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import engine
from engine import ops
from engine.errors import ConfigError
from engine.run.session import Session


def test_another_thread_leaves_the_signal_handlers_alone(tmp_path):
    config = engine.SFTConfig(model_name_or_path="m", output_dir=str(tmp_path / "run"), progress=False)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def handlers():
        with Session(config, "sft", 1, ()):
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result() == before


@pytest.mark.skipif(ops.cpu_class() in ("reference", "plain"), reason="there is no other class to ask for")
def test_a_class_of_kernels_that_is_not_loaded_is_refused(tmp_path):
    """Once the run was of the machine's class, and its config.yaml said the other."""
    more = {"model_name_or_path": "m", "output_dir": str(tmp_path / "run"), "cpu_class": "plain"}
    for stage in (
        lambda: engine.train_sft(engine.SFTConfig(**more)),
        lambda: engine.train_reward_model(engine.RMConfig(**more)),
        lambda: engine.train_ppo(engine.PPOConfig(reward_model_path="rm", **more)),
    ):
        with pytest.raises(ConfigError, match=f"cpu_class: got 'plain', want '{ops.cpu_class()}'.*ENGINE_CPU_CLASS"):
            stage()
    assert not (tmp_path / "run").exists()
