"""Out of memory: a message that names the largest items and the flags that help, exit code 1."""

import json
from pathlib import Path

import pytest
import torch
from run import faulty

from engine.stages import sft as sft_stage
from engine.stages.out_of_memory import expected, helpful_flags, is_out_of_memory, memory_items
from engine.train import main


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"
                     " allocate 400000000000000 bytes. Error code 12 (Cannot allocate memory)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
    ],
)  # fmt: skip
def test_it_is_one_message(error, setting, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(sft_stage, "predicting", full)
    argv = faulty.sft_words(setting, tmp_path / "run", micro_batch_tokens=4096)
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "Traceback" not in said
    assert "GB  moments" in said and "--micro_batch_tokens (now 4096)" in said
    assert "--resume_from_checkpoint true" in said


def test_what_torch_says_when_it_has_no_memory():
    """The words that its allocator uses today."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55)
    assert is_out_of_memory(refused.value)


def test_other_errors_are_not_taken_for_it(setting, tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(sft_stage, "predicting", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(faulty.sft_words(setting, tmp_path / "run"))


def test_items_are_what_the_stages_hold(setting, tmp_path):
    """Counted against the tensors of a checkpoint: masters 4 P, moments 8 P, average 4 P."""
    import engine
    from engine.run import checkpoint

    config = faulty.ppo(setting, tmp_path / "run", total_episodes=4)
    engine.train_ppo(config)
    found = checkpoint.load(checkpoint.kept(tmp_path / "run")[0]).tensors
    size = {
        name: sum(4.0 * t.numel() for t in group.values() if t.dim())
        for name, group in found.items()
    }
    phases = expected(config).phases
    saves, samples = phases["saves"], phases["samples"]
    assert saves["policy masters"] + saves["value masters"] == size["policy"] + size["value"]
    moments = size["optimizer_policy"] + size["optimizer_value"]
    assert saves["policy moments"] + saves["value moments"] == moments
    assert saves["policy average"] == size["ema"]
    assert saves["checkpoint"] == sum(size.values())
    assert samples["reference"] >= size["policy"]  # float32, and packed where there are kernels
    assert 0 < samples["cache"] <= 2e9


@pytest.mark.parametrize("make", [faulty.sft, faulty.rm, faulty.ppo])
def test_the_flags_exist(make, setting, tmp_path):
    config = make(setting, tmp_path / "run")
    names = [flag.split()[0].removeprefix("--") for flag in helpful_flags(config)]
    assert names and all(hasattr(config, name) for name in names)
    sizes = [size for _, size in memory_items(config)]
    assert sizes == sorted(sizes, reverse=True) and all(size > 0 for size in sizes)
    assert json.loads((Path(setting["model"]) / "config.json").read_text())["vocab_size"] == 263
