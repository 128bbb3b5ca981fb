"""What the runs of a soak are: a tiny model, ragged prompts, two sources of reward, PPO with every part switched on."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.soak import ROOT
from bench.soak.judge import FAULT

MARK = "SOAK_MARK"  # in the environment of every run, so that what outlives one is found
KEEP = 2
BATCH = 6
MODEL_SEED = 3


@dataclass(frozen=True)
class Setting:
    """The folder of one soak and what all of its runs share."""

    folder: Path
    iterations: int
    save_steps: int
    seed: int
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def temporary(self) -> Path:
        """TMPDIR of the runs."""
        return self.folder / "tmp"

    @property
    def config(self) -> Path:
        return self.folder / f"ppo-{self.iterations}.yaml"

    def words(self, out: Path, flags: tuple[str, ...] = ()) -> list[str]:
        """The command of one start; it goes on where there is a checkpoint."""
        return [
            sys.executable, "-m", "engine.train", "--stage", "ppo", "--config", str(self.config),
            "--output_dir", str(out), "--resume_from_checkpoint", "true", *flags,
        ]  # fmt: skip

    def environment(self, fault: Mapping[str, Any]) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {MARK: self.mark, FAULT: json.dumps(dict(fault)), "PYTHONPATH": path}
        own |= {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own}

    def write(self) -> None:
        """The folders, and the config that every run of this setting has."""
        for folder in (self.temporary, self.folder / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(self.options(), sort_keys=False))

    def options(self) -> dict[str, Any]:
        rewards = [
            {"source": str(self.folder / "rm")},
            {"source": "bench.soak.judge:judge", "weight": 0.5},
        ]
        data = {name: str(self.folder / f"{name}.jsonl") for name in ("prompts", "text")}
        return {
            "model_name_or_path": str(self.folder / "model"), "rewards": rewards,
            "dataset_name": data["prompts"], "eval_dataset_name": data["prompts"], "eval_num_prompts": 3,
            "eval_steps": 2 * self.save_steps + 1, "eval_ptx_dataset_name": data["text"],
            "ptx_dataset_name": data["text"], "ptx_per_episode": 0.5, "ptx_length": 24, "ema_decay": 0.99,
            "total_episodes": BATCH * self.iterations, "batch_size": BATCH, "num_samples": 2,
            "num_mini_batches": 2, "response_length": 10, "max_length": 60, "kl_target": 1.0,
            "save_steps": self.save_steps, "save_total_limit": KEEP, "save_samples": 2, "seed": self.seed,
            "threads": 1, "progress": False,
        }  # fmt: skip


def make_inputs(folder: Path, seed: int) -> None:
    """A random model and reward model with a byte tokenizer, prompts of one to three words, text."""
    from small_engines import byte_tokenizer, save_tiny
    from stages.tiny_data import write_all

    from engine.model.weights import save_scalar, scalar_from_policy

    save_tiny("llama", folder / "model", seed=seed)
    scalar = scalar_from_policy(folder / "model", seed + MODEL_SEED, "float32")
    save_scalar(scalar, folder / "rm", tokenizer=byte_tokenizer())
    write_all(folder, count=40, seed=seed)
