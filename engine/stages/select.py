"""Which SFT checkpoint to keep: the one whose answers the reward model likes best [InstructGPT 3.5, C.1].

Validation loss overfits after the first epoch while the reward and human preference still improve, so samples decide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.config import SFTConfig
from engine.data.prompts import Prompt
from engine.hybrid import HybridEngine
from engine.model.weights import load_scalar
from engine.run import checkpoint
from engine.run.session import Session
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.reward_sources import model_scores
from engine.stages.ppo.rollout import complete

SELECTION_FILE = "selection.json"


def select_checkpoint(
    session: Session, config: SFTConfig, policy: HybridEngine, prompts: Sequence[Prompt]
) -> None:
    """Scores samples of every kept checkpoint, loads the best one into `policy`, writes selection.json.

    The same prompts and the same random numbers for every checkpoint, so that only the weights differ.
    """
    assert config.select_by_reward_model is not None
    reward_model = load_scalar(
        config.select_by_reward_model, dtype=config.dtype, device=config.device
    )
    chosen = list(prompts[: config.select_num_prompts])
    scores: dict[str, float] = {}
    session.wait_for_save()
    wanted = {"model": policy.model.state()}
    for path in checkpoint.kept(session.folder):
        policy.model.load_state(session.load(path, wanted).group("model"))
        completions = complete(
            policy.whole(),
            [p.tokens for p in chosen],
            range(len(chosen)),
            1,
            config.select_response_length,
            1.0,
            config.seed,
            session.ranks,
        )
        rollouts = Rollouts(tuple(chosen), tuple(completions), 1)
        score = model_scores(reward_model, rollouts, config.token_budget, session.ranks)
        scores[path.name] = float(score.double().mean())
        session.log.event(
            f"{path.name}: mean reward of {len(chosen)} samples {scores[path.name]:+.4f}"
        )
    best = max(scores, key=lambda name: scores[name])
    policy.model.load_state(session.load(session.folder / best, wanted).group("model"))
    record = {"best": best, "reward_model": config.select_by_reward_model, "mean_reward": scores}
    session.write(SELECTION_FILE, json.dumps(record, indent=1) + "\n")
    session.log.event(f"best checkpoint by reward: {best}")
