"""Answers to the validation prompts and the loss on held-out text, at the start, on the way and at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from engine.data.prompts import Prompt
from engine.hybrid import HybridEngine
from engine.model.transformer import Model
from engine.run.device import to_host
from engine.run.streams import generator
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.forward import answer_logprobs, micro_batches
from engine.stages.ppo.metrics import segment_sums
from engine.stages.ppo.ptx import mean_lm_loss
from engine.stages.ppo.reward_sources import Reward, total_reward
from engine.stages.ppo.rollout import complete
from engine.stages.ppo.trainer import PPO


def evaluate(
    ppo: PPO,
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    eval_ptx: Sequence[Sequence[int]],
    phase: str,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics `eval/*` and sample rows. Random numbers are the same each time: only the weights differ."""
    began, config = time.perf_counter(), ppo.config
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    if not prompts and not eval_ptx:
        return metrics, rows
    policy = ppo.policy.whole()
    if prompts:
        rollouts = sample(ppo, policy, prompts)
        score, _ = total_reward(
            rewards, rollouts, config.token_budget, config.reward_timeout_s, ppo.ranks
        )
        kl = reference_kl(ppo, policy.model, rollouts)
        sums = segment_sums(kl, rollouts.cu)
        metrics |= {
            "eval/score": float(score.double().mean()),
            "eval/kl": float(sums.mean()),
            "eval/eos_rate": float(rollouts.ended.float().mean()),
            "eval/mean_length": float(sum(rollouts.lengths) / rollouts.num_episodes),
        }
        rows = sample_rows(ppo, rollouts, score, kl, ppo.iteration, phase, len(prompts))
    if eval_ptx:
        loss = mean_lm_loss(policy.model, eval_ptx, config.token_budget, ppo.ranks)
        metrics |= {"eval/ptx_loss": loss, "eval/ptx_perplexity": perplexity(loss)}
    metrics["timing/evaluate"] = time.perf_counter() - began
    return metrics, rows


def perplexity(loss: float) -> float:
    """exp(loss); infinite for the loss of a diverged policy, whose exponential is no float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def sample(ppo: PPO, policy: HybridEngine, prompts: Sequence[Prompt]) -> Rollouts:
    """One answer to each prompt, with random numbers of their own; `policy` is PPO's, whole."""
    config = ppo.config
    seed = int(generator(config.seed, "ppo evaluation").integers(2**31))
    completions = complete(
        policy,
        [p.tokens for p in prompts],
        range(len(prompts)),
        1,
        config.response_length,
        config.temperature,
        seed,
        ppo.ranks,
    )
    return Rollouts(tuple(prompts), tuple(completions), 1)


@torch.no_grad()
def reference_kl(ppo: PPO, policy: Model, rollouts: Rollouts) -> torch.Tensor:  # (N,)
    """log pi - log ref of every answer token (k1)."""
    cu, config = rollouts.cu.tolist(), ppo.config
    kl, own = torch.zeros(cu[-1]), ppo.ranks.share(len(rollouts.prompts))
    for answers in micro_batches(rollouts, own, config.token_budget):
        at = torch.cat([torch.arange(cu[e], cu[e + 1]) for e in answers.episodes])
        ours, _ = answer_logprobs(policy, answers, config.temperature)
        theirs, _ = answer_logprobs(ppo.reference, answers, config.temperature)
        kl[at] = to_host(ours - theirs)
    return ppo.ranks.sum(kl)


def sample_rows(
    ppo: PPO,
    rollouts: Rollouts,
    score: torch.Tensor,  # (E,)
    kl: torch.Tensor,  # (N,)
    iteration: int,
    phase: str,
    limit: int,
) -> list[dict[str, Any]]:
    """The first `limit` episodes as rows of samples/: text, tokens, reward, per-token KL."""
    cu, rows = rollouts.cu.tolist(), []
    for e in range(min(limit, rollouts.num_episodes)):
        completion = rollouts.completions[e]
        rows.append(
            {
                "step": iteration,
                "phase": phase,
                "episode": completion.episode_id,
                "prompt": rollouts.prompt_of(e).text,
                "completion": completion.text,
                "tokens": [ppo.policy.tokenizer.decode([t]) for t in completion.tokens],
                "reward": float(score[e]),
                "length": len(completion.tokens),
                "finish_reason": completion.finish_reason,
                "kl": [round(x, 5) for x in kl[cu[e] : cu[e + 1]].tolist()],
            }
        )
    return rows
