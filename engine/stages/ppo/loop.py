"""The PPO stage on one screen: prompts -> rollout -> reward -> step, again and again [InstructGPT 3.5, C.4]."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config import PPOConfig
from engine.data.tokenizer import load_tokenizer
from engine.errors import EngineError
from engine.generate.scheduler import Limits
from engine.hybrid import HybridEngine
from engine.model.heads import ScalarModel
from engine.model.transformer import clone
from engine.model.weights import load_policy, load_scalar, save_scalar, scalar_from_policy
from engine.run.ema import EMA
from engine.run.session import Session, peak_memory_gb, set_threads
from engine.stages.inputs import PPOData, load_ppo_data
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.evaluate import evaluate, sample_rows
from engine.stages.ppo.flops import iteration_work
from engine.stages.ppo.reward_sources import Reward, load_rewards, total_reward
from engine.stages.ppo.trainer import PPO
from engine.stages.resources import Load, Machine, describe, load_of, ppo_estimator, settle

LIVE = (
    "objective/scores",
    "objective/kl",
    "val/eos_rate",
    "val/explained_variance",
    "perf/tokens_per_s",
)
DEFAULT_SAVE_ITERATIONS = 20


def train_ppo(config: PPOConfig) -> Path:
    """Runs the stage; the final policy is the Hugging Face folder `config.output_dir`, the value model and the
    averaged policy lie in its `value/` and `ema/`."""
    set_threads(config.threads)
    tokenizer = load_tokenizer(config.model_name_or_path)
    context = describe(config.model_name_or_path, "lm_head").architecture.max_positions
    data = load_ppo_data(config, tokenizer, context)
    machine, load = Machine(config), load_of_ppo(config, data)
    config, chosen = settle(config, machine, load, ppo_estimator(config, machine, load))
    model = load_policy(config.model_name_or_path, config.dtype, True, config.device)
    policy = HybridEngine(model, tokenizer, Limits(config.max_active, config.kv_cache_gb))
    reference = load_policy(config.model_name_or_path, config.dtype, device=config.device)
    rewards = load_rewards(config)
    ppo = PPO(policy, initial_value(config, rewards), reference, config)
    with Session(config, "ppo", config.num_iterations, LIVE) as session:
        session.write_config()
        for line in (*data.reports, chosen):
            session.log.event(line)
        restore(session, ppo)
        if ppo.iteration == 0:
            log_evaluation(session, ppo, rewards, data, "before")
        while ppo.iteration < config.num_iterations:
            iterate(session, ppo, rewards, data)
            done = ppo.iteration
            last = done == config.num_iterations
            if last or is_due(done, config.eval_steps):
                log_evaluation(session, ppo, rewards, data, "after" if last else "during")
            if (
                last
                or is_due(done, config.save_steps or DEFAULT_SAVE_ITERATIONS)
                or session.stop_requested
            ):
                session.save(done, *ppo.state())
                session.stop_if_asked(done)
        export(session, ppo)
        session.say_totals()
    return Path(config.output_dir)


def load_of_ppo(config: PPOConfig, data: PPOData) -> Load:
    """Items are prompts with their answers, of at most response_length, and rows of pretraining text."""
    answers = config.num_samples * config.response_length
    lengths = [len(p.tokens) + answers for p in data.train]
    texts = [] if data.ptx is None else [data.ptx.length]
    held = [len(row) for row in data.eval_ptx]
    prompts = -(-config.batch_size // config.num_samples)
    load = load_of(lengths, prompts, data.longest_prompt)
    rows = round(config.batch_size * config.ptx_per_episode) * sum(texts)
    longest = max(load.longest, *texts, *held) if texts or held else load.longest
    return replace(load, longest=longest, step=max(load.step, rows))


def iterate(session: Session, ppo: PPO, rewards: Sequence[Reward], data: PPOData) -> None:
    """One iteration: draw prompts, answer, reward, train; then the metrics and a few samples."""
    config, iteration, began = ppo.config, ppo.iteration, time.perf_counter()
    prompts = data.draw(config.batch_size // config.num_samples, config.seed, iteration)
    rollouts = ppo.rollout(prompts)
    sampled = time.perf_counter()
    reward, terms = total_reward(rewards, rollouts, config.token_budget)
    rewarded = time.perf_counter()
    ptx_rows = data.draw_ptx(round(config.batch_size * config.ptx_per_episode), iteration)
    result = ppo.advance(rollouts, reward, ptx_rows)
    stats = dict(result.stats)
    stats |= {f"rewards/{name}": float(value.nanmean()) for name, value in terms.items()}
    stats |= timing(rollouts, ptx_rows, began, sampled, rewarded, stats)
    models = [reward.model for reward in rewards if reward.model is not None]
    for phase, work in iteration_work(
        ppo.policy.model, ppo.value, models, rollouts, ptx_rows, config
    ).items():
        stats |= session.totals.add(phase, work, stats[f"timing/{phase}"])
    stats |= {"episode": float(ppo.iteration * config.batch_size)}
    check_parity(config, stats)
    done = ppo.iteration
    if done % config.logging_steps == 0 or done == config.num_iterations:
        session.log.metrics(done, stats)
    if config.save_samples:
        rows = sample_rows(ppo, rollouts, reward, result.kl, done, "train", config.save_samples)
        session.log.samples(done, rows)


def timing(
    rollouts: Rollouts,
    ptx_rows: Sequence[Sequence[int]],
    began: float,
    sampled: float,
    rewarded: float,
    stats: dict[str, float],
) -> dict[str, float]:
    """Seconds and tokens a second by phase; tokens are real ones."""
    answers = sum(rollouts.lengths)
    trained = answers + sum(len(p.tokens) for p in rollouts.prompts)
    ptx = sum(len(row) for row in ptx_rows)
    total = time.perf_counter() - began
    return {
        "timing/rollout": sampled - began,
        "timing/reward": rewarded - sampled,
        "timing/iteration": total,
        "perf/rollout_tokens_per_s": answers / (sampled - began),
        "perf/score_tokens_per_s": trained / stats["timing/score"],
        "perf/update_tokens_per_s": (trained + ptx) / stats["timing/update"],
        "perf/tokens_per_s": (trained + ptx) / total,
        "perf/peak_memory_gb": peak_memory_gb(),
    }


def check_parity(config: PPOConfig, stats: dict[str, float]) -> None:
    """With max_ratio_deviation, a sampler that disagrees with the trainer ends the run."""
    deviation, limit = stats.get("parity/first_minibatch_ratio_deviation", 0.0), config.max_ratio_deviation
    if limit is not None and deviation > limit:
        raise EngineError(
            f"parity: the first minibatch's ratio is {deviation:.3g} away from 1, max_ratio_deviation is {limit:g};"
            " the log-probs being trained are not those that were scored"
        )


def initial_value(config: PPOConfig, rewards: Sequence[Reward]) -> ScalarModel:
    """A trainable copy of the reward model [paper 3.5], of value_model_path, or the policy's trunk with a new head."""
    stored = config.value_model_path or config.reward_model_path
    if stored:
        return load_scalar(stored, config.dtype, trainable=True, device=config.device)
    models = [reward.model for reward in rewards if reward.model is not None]
    if models:
        return clone(models[0], trainable=True)
    return scalar_from_policy(
        config.model_name_or_path, config.seed, config.dtype, device=config.device
    )


def is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def restore(session: Session, ppo: PPO) -> None:
    found = session.resume()
    if found is not None:
        ppo.load_state(found.tensors, found.state)


def log_evaluation(
    session: Session, ppo: PPO, rewards: Sequence[Reward], data: PPOData, phase: str
) -> None:
    metrics, rows = evaluate(ppo, rewards, data.eval_prompts, data.eval_ptx, phase)
    if metrics:
        session.log.metrics(ppo.iteration, metrics)
    if rows:
        session.log.samples(ppo.iteration, rows, name=phase)


def export(session: Session, ppo: PPO) -> None:
    """The final models as plain Hugging Face folders."""
    folder = session.folder
    ppo.policy.save_pretrained(folder)
    save_scalar(ppo.value, folder / "value", tokenizer=ppo.policy.tokenizer)
    if ppo.learner.ema is not None:
        save_average(ppo.policy, ppo.learner.ema, folder / "ema")
    session.log.event(f"model: {folder} (value model: value/, averaged policy: ema/)")


def save_average(policy: HybridEngine, average: EMA, folder: Path) -> None:
    """Writes the averaged weights as a folder of their own; the policy's own weights come back."""
    with average.swapped():
        policy.refresh()
        policy.save_pretrained(folder)
    policy.refresh()
