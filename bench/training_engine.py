"""The engine's side of bench.ppo and bench.train: the same work and orders as training_peer.py, by the engine's stages.

    python -m bench.training_engine WORKLOAD --work FILE --model FOLDER --dtype bfloat16 --threads 2

Nothing here is faster than what `python -m engine.train` runs: a batch goes through the stage's own `train_step`, an
iteration through `engine.PPO`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engine
from bench.ppo_phases import clocked, optimizer_bytes, phase_flop
from bench.training_peer import Order, Side, Work, batches_of, orders
from engine import ops
from engine.data.pack import last_rows, pack_sequences
from engine.data.prompts import Prompt
from engine.data.rankings import RankedGroup
from engine.data.text import Example
from engine.hybrid import Completion
from engine.model import heads, transformer
from engine.model.heads import ScalarModel
from engine.model.transformer import Model, clone
from engine.model.weights import load_policy, scalar_from_policy
from engine.run.optim import global_norm
from engine.run.session import versions
from engine.stages.inputs import RMData, SFTData
from engine.stages.ppo import update
from engine.stages.ppo.batch import Advantages, Rollouts, Scores
from engine.stages.ppo.forward import all_values, answer_logprobs, micro_batches
from engine.stages.ppo.reward_sources import Reward, total_reward
from engine.stages.rm import RMStage, answer_offsets, ranks_of
from engine.stages.sft import SFTStage

NOWHERE = "not written to"  # a config wants an output_dir; no stage is run whole here
TOKENS = 1024  # of a micro-batch: longer ones are no faster on a CPU (bench/LOG.md), shorter ones take less memory


def clear(model: Model) -> None:
    for parameter in model.parameters().values():
        parameter.grad = None


def gradient_norm(model: Model) -> float:
    return global_norm(p.grad for p in model.parameters().values() if p.grad is not None)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    out = run()
    return time.perf_counter() - began, out


def ready(side: Side) -> None:
    side.say({"versions": versions()})


def sft(side: Side, lines: Iterator[Order]) -> None:
    """SFTStage.train_step of each batch."""
    model = load_policy(side.args.model, side.args.dtype, trainable=True)
    config = engine.SFTConfig(
        model_name_or_path=side.args.model, output_dir=NOWHERE, micro_batch_tokens=TOKENS
    )
    ready(side)
    for order in lines:
        seconds, losses, norms, tokens = 0.0, [], [], 0
        for rows in batches_of(side.work, order):
            examples = [
                Example(tuple(row["tokens"]), row["start"], row["start"], "bench") for row in rows
            ]
            stage = SFTStage(config, model, SFTData(examples, [], None, [], ()))
            clear(model)
            spent, metrics = timed(partial(stage.train_step, range(len(rows)), 0))
            seconds, tokens = seconds + spent, tokens + int(metrics["num_tokens"])
            losses.append(metrics["loss"])
            norms.append(gradient_norm(model))
        side.answer(seconds, tokens, {"loss": losses, "gradient norm": norms})


def ranked(group: dict[str, Any]) -> RankedGroup:
    responses = tuple(map(tuple, group["responses"]))
    return RankedGroup(tuple(group["prompt"]), responses, tuple(group["ranks"]), "bench")


def repeated_scores(model: ScalarModel, groups: Sequence[RankedGroup]) -> Tensor:  # (sum of K,)
    """Scores with each prompt computed once an answer: no segment shares another's keys."""
    rows = [[*group.prompt, *answer] for group in groups for answer in group.responses]
    batch = pack_sequences(rows)
    hidden = transformer.forward(model, batch)
    return heads.scores(model, transformer.chosen_rows(hidden, last_rows(batch, range(len(rows)))))


