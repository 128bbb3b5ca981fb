"""What two ranks do together when one of them meets a fault, started by tests/several_processes.py; each checks."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run import faulty
from several_processes import train

import engine
from engine.errors import CheckpointError, EngineError, OutputError
from engine.model import transformer
from engine.model.weights import load_policy
from engine.run import checkpoint, files, memory
from engine.run.distributed import Ranks, join, local
from engine.run.optim import Optimizer
from engine.run.session import Stopped
from engine.run.sharded_checkpoint import ShardedSaver, is_sharded_checkpoint, load
from engine.stages.resources import settle_epochs
from engine.stages.sft import SFTStage

BAD = 1  # the rank that meets the fault


@contextmanager
def replaced(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """owner.name(...) calls wrapper(what it was, ...) inside."""
    was = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: wrapper(was, *arguments, **options))
    try:
        yield
    finally:
        setattr(owner, name, was)


def begin() -> Ranks:
    torch.set_num_threads(1)
    return join("cpu")


def records(config: dict[str, Any], name: str) -> list[float]:
    lines = (Path(config["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def events(config: dict[str, Any]) -> str:
    return (Path(config["output_dir"]) / "events.jsonl").read_text()


def whole_steps(config: dict[str, Any]) -> list[int]:
    """Steps of the checkpoints, each of which is whole; nothing half-written lies beside them."""
    folder = Path(config["output_dir"])
    assert not list(folder.glob(".tmp*")) and not list(folder.glob(".replaced*"))
    return [checkpoint.verify(path)["step"] for path in checkpoint.kept(folder)]


def a_damaged_shard(config: dict[str, Any]) -> None:
    """It is named, by every rank, and the checkpoint before it is used; the end is the same to the byte."""
    ranks, folder = begin(), Path(config["output_dir"])
    config = config | {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
    train("sft", config)
    assert whole_steps(config) == [1, 2, 3]
    wanted = (folder / "model.safetensors").read_bytes()
    (shard,) = (folder / "checkpoint-3").glob("shard-00002*")
    ranks.wait()
    if ranks.is_first:
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
    ranks.wait()
    with pytest.raises(CheckpointError, match=r"checkpoint-3/shard-00002.*the manifest says"):
        train("sft", {**config, "resume_from_checkpoint": str(folder / "checkpoint-3")})
    train("sft", {**config, "resume_from_checkpoint": "true"})
    assert f"going on from {folder / 'checkpoint-2'}" in events(config)
    assert "passed over" in events(config) and "checkpoint-3/shard-00002" in events(config)
    assert whole_steps(config) == [1, 2, 3]
    assert (folder / "model.safetensors").read_bytes() == wanted
    missing_and_strange_shards(config, ranks)


def missing_and_strange_shards(config: dict[str, Any], ranks: Ranks) -> None:
    """A manifest that knows nothing of a shard, with and without the file: nothing is read as what lay in memory."""
    model = load_policy(Path(config["model_name_or_path"]), "float32", True, "cpu", ranks)
    path, like = Path(config["output_dir"]) / "checkpoint-3", {"model": model.state()}
    load(path, like, ranks)
    ranks.wait()
    if ranks.is_first:
        manifest = json.loads((path / "manifest.json").read_text())
        (name,) = [name for name in manifest["files"] if name.startswith("shard-00001")]
        del manifest["files"][name]
        (path / "manifest.json").write_text(json.dumps(manifest))
    ranks.wait()
    with pytest.raises(CheckpointError, match="its manifest knows nothing"):
        load(path, like, ranks)
    ranks.wait()
    if ranks.is_first:
        (path / name).unlink()  # of the first rows: the shapes are still what is wanted
    ranks.wait()
    with pytest.raises(CheckpointError, match="a shard is missing"):
        load(path, like, ranks)
    ranks.wait()
    if ranks.is_first:
        shutil.rmtree(path)
    ranks.wait()


def a_bad_gradient(config: dict[str, Any]) -> None:
    """One number of one rank's shard is not finite: no rank takes that step, all count it."""
    ranks, seen = begin(), []

    def step(was: Callable[..., Any], self: Optimizer, *arguments: Any) -> Any:
        masters = list(self.parameters.values())
        if len(seen) == 1 and ranks.rank == BAD:
            local(masters[0].grad).view(-1)[0] = float("nan")
        before = [local(p).detach().clone() for p in masters]
        result = was(self, *arguments)
        seen.append((result.skipped, any(not torch.equal(local(p), b) for p, b in zip(masters, before, strict=True))))
        return result

    with replaced(Optimizer, "step", step):
        train("sft", config | {"max_steps": 3})
    assert seen == [(False, True), (True, False), (False, True)]
    assert records(config, "skipped_steps") == [0.0, 1.0, 1.0]


