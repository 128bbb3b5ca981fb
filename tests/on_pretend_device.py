"""A program: stages on the CPU and again on the pretend device; it ends with 1 where anything differs.

    PYTHONPATH=tests:. TRITON_INTERPRET=1 python tests/on_pretend_device.py FOLDER [--stages sft rm ppo generate]
        [--backend reference|triton] [--forget STAGE:MODULE ...]

The last line of its output is JSON: for each stage, how often the host waited for the device, by what for. `--forget`
takes from a module of the engine its copies to the device, a seeded defect: the stage must then end with an error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretend_device import NAME, Pretend, place, register
from safetensors.torch import load_file
from small_engines import save_tiny
from stages.tiny_data import write_all

import engine
from engine.generate.generator import generate
from engine.generate.sampling import Sampling
from engine.model import weights
from engine.model.weights import load_policy, save_scalar, scalar_from_policy
from engine.run.device import choose_device
from engine.stages import estimates

COMMON = {
    "threads": 1,
    "progress": False,
    "dtype": "float32",
    "eval_fraction": 0.25,
    "max_grad_norm": 0.0,
}
EPOCHS = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 80}
VOLATILE = ("timing/", "perf/", "time")


def sft(folder: Path, data: dict[str, str], out: Path, device: str) -> Path:
    return engine.train_sft(
        engine.SFTConfig(
            model_name_or_path=str(folder / "base"), output_dir=str(out), dataset_name=data["sft"],
            residual_dropout=0.2, micro_batch_tokens=40, device=device, **COMMON, **EPOCHS,
        )
    )  # fmt: skip


def rm(folder: Path, data: dict[str, str], out: Path, device: str) -> Path:
    return engine.train_reward_model(
        engine.RMConfig(
            model_name_or_path=str(folder / "base"), output_dir=str(out),
            dataset_name=data["rankings"], micro_batch_tokens=90, device=device, **COMMON, **EPOCHS,
        )
    )  # fmt: skip


def ppo(folder: Path, data: dict[str, str], out: Path, device: str) -> Path:
    """With every branch that holds a tensor of its own: two samples a prompt, the extra slot, the pretraining term."""
    if not (folder / "reward").exists():
        reward = scalar_from_policy(folder / "base", seed=0, dtype="float32", device="cpu")
        save_scalar(reward, folder / "reward")
    return engine.train_ppo(
        engine.PPOConfig(
            model_name_or_path=str(folder / "base"), output_dir=str(out), max_length=60,
            reward_model_path=str(folder / "reward"), dataset_name=data["prompts"],
            ptx_dataset_name=data["text"], eval_ptx_dataset_name=data["text"], ptx_length=16,
            ptx_per_episode=0.5, total_episodes=4, batch_size=4, num_samples=2, num_mini_batches=2,
            response_length=4, score_at="eos_plus_one", bootstrap_truncated=True, kl_estimator="k3",
            whiten_rewards=True, eval_num_prompts=2, micro_batch_tokens=30, max_active=3,
            device=device, **COMMON,
        )
    )  # fmt: skip


def draws(folder: Path, data: dict[str, str], out: Path, device: str) -> Path:
    """Tokens and log-probs of prompts of several lengths, with and without filters."""
    model = load_policy(folder / "base", "float32", device=device)
    prompts, found = [[5, 6, 7], [9] * 17], []
    for settings in (Sampling(4, 0.7), Sampling(2, top_k=5)):
        for g in generate(model, prompts, settings, frozenset({30}), n=2, seed=1):
            found.append({"tokens": g.tokens, "logprobs": g.logprobs.tolist()})
    out.mkdir()
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, found)))
    return out


STAGES: dict[str, Callable[[Path, dict[str, str], Path, str], Path]] = {
    "sft": sft,
    "rm": rm,
    "ppo": ppo,
    "generate": draws,
}


def records(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def near(a: Any, b: Any) -> bool:
    """Equal but for float32's rounding: torch puts some operations together otherwise on another device."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=2e-4, abs_tol=2e-6)
    return bool(a == b)


def differences(one: Path, other: Path) -> list[str]:
    """Of two run folders: records of the log, and tensors of every file (by their distance: Adam's first steps divide
    small gradients by themselves, which makes a few elements of their rounding)."""
    found = [
        f"{key}: {a.get(key)} {b.get(key)}"
        for a, b in zip(records(one), records(other), strict=True)
        for key in sorted(a.keys() | b.keys())
        if not near(a.get(key), b.get(key))
    ]
    for path in sorted(one.rglob("*.safetensors")):
        mine, theirs = load_file(path), load_file(other / path.relative_to(one))
        if mine.keys() != theirs.keys():
            found.append(f"{path.relative_to(one)}: other names")
        for name in mine.keys() & theirs.keys():
            a, b = mine[name].double(), theirs[name].double()
            distance = float((a - b).norm() / a.norm().clamp(min=1e-6))
            if not distance <= 1e-3:
                found.append(f"{path.relative_to(one)}: {name}: {distance:.3g} of its norm away")
    return found


def placed(name: str) -> torch.device:
    return place() if name == "cuda" else choose_device(name)


def compare(stage: str, folder: Path, data: dict[str, str], waits: dict[str, Any]) -> list[str]:
    on_cpu = STAGES[stage](folder, data, folder / f"{stage}-cpu", "cpu")
    with Pretend() as device:
        there = STAGES[stage](folder, data, folder / f"{stage}-device", "cuda")
    waits[stage] = Counter(device.waits)
    return [f"{stage}: {line}" for line in differences(on_cpu, there)]


def forget(stage: str, module: str, folder: Path, data: dict[str, str]) -> list[str]:
    """Empty where the defect was found."""
    changed = importlib.import_module(module)
    original, changed.to_device = changed.to_device, lambda x, device: x
    try:
        with Pretend():
            STAGES[stage](folder, data, folder / f"{stage}-without-{module}", "cuda")
    except RuntimeError as error:
        return [] if f"beside one of {NAME}" in str(error) else [f"{stage}, {module}: {error}"]
    finally:
        changed.to_device = original
    return [f"{stage}: {module} without its copies went unseen"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="*", default=[], choices=STAGES)
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--forget", nargs="*", default=[])
    given = parser.parse_args()
    os.environ["ENGINE_BACKEND"] = given.backend
    register()
    save_tiny("llama", given.folder / "base")
    data, waits = write_all(given.folder), {}
    weights.choose_device = estimates.choose_device = placed
    estimates.held_and_free = lambda device, local_size: (0, 10**12)  # torch knows no size of it
    found = []
    for stage in given.stages:
        found += compare(stage, given.folder, data, waits)
    for defect in given.forget:
        found += forget(*defect.split(":"), given.folder, data)
    print("\n".join(found[:20]))
    print(json.dumps(waits))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
