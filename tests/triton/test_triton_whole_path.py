"""SFT, the reward model and PPO-ptx with every op on Triton, against the same runs on the torch definitions.

Both are float32 with other orders of sums. A log-prob of these models is a difference of sums of about 300 terms of
size 1 to 10, exact to about 1e-6, so losses agree to 1e-5. A gradient is a sum of products of such numbers: its norm
agrees to 1e-4. Adam's first step divides each gradient by itself, so an element that is rounding only moves by the
learning rate in any direction; there are few of them, and the whole move agrees to 1 % of its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_engines import SIZES, save_tiny
from stages.tiny_data import write_all

import engine
from engine.kernels import _backend
from engine.model.weights import save_scalar, scalar_from_policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {
    "llama": {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    },
    "gpt2": {"n_embd": 16, "n_inner": 20, "n_layer": 1, "n_head": 2, "n_positions": 128},
}  # fmt: skip
COMMON = {"threads": 1, "progress": False, "dtype": "float32", "device": DEVICE}
EPOCHS = {
    "per_device_train_batch_size": 2, "max_steps": 2, "max_length": 80, "learning_rate": 1e-3,
    "micro_batch_tokens": 60,
}  # fmt: skip
FORWARD = {"rmsnorm", "linear", "rope", "attention", "swiglu"}
NETWORK = FORWARD | {"rmsnorm_backward", "linear_backward", "attention_backward", "swiglu_backward"}
NETWORK |= {"adamw_steps", "square_sums"}
GPT2 = {"layernorm", "gelu", "linear", "attention", "adamw_steps", "square_sums"}
GPT2 |= {"layernorm_backward", "gelu_backward", "linear_backward", "attention_backward"}
HEAD = {"linear_logprob", "linear_logprob_backward"}
DECODE = {"rmsnorm_residual", "rope_and_write", "attention_decode", "linear_sample"}
OPS = {
    "sft": NETWORK | HEAD,
    "sft of gpt2": GPT2 | HEAD,
    "rm": NETWORK | {"ranking_loss"},
    "ppo": NETWORK | HEAD | DECODE
    | {"kl_reward_gae", "whiten", "ppo_policy_loss", "ppo_value_loss"},
}  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for family, sizes in TINY.items():
            patch.setitem(SIZES, family, sizes)
        save_tiny("llama", folder / "base")
        save_tiny("gpt2", folder / "gpt2")
    reward = scalar_from_policy(folder / "base", seed=0, dtype="float32", device="cpu")
    save_scalar(reward, folder / "reward")
    made = {name: str(folder / name) for name in ("base", "gpt2", "reward")}
    return {**made, **write_all(folder)}


def sft(setting: dict[str, str], out: Path) -> Path:
    """With exact products, so that linear's own kernel runs too."""
    return engine.train_sft(
        engine.SFTConfig(
            model_name_or_path=setting["base"], output_dir=str(out), dataset_name=setting["sft"],
            exact_logprobs=True, **COMMON, **EPOCHS,
        )
    )  # fmt: skip


def sft_of_gpt2(setting: dict[str, str], out: Path) -> Path:
    return engine.train_sft(
        engine.SFTConfig(
            model_name_or_path=setting["gpt2"], output_dir=str(out), dataset_name=setting["sft"],
            **COMMON, **EPOCHS,
        )
    )  # fmt: skip


def rm(setting: dict[str, str], out: Path) -> Path:
    return engine.train_reward_model(
        engine.RMConfig(
            model_name_or_path=setting["base"], output_dir=str(out),
            dataset_name=setting["rankings"], demonstrations_limit=2, **COMMON, **EPOCHS,
        )
    )  # fmt: skip


def ppo(setting: dict[str, str], out: Path) -> Path:
    """One iteration of two optimizer steps, two samples a prompt."""
    return engine.train_ppo(
        engine.PPOConfig(
            model_name_or_path=setting["base"], reward_model_path=setting["reward"],
            output_dir=str(out), dataset_name=setting["prompts"], ptx_dataset_name=setting["text"],
            max_length=60, total_episodes=4, batch_size=4, num_samples=2, num_mini_batches=2,
            response_length=4, ptx_length=12, ptx_per_episode=0.5, learning_rate=1e-3,
            **COMMON,
        )
    )  # fmt: skip


STAGES: dict[str, Callable[[dict[str, str], Path], Path]] = {
    "sft": sft, "sft of gpt2": sft_of_gpt2, "rm": rm, "ppo": ppo,
}  # fmt: skip
EXACT = ("loss", "entropy", "objective", "completions", "val/", "policy/", "margin", "accuracy")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(folder: Path, start: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every weight's move since `start`, one after the other; a new head's is left out, and that of GPT-2's bias of the
    keys, which no softmax sees: its gradients are rounding alone."""
    found = load_file(folder / "model.safetensors")
    moves = {n: found[n] - start[n] for n in sorted(start) if n in found}
    for name in moves:
        if name.endswith("c_attn.bias"):
            moves[name].chunk(3)[1].zero_()
    return torch.cat([move.flatten() for move in moves.values()]).double()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_triton_is_the_stage_on_the_definitions(stage, setting, tmp_path, monkeypatch):
    seen: dict[str, int] = {}
    run = _backend._run_triton

    def counted(op: str, *arguments: Any) -> Any:
        seen[op] = seen.get(op, 0) + 1
        return run(op, *arguments)

    monkeypatch.setattr(_backend, "_run_triton", counted)
    monkeypatch.setenv("ENGINE_BACKEND", "reference")
    theirs = STAGES[stage](setting, tmp_path / "reference")
    assert not seen
    monkeypatch.setenv(
        "ENGINE_BACKEND", "triton"
    )  # an op that could not run on it would be an error
    ours = STAGES[stage](setting, tmp_path / "triton")
    assert not OPS[stage] - seen.keys(), f"did not run on Triton: {OPS[stage] - seen.keys()}"
    compare(records(ours), records(theirs))
    base = setting["gpt2" if "gpt2" in stage else "base"]
    start = load_file(Path(base) / "model.safetensors")
    for part in ["", "value"] if stage == "ppo" else [""]:
        a, b = moved(ours / part, start), moved(theirs / part, start)
        assert float(b.norm()) > 1e-3
        assert float((a - b).norm()) <= 1e-2 * float(b.norm()), part


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Losses and what they are made of to 1e-5, norms of gradients to 1e-4."""
    assert len(ours) == len(theirs) and any("loss" in key for row in ours for key in row)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, want in other.items():
            if "grad_norm" in key:
                assert mine[key] == pytest.approx(want, rel=1e-4), key
            elif key.startswith(EXACT) and isinstance(want, float):
                assert mine[key] == pytest.approx(want, rel=1e-5, abs=3e-6), key
