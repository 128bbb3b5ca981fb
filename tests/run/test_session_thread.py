"""A session outside the main thread, where Python lets nobody set signal handlers."""

import signal
from concurrent.futures import ThreadPoolExecutor

import engine
from engine.run.session import Session


def test_another_thread_leaves_the_signal_handlers_alone(tmp_path):
    config = engine.SFTConfig(model_name_or_path="m", output_dir=str(tmp_path / "run"), progress=False)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def handlers():
        with Session(config, "sft", 1, ()):
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result() == before
