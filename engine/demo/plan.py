"""What a demo run is made of: where it reads and writes, the stages' settings, the sizes between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import Dtype, PPOConfig, RMConfig, SFTConfig
from engine.config_sample import SampleConfig
from engine.errors import ConfigError
from engine.train import preset_values

DATA = Path(__file__).parent / "data"
LABELER = "engine.demo.labeler:score"


def preset(stage: str) -> dict[str, Any]:
    return preset_values("demo", stage)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One demo run. The stages' settings are those of `engine/presets/demo.yaml`."""

    output: Path
    """The run's folder: sft/, rankings, rm/, ppo/, answers, report, demo.json."""
    model: Path
    """The pretrained model; unpacked there if it is not."""
    data: Path = DATA
    """Demonstrations, prompts and prose."""
    seed: int = 0
    dtype: Dtype = "auto"
    threads: int | None = None
    progress: bool = True
    sft: Mapping[str, Any] = field(default_factory=lambda: preset("sft"))
    rm: Mapping[str, Any] = field(default_factory=lambda: preset("rm"))
    ppo: Mapping[str, Any] = field(default_factory=lambda: preset("ppo"))
    ranked_prompts: int = 120
    """Training prompts whose samples are ranked for the reward model."""
    ranked_heldout: int = 40
    """Held-out prompts whose ranked samples check it."""
    samples: int = 5
    """K, samples a prompt."""
    tie_margin: float = 0.05
    """The labeler calls scores no further apart a tie."""

    def path(self, name: str) -> str:
        """A file or folder of this run."""
        return str(self.output / name)

    def source(self, name: str) -> str:
        """A data file."""
        return str(self.data / name)

    def common(self, stage: str, model: str) -> dict[str, Any]:
        """What all stages share. Each goes on from its newest checkpoint if it was stopped."""
        return {
            "model_name_or_path": model,
            "output_dir": self.path(stage),
            "seed": self.seed,
            "dtype": self.dtype,
            "threads": self.threads,
            "progress": self.progress,
            "resume_from_checkpoint": "true",
        }

    def sft_config(self) -> SFTConfig:
        return SFTConfig(
            **self.common("sft", str(self.model)),
            dataset_name=self.source("demonstrations.jsonl"),
            eval_dataset_name=self.source("demonstrations_valid.jsonl"),
            **self.sft,
        )

    def sample_config(self, prompts: str, count: int, output: str, seed: int) -> SampleConfig:
        return SampleConfig(
            model_name_or_path=self.path("sft"),
            dataset_name=self.source(prompts),
            output=self.path(output),
            overwrite=True,  # of a phase that was stopped after its first file
            num_prompts=count,
            num_samples=self.samples,
            max_new_tokens=self.ppo["response_length"],
            seed=seed,
            rank_with=LABELER,
            tie_margin=self.tie_margin,
            dtype=self.dtype,
            threads=self.threads,
        )

    def rm_config(self) -> RMConfig:
        return RMConfig(
            **self.common("rm", self.path("sft")),
            dataset_name=self.path("rankings.jsonl"),
            eval_dataset_name=self.path("rankings_heldout.jsonl"),
            demonstrations_name=self.source("demonstrations.jsonl"),
            **self.rm,
        )

    def ppo_config(self) -> PPOConfig:
        return PPOConfig(
            **self.common("ppo", self.path("sft")),
            reward_model_path=self.path("rm"),
            dataset_name=self.source("prompts.jsonl"),
            eval_dataset_name=self.source("prompts_heldout.jsonl"),
            ptx_dataset_name=self.source("prose.jsonl"),
            eval_ptx_dataset_name=self.source("prose_heldout.jsonl"),
            **self.ppo,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what the run computes: settings, sizes, and the data's bytes."""
        own = ("seed", "dtype", "ranked_prompts", "ranked_heldout", "samples", "tie_margin")
        files = sorted(self.data.glob("*.jsonl"))
        return {
            **{name: getattr(self, name) for name in own},
            **{stage: dict(getattr(self, stage)) for stage in ("sft", "rm", "ppo")},
            "model": str(self.model.resolve()),
            "data": {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files},
        }

    def claim(self) -> None:
        """Make the output folder this run's. One that holds a run with other settings is an error: its
        finished stages would be taken for this one's."""
        path, now = self.output / "plan.json", self.fingerprint()
        self.output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            return
        then = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(k for k in {*now, *then} if now.get(k) != then.get(k))
        if changed:
            first = changed[0]
            raise ConfigError(
                f"{self.output} holds a demo run with other settings ({', '.join(changed)}; {first} was "
                f"{then.get(first)!r}, is {now.get(first)!r}). Give another --output_dir, or delete it"
            )
