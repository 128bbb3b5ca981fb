"""The PPO stage on one screen: prompts -> rollout -> reward -> step, again and again [InstructGPT 3.5, C.4]."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.config import PPOConfig
from engine.data.tokenizer import load_tokenizer
from engine.errors import CheckpointError, EngineError
from engine.generate.scheduler import Limits
from engine.hybrid import HybridEngine
from engine.model.heads import ScalarModel
from engine.model.transformer import whole
from engine.model.weights import (
    load_policy,
    load_scalar,
    save_scalar,
    scalar_from_policy,
    trained_copy,
)
from engine.run.distributed import ALONE, Ranks, join
from engine.run.ema import EMA
from engine.run.log import METRICS, read_records
from engine.run.session import Session, peak_memory_gb, settle_cpu
from engine.stages.epochs import stuck_error
from engine.stages.estimates import describe
from engine.stages.inputs import PPOData, check_vocabulary, identities, load_ppo_data
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.evaluate import evaluate, sample_rows
from engine.stages.ppo.flops import iteration_work
from engine.stages.ppo.reward_sources import Reward, load_rewards, total_reward
from engine.stages.ppo.score import checked_scores
from engine.stages.ppo.trainer import PPO
from engine.stages.resources import settle_ppo

LIVE = (
    "objective/scores",
    "objective/kl",
    "val/eos_rate",
    "val/explained_variance",
    "perf/tokens_per_s",
)
DEFAULT_SAVE_ITERATIONS = 20
PHASES = (None, "before", "during", "after")  # of an evaluation that a checkpoint says is still to be done


def train_ppo(config: PPOConfig) -> Path:
    """Runs the stage; the final policy is the Hugging Face folder `config.output_dir`, the value model and the
    averaged policy lie in its `value/` and `ema/`."""
    config.check_rewards()
    ranks = join(config.device, config.replicate, config.reward_timeout_s)
    settle_cpu(config, ranks)
    context = describe(config.model_name_or_path, "lm_head").architecture.max_positions
    tokenizer = load_tokenizer(config.model_name_or_path)
    data = load_ppo_data(config, tokenizer, context)
    config, chosen = settle_ppo(config, data, ranks)
    model = load_policy(config.model_name_or_path, config.dtype, True, config.device, ranks)
    policy = HybridEngine(model, tokenizer, Limits(config.max_active, config.kv_cache_gb))
    reference = load_policy(config.model_name_or_path, config.dtype, device=config.device)
    rewards = load_rewards(config)
    ppo = PPO(policy, initial_value(config, rewards, ranks), reference, config, ranks)
    models = {config.model_name_or_path: policy.model, "the value model": ppo.value}
    models |= {f"reward {r.name!r}": r.model for r in rewards if r.model is not None}
    vocabulary = {name: model.architecture.vocab_size for name, model in models.items()}
    check_vocabulary(config, data, policy.tokenizer, vocabulary)
    with Session(config, "ppo", config.num_iterations, LIVE, ranks) as session:
        session.start(identities(config, data), (*data.reports, chosen))
        due = restore(session, ppo)
        if due:
            log_evaluation(session, ppo, rewards, data, due)
        untold: dict[str, float] = {}
        while ppo.iteration < config.num_iterations:
            untold = iterate(session, ppo, rewards, data, untold)
            last = ppo.iteration == config.num_iterations
            if last or is_due(ppo.iteration, config.eval_steps):
                log_evaluation(session, ppo, rewards, data, "after" if last else "during")
            save(session, ppo)
        export(session, ppo)
        session.say_totals()
    return Path(config.output_dir)


def iterate(
    session: Session, ppo: PPO, rewards: Sequence[Reward], data: PPOData, untold: dict[str, float]
) -> dict[str, float]:
    """One iteration: draw prompts, answer, reward, train; then the metrics and a few samples.

    `untold` is what no line of metrics has told yet of checkpoints written; returns that of the next iteration.
    """
    config, iteration, began = ppo.config, ppo.iteration, time.perf_counter()
    prompts = data.draw(config.batch_size // config.num_samples, config.seed, iteration)
    untold = untold | session.check()
    rollouts = ppo.rollout(prompts)
    sampled = time.perf_counter()
    with saved_if_it_fails(session, ppo):
        reward, terms = total_reward(
            rewards, rollouts, config.token_budget, config.reward_timeout_s, ppo.ranks
        )
        reward = checked_scores(reward, rollouts.num_episodes)  # a weight may carry the sum out of float32
    rewarded = time.perf_counter()
    ptx_rows = data.draw_ptx(round(config.batch_size * config.ptx_per_episode), iteration)
    result = ppo.advance(rollouts, reward, ptx_rows)
    stats = result.stats | untold
    stats |= {f"rewards/{name}": float(value.nanmean()) for name, value in terms.items()}
    ptx_tokens = sum(map(len, ptx_rows)) if config.ptx_coef > 0 else 0
    stats |= timing(rollouts, ptx_tokens, config.num_ppo_epochs, began, sampled, rewarded, stats)
    for phase, work in iteration_work(
        ppo.policy.model.architecture,
        ppo.value.architecture,
        [reward.model.architecture for reward in rewards if reward.model is not None],
        [len(p.tokens) for p in rollouts.prompts],
        [[len(a) for a in own] for _, own in rollouts.groups],
        [len(row) for row in ptx_rows],
        config,
    ).items():
        stats |= session.totals.add(phase, work, stats[f"timing/{phase}"])
    stats |= {
        "episode": float(ppo.episodes),
        "perf/peak_memory_gb": ppo.ranks.largest(peak_memory_gb()),
    }
    done = ppo.iteration
    if done % config.logging_steps == 0 or done == config.num_iterations:
        session.log.metrics(done, stats)
        untold = {}
    if config.save_samples:
        rows = sample_rows(ppo, rollouts, reward, result.kl, done, "train", config.save_samples)
        session.log.samples(done, rows)
    return untold


def timing(
    rollouts: Rollouts,
    ptx_tokens: int,
    epochs: int,
    began: float,
    sampled: float,
    rewarded: float,
    stats: dict[str, float],
) -> dict[str, float]:
    """Seconds and tokens a second by phase; tokens are real ones that were trained on: by the update as often as it
    was, by the iteration once."""
    answers = sum(rollouts.lengths)
    trained = answers + sum(len(p.tokens) for p in rollouts.prompts)
    total = time.perf_counter() - began
    return {
        "timing/rollout": sampled - began,
        "timing/reward": rewarded - sampled,
        "timing/iteration": total,
        "perf/rollout_tokens_per_s": answers / (sampled - began),
        "perf/score_tokens_per_s": trained / stats["timing/score"],
        "perf/update_tokens_per_s": (trained * epochs + ptx_tokens) / stats["timing/update"],
        "perf/tokens_per_s": (trained + ptx_tokens) / total,
    }


def initial_value(
    config: PPOConfig, rewards: Sequence[Reward], ranks: Ranks = ALONE
) -> ScalarModel:
    """A trainable copy of the reward model [paper 3.5], of value_model_path, or the policy's trunk with a new head."""
    stored = config.value_model_path or config.reward_model_path
    if stored:
        return load_scalar(stored, config.dtype, trainable=True, device=config.device, ranks=ranks)
    models = [reward.model for reward in rewards if reward.model is not None]
    if models:
        return trained_copy(models[0], ranks)
    return scalar_from_policy(
        config.model_name_or_path, config.seed, config.dtype, device=config.device, ranks=ranks
    )


