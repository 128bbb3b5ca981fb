"""Which SFT checkpoint to keep: the one whose answers the reward model likes best [InstructGPT 3.5, C.1].

Validation loss overfits after the first epoch while the reward and human preference still improve, so samples decide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from engine.config import SFTConfig
from engine.data.prompts import Prompt
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.hybrid import HybridEngine
from engine.model.heads import ScalarModel
from engine.model.weights import load_scalar
from engine.run import checkpoint
from engine.run.session import Session
from engine.stages.estimates import describe
from engine.stages.inputs import SFTData, some_of
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.reward_sources import model_scores
from engine.stages.ppo.rollout import complete

SELECTION_FILE = "selection.json"


def prompts_to_answer(config: SFTConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    return some_of(prompts, config.select_num_prompts, "selection prompts")


def check_selection(config: SFTConfig, data: SFTData, context: int) -> None:
    """Before anything is trained: there are prompts to answer, and policy and reward model can read the answers.

    Raises:
        ConfigError: no prompt, or an answer that may outgrow the context of one of the models.
    """
    if config.select_by_reward_model is None:
        return
    chosen = prompts_to_answer(config, data.eval_prompts())
    if not chosen:
        rows = "validation" if data.validation else "training"
        raise ConfigError(
            f"select_by_reward_model: got {config.select_by_reward_model}, but none of the {rows} rows has a prompt to"
            " answer; give validation rows with a prompt (eval_dataset_name), or leave select_by_reward_model out"
        )
    longest, length = max(len(prompt.tokens) for prompt in chosen), config.select_response_length
    scorer = describe(config.select_by_reward_model, "score").architecture
    for model, room in (("the model", context), ("select_by_reward_model", scorer.max_positions)):
        if longest + length > room:
            raise ConfigError(
                f"select_response_length: got {length}, {model}'s context of {room} leaves {max(room - longest, 0)}"
                f" beside the longest prompt to answer, of {longest} tokens; want at most that, or shorter prompts"
            )


def scorer_vocabulary(config: SFTConfig) -> dict[str, int]:
    """What `check_vocabulary` compares of the reward model, if there is one."""
    folder = config.select_by_reward_model
    if folder is None:
        return {}
    return {f"select_by_reward_model {folder}": describe(folder, "score").architecture.vocab_size}


def select_checkpoint(
    session: Session, config: SFTConfig, policy: HybridEngine, prompts: Sequence[Prompt]
) -> None:
    """Scores samples of every kept checkpoint, loads the best one into `policy`, writes selection.json.

    The same prompts and the same random numbers for every checkpoint, so that only the weights differ.

    Raises:
        CheckpointError: the run's folder has none.
        EngineError: a score that is not finite, of which there is no best.
    """
    assert config.select_by_reward_model is not None
    session.wait_for_save()
    kept = checkpoint.kept(session.folder)
    if not kept:
        raise CheckpointError(
            f"{session.folder}: holds no checkpoint for select_by_reward_model to choose from, since no step was left"
            " to train; go on in the folder of the run that has them (output_dir), or leave select_by_reward_model out"
        )
    reward_model = load_scalar(
        config.select_by_reward_model, dtype=config.dtype, device=config.device
    )
    chosen = prompts_to_answer(config, prompts)
    scores: dict[str, float] = {}
    wanted = {"model": policy.model.state()}
    for path in kept:
        policy.model.load_state(session.load(path, wanted).group("model"))
        scores[path.name] = mean_reward(session, config, policy, reward_model, chosen)
        if not math.isfinite(scores[path.name]):
            raise EngineError(
                f"select_by_reward_model: {config.select_by_reward_model} scores answers of {path.name} with a number"
                " that is not finite; train it again, or give another one"
            )
        session.log.event(
            f"{path.name}: mean reward of {len(chosen)} samples {scores[path.name]:+.4f}"
        )
    best = max(scores, key=lambda name: scores[name])
    policy.model.load_state(session.load(session.folder / best, wanted).group("model"))
    record = {"best": best, "reward_model": config.select_by_reward_model, "mean_reward": scores}
    session.write(SELECTION_FILE, json.dumps(record, indent=1) + "\n")
    session.log.event(f"best checkpoint by reward: {best}")


def mean_reward(
    session: Session,
    config: SFTConfig,
    policy: HybridEngine,
    reward_model: ScalarModel,
    prompts: Sequence[Prompt],
) -> float:
    """The reward model's mean score of one sampled answer to each prompt."""
    completions = complete(
        policy.whole(),
        [p.tokens for p in prompts],
        range(len(prompts)),
        1,
        config.select_response_length,
        1.0,
        config.seed,
        session.ranks,
    )
    rollouts = Rollouts(tuple(prompts), tuple(completions), 1)
    score = model_scores(reward_model, rollouts, config.token_budget, session.ranks)
    return float(score.double().mean())