def rm(side: Side, lines: Iterator[Order]) -> None:
    """RMStage.train_step of each batch; with {"repeat": true} the same loss with prompts repeated, cut as it cuts."""
    model = scalar_from_policy(side.args.model, side.work["seed"], side.args.dtype)
    config = engine.RMConfig(
        model_name_or_path=side.args.model, output_dir=NOWHERE, micro_batch_tokens=TOKENS
    )
    ready(side)

    def repeated(groups: list[RankedGroup]) -> float:
        loss = 0.0
        for (
            group
        ) in groups:  # one at a time: four prompts with answers are a micro-batch by themselves
            score = repeated_scores(model, [group])
            part, _, _ = ops.ranking_loss(score, ranks_of([group]), answer_offsets([group]))
            (part / len(groups)).backward()
            loss += float(part.detach()) / len(groups)
        return loss

    for order in lines:
        seconds, losses, norms, tokens = 0.0, [], [], 0
        for batch in batches_of(side.work, order):
            groups = [ranked(group) for group in batch]
            clear(model)
            if order.get("repeat"):
                spent, loss = timed(partial(repeated, groups))
            else:
                stage = RMStage(config, model, RMData(groups, [], [], ()))
                spent, metrics = timed(partial(stage.train_step, range(len(groups)), 0))
                loss = metrics["loss"]
            seconds += spent
            losses.append(loss)
            norms.append(gradient_norm(model))
            tokens += sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
        side.answer(seconds, tokens, {"loss": losses, "gradient norm": norms})


class Endless(engine.HybridEngine):
    """A policy whose answers all have the longest length: no token ends a sequence."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset()


def ppo_config(side: Side) -> engine.PPOConfig:
    """TRL's settings of training_peer.py: one epoch, one minibatch; no average of the weights, which TRL has not."""
    return engine.PPOConfig(
        model_name_or_path=side.args.model,
        reward_model_path=side.args.model,  # its trunk, with a new head, as TRL's
        output_dir=NOWHERE,
        micro_batch_tokens=TOKENS,
        batch_size=len(side.work["prompts"]),
        num_mini_batches=1,
        num_ppo_epochs=1,
        response_length=side.work["new_tokens"],
        temperature=1.0,
        kl_coef=0.02,
        lam=0.95,
        ema_decay=0.0,
    )


def ppo(side: Side, lines: Iterator[Order]) -> None:
    """Whole iterations by engine.PPO: rollout, scores of the reward model, one step of policy and value model.

    {"score": rows}: the mean log-prob of the rows' answers under the policy as it is. {"phases": true}: seconds by
    phase beside the rest.
    """
    config, given = ppo_config(side), side.args
    kind = engine.HybridEngine if side.work["stop"] else Endless
    policy = kind.from_pretrained(given.model, dtype=given.dtype, trainable=True)
    reward = scalar_from_policy(given.model, seed=0, dtype=given.dtype, trainable=False)
    reference = load_policy(given.model, given.dtype)
    trainer = engine.PPO(policy, clone(reward, trainable=True), reference, config)
    sources = [Reward("model", 1.0, reward, None)]
    trained = sum(p.numel() for m in (policy.model, trainer.value) for p in m.parameters().values())
    ready(side)

    def iteration() -> tuple[Rollouts, dict[str, float]]:
        rollouts = trainer.rollout(side.work["prompts"])
        score, _ = total_reward(sources, rollouts, config.token_budget)
        return rollouts, trainer.step(rollouts, score)

    for order in lines:
        if "score" in order:
            side.answer(0.0, 0, {"log-prob": [mean_logprob(policy, order["score"])]})
            continue
        with clocked(reference) as clock:
            seconds, (rollouts, stats) = timed(iteration)
        # The engine's own promise, held at every iteration: what was sampled is what is trained, to the bit.
        difference = stats["parity/max_abs_logprob_diff"]
        if policy.model.batch_invariant and difference != 0.0:
            raise AssertionError(f"sampled and trained log-probs differ by {difference}, want 0")
        answers = sum(rollouts.lengths)
        prompts = sum(len(p.tokens) for p in rollouts.prompts)
        more: dict[str, Any] = {"answer_tokens": answers}
        if order.get("phases"):
            lengths = [len(p.tokens) for p in rollouts.prompts]
            more["phases"] = clock
            more["flop"] = phase_flop(policy.model.architecture, lengths, rollouts.lengths)
            more["optimizer_bytes"] = optimizer_bytes(trained)
        side.answer(seconds, prompts + answers, {}, **more)


