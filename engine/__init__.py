"""InstructGPT's RLHF in one process: SFT, reward model on rankings of K answers, PPO and PPO-ptx.

    engine.train_sft(engine.SFTConfig(...))
    engine.train_reward_model(engine.RMConfig(...))
    engine.train_ppo(engine.PPOConfig(...))
    model = engine.HybridEngine.from_pretrained("folder")
    engine.ops.linear_logprob(hidden, weight, targets)

Names are loaded when they are first used, so that `import engine` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import ops as ops
    from engine.config import PPOConfig as PPOConfig
    from engine.config import RewardSource as RewardSource
    from engine.config import RMConfig as RMConfig
    from engine.config import SFTConfig as SFTConfig
    from engine.data.rows import DataSource as DataSource
    from engine.errors import EngineError as EngineError
    from engine.hybrid import Completion as Completion
    from engine.hybrid import HybridEngine as HybridEngine
    from engine.model.weights import load_policy as load_policy
    from engine.model.weights import load_scalar as load_scalar
    from engine.model.weights import save_scalar as save_scalar
    from engine.model.weights import scalar_from_policy as scalar_from_policy
    from engine.stages.ppo.loop import train_ppo as train_ppo
    from engine.stages.ppo.trainer import PPO as PPO
    from engine.stages.rm import train_reward_model as train_reward_model
    from engine.stages.sft import train_sft as train_sft

__version__ = "0.1.0"

_HOMES = {
    "SFTConfig": "engine.config",
    "RMConfig": "engine.config",
    "PPOConfig": "engine.config",
    "DataSource": "engine.data.rows",
    "RewardSource": "engine.config",
    "EngineError": "engine.errors",
    "HybridEngine": "engine.hybrid",
    "Completion": "engine.hybrid",
    "load_policy": "engine.model.weights",
    "load_scalar": "engine.model.weights",
    "scalar_from_policy": "engine.model.weights",
    "save_scalar": "engine.model.weights",
    "train_sft": "engine.stages.sft",
    "train_reward_model": "engine.stages.rm",
    "train_ppo": "engine.stages.ppo.loop",
    "PPO": "engine.stages.ppo.trainer",
}
__all__ = [*_HOMES, "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("engine.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}; it has {', '.join(__all__)}")