def is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def restore(session: Session, ppo: PPO) -> str | None:
    """Go on from the checkpoint, if any; returns the phase of the evaluation that is to be done first, if any."""
    found = session.resume(ppo.state()[0])
    if found is None:
        return "before"
    ppo.load_state(found)
    due = found.state.get("evaluation_due")
    if due not in PHASES:
        raise CheckpointError(f"{found.path}: evaluation_due is {str(due)[:40]!r}, want one of {PHASES}")
    return None if due and is_evaluated(session, ppo.iteration) else due


def is_evaluated(session: Session, step: int) -> bool:
    """Whether records that go on have the evaluation of `step`: a run that ended before its next checkpoint has made it
    up."""
    path = session.folder / METRICS

    def found() -> bool:
        records = read_records(path)[0] if path.exists() else []
        return any(r.get("step") == step and "timing/evaluate" in r for r in records)

    there: bool = session.ranks.by_first(found)
    return there


def is_on_schedule(config: PPOConfig, done: int) -> bool:
    """Whether a checkpoint of iteration `done` is kept as one that was due."""
    return done == config.num_iterations or is_due(done, config.save_steps or DEFAULT_SAVE_ITERATIONS)


def save(session: Session, ppo: PPO) -> None:
    """A checkpoint where one is due or a stop was asked for; ends a run in which nothing is learned any more."""
    if is_on_schedule(ppo.config, ppo.iteration) or session.stop_requested or ppo.is_stuck:
        save_state(session, ppo)
    if ppo.is_stuck:
        session.wait_for_save()
        raise stuck_error(ppo.iteration, ppo.skipped_in_a_row)
    session.stop_if_asked(ppo.iteration)


def save_state(session: Session, ppo: PPO, evaluation_due: str | None = None) -> None:
    tensors, state = ppo.state()
    interim = not is_on_schedule(ppo.config, ppo.iteration)
    session.save(ppo.iteration, tensors, state | {"evaluation_due": evaluation_due}, interim)


@contextmanager
def saved_if_it_fails(session: Session, ppo: PPO, evaluation_due: str | None = None) -> Iterator[None]:
    """Around what changes no weight, a reward function above all: its error costs no iteration."""
    try:
        yield
    except EngineError:
        if ppo.iteration > 0:
            save_state(session, ppo, evaluation_due)
        raise


def log_evaluation(
    session: Session, ppo: PPO, rewards: Sequence[Reward], data: PPOData, phase: str
) -> None:
    with saved_if_it_fails(session, ppo, evaluation_due=phase):
        metrics, rows = evaluate(ppo, rewards, data.eval_prompts, data.eval_ptx, phase)
    if rows:  # before the metrics, whose line says that the evaluation is done
        session.log.samples(ppo.iteration, rows, name=phase)
    if metrics:
        session.log.metrics(ppo.iteration, metrics)


def export(session: Session, ppo: PPO) -> None:
    """The final models as plain Hugging Face folders."""
    tokenizer = ppo.policy.tokenizer
    with session.publishing() as folder:
        session.export(ppo.policy.whole(), lambda policy: policy.save_pretrained(folder))
        session.export(whole(ppo.value), lambda value: save_scalar(value, folder / "value", tokenizer))
        if ppo.learner.ema is not None:
            export_average(session, ppo.policy, ppo.learner.ema, folder / "ema")
    session.log.event(f"model: {session.folder} (value model: value/, averaged policy: ema/)")


def export_average(session: Session, policy: HybridEngine, average: EMA, folder: Path) -> None:
    """Writes the averaged weights as a folder of their own; the policy's own weights come back."""
    with average.swapped():
        policy.refresh()
        session.export(policy.whole(), lambda averaged: averaged.save_pretrained(folder))
    policy.refresh()