def bad_losses(config: dict[str, Any]) -> None:
    """One rank's losses are not finite: both ranks skip, and end after so many in a row, with the state saved."""
    ranks = begin()

    def logprob_loss(was: Callable[..., Any], *arguments: Any) -> Any:
        loss, *others = was(*arguments)
        return (loss * float("inf") if ranks.rank == BAD else loss), *others

    stuck = pytest.raises(EngineError, match="2 optimizer steps in a row")
    with replaced(transformer, "logprob_loss", logprob_loss), stuck:
        train("sft", config | {"max_steps": 5, "max_skipped_steps": 2})
    assert whole_steps(config) == [2] and records(config, "skipped_steps") == [1.0, 2.0]
    train("sft", config | {"max_steps": 5, "max_skipped_steps": 2, "resume_from_checkpoint": "true"})
    assert records(config, "skipped_steps") == [1.0, 2.0, 2.0, 2.0, 2.0]


def a_stop(config: dict[str, Any]) -> None:
    """SIGTERM to one rank: both finish the step, save together and stop at it."""
    ranks = begin()

    def train_step(was: Callable[..., Any], self: SFTStage, rows: Any, step: int) -> Any:
        if step == 1 and ranks.rank == BAD:
            os.kill(os.getpid(), signal.SIGTERM)
        return was(self, rows, step)

    with replaced(SFTStage, "train_step", train_step), pytest.raises(Stopped, match="after step 2"):
        train("sft", config | {"max_steps": 4})
    assert whole_steps(config) == [2]
    train("sft", config | {"max_steps": 4, "resume_from_checkpoint": "true"})
    assert len(records(config, "loss")) == 4


def a_full_disk(config: dict[str, Any]) -> None:
    """One rank cannot write its shard, then the first cannot complete the folder: both end, the one before stays."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    ranks, config = begin(), config | {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
    calls: list[int] = []

    def write_data(was: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(1)
        if ranks.rank == BAD and len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return was(*arguments)

    with (
        replaced(HuggingFaceStorageWriter, "write_data", write_data),
        pytest.raises(OutputError, match=r"checkpoint-2: cannot be written \(rank 1: .*No space left"),
    ):
        train("sft", config)
    assert whole_steps(config) == [1]

    def refusing(was: Callable[..., Any], path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with (
        replaced(checkpoint, "sync", refusing),
        pytest.raises(OutputError, match=r"cannot be written \(rank 0: .*Input/output error"),
    ):
        train("sft", config | {"resume_from_checkpoint": "true"})
    assert whole_steps(config) == [1]
    train("sft", config | {"resume_from_checkpoint": "true"})
    assert whole_steps(config) == [1, 2, 3]
    missing = Path(config["output_dir"]) / "model.safetensors"
    assert missing.is_file()


def writing_beside_training(config: dict[str, Any]) -> None:
    """Training waits for the copy alone and goes on, with its own messages; an error is found by all at one call."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    ranks, folder, gate, faults = begin(), Path(config["output_dir"]), threading.Event(), []

    def write_data(was: Callable[..., Any], *arguments: Any) -> Any:
        assert gate.wait(60)
        if faults and ranks.rank == BAD:
            raise faults.pop()
        return was(*arguments)

    model = load_policy(Path(config["model_name_or_path"]), "float32", True, "cpu", ranks)
    state, saver = {"model": model.state()}, ShardedSaver(folder, 1, ranks)
    wanted = {name: local(tensor).clone() for name, tensor in state["model"].items()}
    with replaced(HuggingFaceStorageWriter, "write_data", write_data):
        saver.save(1, state, {"x": 1}, interim=False)
        assert not checkpoint.kept(folder) and ranks.any(True)
        for tensor in state["model"].values():
            local(tensor).add_(100.0)
        saver.check()
        assert saver.finished() == [] and ranks.sums([1.0]) == [2.0]
        gate.set()
        saver.wait()
        told = saver.finished()
        assert [saved.path.name for saved in told] == ["checkpoint-1"] * ranks.is_first
        found = load(folder / "checkpoint-1", state, ranks).tensors["model"]
        assert all(torch.equal(local(found[name]), tensor) for name, tensor in wanted.items())

        faults.append(OSError(errno.ENOSPC, "No space left on device"))
        saver.save(2, state, {"x": 1}, interim=False)
        calls = 0
        slow = replaced(shutil, "rmtree", lambda was, *given, **more: (time.sleep(1.0), was(*given, **more)))
        with slow, pytest.raises(OutputError, match=r"checkpoint-2: cannot be written \(rank 1"):
            while calls < 10**6:
                calls += 1
                saver.check()
        assert whole_steps(config) == [1]  # at once: no rank goes on before the first has put the folder away
        assert ranks.largest(calls) == ranks.smallest(calls)
    saver.check()
    saver.close()


