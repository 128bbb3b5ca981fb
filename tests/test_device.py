"""Where things lie: the choice of a device, and whole stages on one that refuses what a GPU refuses.

tests/pretend_device.py says what that device proves and what it does not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_engines import save_tiny

from engine.data.pack import pack_sequences
from engine.errors import ConfigError, ModelError
from engine.kernels._backend import backend
from engine.model import transformer
from engine.model.weights import load_policy, resolve_dtype
from engine.run.device import choose_device, to_device, to_host
from engine.train import main, parse

PROGRAM = Path(__file__).with_name("on_pretend_device.py")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def with_gpu(monkeypatch):
    """As far as the choice sees."""
    monkeypatch.delenv("ENGINE_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@NO_GPU
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error(folder):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(
        ConfigError, match=r"got 'cuda', but torch .* sees no GPU; install .* --device cpu"
    ):
        load_policy(folder, device="cuda")


def test_with_a_gpu_auto_is_the_gpu(with_gpu, monkeypatch):
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    with backend("cpp"):  # which has no kernels for it
        assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setenv("ENGINE_DEVICE", "cpu")
    assert choose_device("auto") == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda", 0)


def test_an_unknown_device_is_an_error(monkeypatch):
    with pytest.raises(ConfigError, match="device: got 'tpu', want one of auto, cpu, cuda"):
        choose_device("tpu")
    monkeypatch.setenv("ENGINE_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="got 'gpu'"):
        choose_device("auto")


def words(stage: str, folder: Path, out: Path, *more: str) -> list[str]:
    return ["--stage", stage, "--model_name_or_path", str(folder), "--output_dir", str(out), *more]


@NO_GPU
def test_the_command_line_has_it(folder, tmp_path, capsys):
    reward = ["--reward_model_path", "r"]
    for stage, more in (("sft", []), ("rm", []), ("ppo", reward)):
        assert parse(words(stage, folder, tmp_path, *more))[1].device == "auto"
        assert parse(words(stage, folder, tmp_path, *more, "--device", "cuda"))[1].device == "cuda"
    assert main(words("sft", folder, tmp_path, "--device", "cuda", "--dry_run")) == 1
    assert "device: got 'cuda', but torch" in capsys.readouterr().err


def test_storage_and_activations_follow_the_device(folder):
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float32", torch.device("cuda")) == torch.float32
    model = load_policy(folder, "bfloat16", device="cpu")
    model.weights.device = torch.device("cuda", 0)
    assert model.act_dtype == model.kv_dtype == torch.bfloat16
    assert not model.batch_invariant


def test_the_host_copies_nothing_for_itself(folder):
    x = torch.arange(3)
    assert to_device(x, torch.device("cpu")) is x and to_host(x) is x


def test_ids_of_the_host_are_checked_before_they_are_copied(folder):
    model = load_policy(folder, "float32", device="cpu")
    with pytest.raises(ModelError, match="token 9999 in row 1"):
        transformer.forward(model, pack_sequences([[1, 9999]]))


def test_fused_parameters_are_refreshed_and_saved_as_their_own(folder):
    model = load_policy(folder, "bfloat16", trainable=True, device="cpu")
    weights = model.weights
    names = [f"layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    before = [weights.stored(name).clone() for name in names]
    whole = weights.fuse(names)
    assert torch.equal(whole, torch.cat(before)) and weights.fuse(names) is whole
    for name, was in zip(names, before, strict=True):
        assert torch.equal(weights.stored(name), was)
        assert weights.stored(name).untyped_storage().nbytes() == was.numel() * 2
        assert weights.packed(name).dense.untyped_storage().data_ptr() == whole.data_ptr()
    with torch.no_grad():
        model.parameters()[names[1]].add_(1.0)
    model.refresh()
    rows = [len(x) for x in before]
    assert torch.equal(whole.split(rows)[1], model.parameters()[names[1]].to(torch.bfloat16))
    assert torch.equal(whole.split(rows)[0], before[0])


# Each is a module whose copies to the device a stage cannot do without.
DEFECTS = [
    "sft:engine.model.transformer",
    "rm:engine.stages.rm",
    "ppo:engine.stages.ppo.trainer",
    "ppo:engine.stages.ppo.score",
    "ppo:engine.stages.ppo.rewards",
    "ppo:engine.stages.ppo.update",
    "generate:engine.generate.steps",
]


def pretend(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (PROGRAM.parent, PROGRAM.parents[1])))
    more_environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    environment = {**os.environ, **more_environment}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_stages_give_the_same_on_a_device_that_mixes_with_nothing(tmp_path):
    """And a copy that is forgotten is found."""
    done = pretend(tmp_path, "--stages", "sft", "rm", "ppo", "generate", "--forget", *DEFECTS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_decode_step_on_triton_waits_once(tmp_path):
    done = pretend(tmp_path, "--stages", "generate", "--backend", "triton")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    waits = json.loads(done.stdout.splitlines()[-1])["generate"]
    rows = (tmp_path / "generate-device" / "metrics.jsonl").read_text().splitlines()
    lengths = [len(json.loads(row)["tokens"]) for row in rows]
    plain, filtered = lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]
    assert waits.pop("copy to the host") == max(plain) + max(filtered)
    waits.pop("copy to the device")  # of the weights, once
    assert not waits