def mean_logprob(policy: engine.HybridEngine, rows: list[dict[str, Any]]) -> float:
    """Of all answer tokens of the rows."""
    found = policy.logprobs([row["tokens"] for row in rows])
    answers = [x[row["start"] - 1 :] for x, row in zip(found, rows, strict=True)]
    return float(torch.cat(answers).double().mean())


def given_episodes(work: Work) -> Rollouts:
    """Episodes that nobody sampled, as rollouts."""
    at, rows = work["prompt"], work["episodes"]
    prompts = [Prompt(tuple(row[:at]), "", None, {}, "bench") for row in rows]
    completions = []
    for number, row in enumerate(rows):
        none = torch.zeros(len(row) - at)
        answer = Completion(
            tuple(row[:at]), tuple(row[at:]), none, none, "length", number, 0, text=""
        )
        completions.append(answer)
    return Rollouts(tuple(prompts), tuple(completions), 1)


@torch.no_grad()
def own_scores(policy: Model, value: ScalarModel, rollouts: Rollouts, budget: int) -> Scores:
    """Old log-probs and values: the models' own."""
    cuts = micro_batches(rollouts, range(rollouts.num_episodes), budget)
    old = torch.cat([answer_logprobs(policy, cut, 1.0)[0] for cut in cuts])
    values = [all_values(value, cut) for cut in cuts]
    before, last = (torch.cat(parts) for parts in zip(*values, strict=True))
    order = [e for cut in cuts for e in cut.episodes]
    assert order == sorted(order), "want cuts in the order of the episodes"
    return Scores(old, old, before, last, torch.zeros(rollouts.num_episodes))


def ppo_update(side: Side, lines: Iterator[Order]) -> None:
    """The two backward passes of engine.stages.ppo.update, on given episodes."""
    work, given = side.work, side.args
    policy = load_policy(given.model, given.dtype, trainable=True)
    value = scalar_from_policy(given.model, work["seed"], given.dtype, trainable=True)
    config = engine.PPOConfig(
        model_name_or_path=given.model,
        reward_model_path=given.model,
        output_dir=NOWHERE,
        micro_batch_tokens=TOKENS,
    )
    rollouts = given_episodes(work)
    advantages = Advantages(*(torch.tensor(work[n]).flatten() for n in ("advantage", "returns")))
    scores = own_scores(policy, value, rollouts, config.token_budget)
    targets = update.Targets(rollouts, scores, advantages, (), 0.0, 0.0, 0, 0)
    count, cu = sum(rollouts.lengths), rollouts.cu.tolist()
    ready(side)

    def backward(
        one: Callable[..., Any], model: Model, episodes: int, means: update.Means
    ) -> tuple[float, float]:
        """Seconds and the gradient's norm; as in an update, the gradient is gone before the other model's comes."""

        def passes() -> None:
            for answers in micro_batches(rollouts, range(episodes), config.token_budget):
                one(model, targets, answers, update.token_rows(cu, answers), count, config, means)

        seconds, _ = timed(passes)
        norm = gradient_norm(model)
        clear(model)
        return seconds, norm

    for order in lines:
        episodes, means = work["micro_batch"] if order.get("warm_up") else len(work["episodes"]), update.Means()
        policy_s, policy_norm = backward(update.policy_backward, policy, episodes, means)
        value_s, value_norm = backward(update.value_backward, value, episodes, means)
        share = episodes / len(work["episodes"])  # the means are over the tokens that were computed
        checks = {
            "policy loss": [means["policy_loss"] * share],
            "value loss": [means["value_loss"] * share],
            "policy gradient norm": [policy_norm],
            "value gradient norm": [value_norm],
        }
        side.answer(policy_s + value_s, sum(map(len, work["episodes"])), checks)


WORKLOADS: dict[str, Callable[[Side, Iterator[Order]], None]] = {
    "sft": sft,
    "sft-ragged": sft,
    "rm": rm,
    "ppo": ppo,
    "ppo-ragged": ppo,
    "ppo-update": ppo_update,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout is for answers
    torch.set_num_threads(args.threads)
    side = Side(args, json.loads(args.work.read_text()), answers)
    WORKLOADS[args.workload](side, orders(sys.stdin))


if __name__ == "__main__":
    main()