def another_config(config: dict[str, Any]) -> None:
    """What the first rank refuses, all refuse; a used folder too."""
    begin()
    train("sft", config | {"max_steps": 1})
    resumed = config | {"max_steps": 1, "resume_from_checkpoint": "true"}
    with pytest.raises(CheckpointError, match="seed: was 0, is 1"):
        train("sft", resumed | {"seed": 1})
    with pytest.raises(EngineError, match="of an earlier run"):
        train("sft", config | {"max_steps": 1})
    train("sft", resumed | {"seed": 1, "allow_config_change": ["seed"]})


def from_an_earlier_checkpoint(config: dict[str, Any]) -> None:
    """The first rank moves the later ones aside, and none goes on before; the end is the same to the byte."""
    ranks, folder = begin(), Path(config["output_dir"])
    config = config | {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
    train("sft", config)
    wanted = (folder / "model.safetensors").read_bytes()
    ranks.wait()
    called = []

    def set_aside(was: Callable[..., Any], *arguments: Any) -> Any:
        called.append(ranks.rank)
        time.sleep(0.5)
        return was(*arguments)

    def train_step(was: Callable[..., Any], self: SFTStage, rows: Any, step: int) -> Any:
        assert step > 1 or whole_steps(config) == [1]
        ranks.wait()
        return was(self, rows, step)

    with replaced(checkpoint, "set_aside", set_aside), replaced(SFTStage, "train_step", train_step):
        train("sft", config | {"resume_from_checkpoint": str(folder / "checkpoint-1")})
    assert called == [0] * ranks.is_first
    assert whole_steps(config) == [1, 2, 3]
    assert [path.name for path in checkpoint.kept(folder / "previous-1")] == ["checkpoint-2", "checkpoint-3"]
    assert (folder / "model.safetensors").read_bytes() == wanted


def a_reward_that_fails(config: dict[str, Any], how: str) -> None:
    """The function is the first rank's; its error is everybody's, after all have saved what was learned."""
    begin()
    config = config | {"rewards": [{"source": f"run.faulty:{how}"}], "reward_timeout_s": 1.0}
    faulty.State.calls_until = 1
    said = "no answer within 1 s" if how == "hangs" else "KeyError"
    with pytest.raises(EngineError, match=said):
        train("ppo", config)
    assert whole_steps(config) == [1]
    assert is_sharded_checkpoint(Path(config["output_dir"]) / "checkpoint-1")
    faulty.State.calls_until = 100
    train("ppo", config | {"resume_from_checkpoint": "true"})
    assert len(records(config, "objective/scores")) == 3


def the_same_choice(config: dict[str, Any]) -> None:
    """Ranks with unlike memory cut alike, for the one that has less."""
    ranks, config = begin(), config | {"per_device_train_batch_size": 400}
    chosen = []
    for free in (4e11, 2e7):
        with replaced(memory, "available_bytes", lambda was, free=free: int(4e11 if ranks.is_first else free)):
            settled, line = settle_epochs(engine.SFTConfig(**config), "lm_head", [60] * 1000, ranks=ranks)
        assert ranks.largest(settled.token_budget) == ranks.smallest(settled.token_budget)
        assert "of each of 2 processes" in line
        chosen.append(settled.token_budget)
    assert chosen[1] < chosen[0]
    with (
        replaced(memory, "available_bytes", lambda was: int(4e11 if ranks.is_first else 1e5)),
        pytest.raises(EngineError, match="each of 2 processes needs"),
    ):
        settle_epochs(engine.SFTConfig(**config), "lm_head", [60] * 1000, ranks=ranks)


def until(config: dict[str, Any], file: str) -> None:
    """A run that goes on when a file is there."""
    begin()

    def train_step(was: Callable[..., Any], self: SFTStage, rows: Any, step: int) -> Any:
        while not Path(file).exists():
            time.sleep(0.05)
        return was(self, rows, step)

    with replaced(SFTStage, "train_step", train_step):
        train("sft", config | {"max_steps": 2})
    assert files.LOCK in os.listdir(config["output_dir"])
