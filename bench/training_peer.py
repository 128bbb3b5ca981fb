"""The other side of bench.ppo and bench.train: a peer in its own environment that does one workload, again and again.

    PEER_PYTHON bench/training_peer.py hf|trl WORKLOAD --work FILE --model FOLDER --dtype float32 --threads 2

First {"versions": {...}}. Then one JSON order a line in, one JSON answer a line out. Order {} runs the whole workload,
{"warm_up": true} what is enough to warm up. Answers hold `seconds`, `tokens` (real ones, padding not counted), `checks`
(numbers that the engine must give too, by name) and `peak_memory_gb` of the process so far. FILE holds the work itself,
as token ids, the same for both sides. It imports nothing of the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

Work = dict[str, Any]
Order = dict[str, Any]
Answer = dict[str, Any]
Run = Callable[[Order], Answer]
PAD = 0
PACKAGES = {"hf": ("transformers", "torch"), "trl": ("trl", "transformers", "torch")}


def peak_memory_gb() -> float:
    """The largest resident memory that this program has had.

    The kernel's own count for this program: that of `getrusage` begins with the program that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 * 1e-9
    kibibytes = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes * 1e-9


def orders(lines: TextIO) -> Iterator[Order]:
    for line in lines:
        yield json.loads(line)


def batches_of(work: Work, order: Order) -> list[Any]:
    """The batches that an order asks for."""
    return [work["warm_up"]] if order.get("warm_up") else work["batches"]


class Side:
    """What both kinds of sides have: the model's folder and dtype, the work, and answers to orders."""

    def __init__(self, args: argparse.Namespace, work: Work, answers: TextIO) -> None:
        self.args, self.work, self._answers = args, work, answers

    def say(self, answer: Answer) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def answer(self, seconds: float, tokens: int, checks: dict[str, Any], **more: Any) -> None:
        found = {"seconds": seconds, "tokens": tokens, "checks": checks, **more}
        self.say({**found, "peak_memory_gb": peak_memory_gb()})


def prepared(model: Any) -> Any:
    """Ready to train, with a pad token that no row holds.

    Where a folder's pad token is the end of sequence, transformers gives its embedding no gradient, though rows end
    with it: the engine gives it one, and so must a peer that does the same work.
    """
    model.config.pad_token_id = PAD
    model.get_input_embeddings().padding_idx = None
    return model.train()


def causal(side: Side) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, side.args.dtype)
    return prepared(AutoModelForCausalLM.from_pretrained(side.args.model, dtype=dtype))


def scalar(side: Side) -> Any:
    """A sequence-classification model with the head that the work brings, where it brings one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = getattr(torch, side.args.dtype)
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(side.args.model, num_labels=1, dtype=dtype)
    if "head" in side.work:
        with torch.no_grad():
            model.score.weight.copy_(torch.tensor(side.work["head"])[None])
    return prepared(model)


def gradient_norm(model: Any) -> float:
    found = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return float(sum(norm.double() ** 2 for norm in found) ** 0.5)


def sft(side: Side, lines: Iterator[Order]) -> None:
    """Forward and backward of the language-model loss, rows padded to the longest of their batch; no optimizer step."""
    import torch

    model = causal(side)
    side.say({"versions": versions("hf")})

    def loss_of(rows: list[dict[str, Any]]) -> Any:
        width = max(len(row["tokens"]) for row in rows)
        ids, labels, mask = (
            torch.full((len(rows), width), fill) for fill in (PAD, -100, 0)
        )  # (B, T) each
        for i, row in enumerate(rows):
            tokens, start = torch.tensor(row["tokens"]), row["start"]
            ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
            labels[i, start : len(tokens)] = tokens[start:]
        whole = bool(mask.all())
        return model(input_ids=ids, labels=labels, attention_mask=None if whole else mask).loss

    for order in lines:
        seconds, losses, norms, batches = 0.0, [], [], batches_of(side.work, order)
        for rows in batches:
            began = time.perf_counter()
            model.zero_grad(set_to_none=True)
            loss = loss_of(rows)
            loss.backward()
            seconds += time.perf_counter() - began
            losses.append(float(loss.detach()))
            norms.append(gradient_norm(model))
        tokens = sum(len(row["tokens"]) for rows in batches for row in rows)
        side.answer(seconds, tokens, {"loss": losses, "gradient norm": norms})


def rm(side: Side, lines: Iterator[Order]) -> None:
    """Forward and backward of the ranking loss, pair by pair, each answer a forward of its own without padding."""
    import torch
    from torch.nn.functional import logsigmoid

    model = scalar(side)
    side.say({"versions": versions("hf")})

    def score(tokens: list[int]) -> Any:
        return model(input_ids=torch.tensor([tokens])).logits[0, 0].float()

    def backward(group: dict[str, Any], share: float) -> tuple[float, int]:
        """Adds the gradient of a prompt's mean over its pairs, times `share`; its loss and tokens."""
        ranks, loss, tokens = group["ranks"], 0.0, 0
        k = range(len(ranks))
        pairs = [(i, j) for i in k for j in k if ranks[i] < ranks[j]]
        for pair in pairs:
            rows = [group["prompt"] + group["responses"][i] for i in pair]
            chosen, rejected = (score(row) for row in rows)
            part = -logsigmoid(chosen - rejected) * (share / len(pairs))
            part.backward()
            loss, tokens = loss + float(part.detach()), tokens + sum(map(len, rows))
        return loss, tokens

    for order in lines:
        seconds, losses, norms, computed = 0.0, [], [], 0
        batches = batches_of(side.work, order)
        for groups in batches:
            began = time.perf_counter()
            model.zero_grad(set_to_none=True)
            done = [backward(group, 1.0 / len(groups)) for group in groups]
            seconds += time.perf_counter() - began
            losses.append(sum(loss for loss, _ in done))
            norms.append(gradient_norm(model))
            computed += sum(tokens for _, tokens in done)
        prompts = sum(len(group["prompt"]) for groups in batches for group in groups)
        answers = sum(len(a) for groups in batches for group in groups for a in group["responses"])
        checks = {"loss": losses, "gradient norm": norms}
        side.answer(seconds, prompts + answers, checks, computed_tokens=computed)


def ppo_update(side: Side, lines: Iterator[Order]) -> None:
    """Forward and backward of PPO's two losses on given episodes, in micro-batches; no optimizer step.

    Old log-probs and old values are the models' own, so that no ratio is clipped.
    """
    import torch

    work, policy, value = side.work, causal(side), scalar(side)
    prompt, ids = work["prompt"], torch.tensor(work["episodes"])  # (E, T)
    advantage, returns = torch.tensor(work["advantage"]), torch.tensor(work["returns"])  # (E, A)
    answer = ids[:, prompt:]
    side.say({"versions": versions("hf")})

    def logprobs(part: slice) -> Any:  # (B, A)
        logits = policy(ids[part], logits_to_keep=answer.shape[1] + 1).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, answer[part][..., None])[..., 0]

    def values(part: slice) -> Any:  # (B, A)
        hidden = value.model(ids[part]).last_hidden_state[:, prompt - 1 : -1]
        return value.score(hidden)[..., 0].float()

    parts = [slice(i, i + work["micro_batch"]) for i in range(0, len(ids), work["micro_batch"])]
    with torch.no_grad():
        old = torch.cat([logprobs(part) for part in parts])
        old_value = torch.cat([values(part) for part in parts])

    def backward(part: slice) -> tuple[float, float]:
        ratio = (logprobs(part) - old[part]).exp()
        clipped = -advantage[part] * ratio.clamp(0.8, 1.2)
        policy_loss = torch.max(-advantage[part] * ratio, clipped).sum() / answer.numel()
        now = values(part)
        near = old_value[part] + (now - old_value[part]).clamp(-0.2, 0.2)
        errors = torch.max((now - returns[part]) ** 2, (near - returns[part]) ** 2)
        value_loss = 0.5 * errors.sum() / answer.numel()
        policy_loss.backward()
        value_loss.backward()
        return float(policy_loss.detach()), float(value_loss.detach())

    for order in lines:
        began = time.perf_counter()
        policy.zero_grad(set_to_none=True)
        value.zero_grad(set_to_none=True)
        losses = [backward(part) for part in parts[: 1 if order.get("warm_up") else None]]
        seconds = time.perf_counter() - began
        checks = {
            "policy loss": [sum(loss for loss, _ in losses)],
            "value loss": [sum(loss for _, loss in losses)],
            "policy gradient norm": [gradient_norm(policy)],
            "value gradient norm": [gradient_norm(value)],
        }
        side.answer(seconds, ids.numel(), checks)


def ppo(side: Side, lines: Iterator[Order]) -> None:
    """Whole iterations by TRL's own trainer: rollout, scoring by four models, one update epoch, one optimizer step.

    The trainer waits for an order where a generation, hence an iteration, begins, and answers where the next one does.
    """
    import torch
    import trl.experimental.ppo.ppo_trainer as module

    trainer, generate = trl_trainer(side), module.batch_generation
    stop = trainer.stop_token_id
    began, told = 0.0, {}

    def tokens_of(row: list[int], width: int) -> tuple[list[int], int]:
        """A row without padding, its answer up to the end of sequence; and where the answer starts."""
        query, answer = [t for t in row[:width] if t != PAD], row[width:]
        if stop is not None and stop in answer:
            answer = answer[: answer.index(stop) + 1]
        return query + answer, len(query)

    def generation(model: Any, queries: Any, *given: Any, **named: Any) -> Any:
        nonlocal began, told
        if told:
            side.answer(time.perf_counter() - began, **told)
        next(lines)
        began = time.perf_counter()
        out = generate(model, queries, *given, **named)
        paused = time.perf_counter()  # what is noted of the answers is not part of the work
        ids, logits = out
        width = queries.shape[1]
        rows = [tokens_of(row, width) for row in ids.tolist()]
        real = [len(row) - start for row, start in rows]
        total = 0.0
        for i, n in enumerate(real):
            scores = logits[i, :n].float().log_softmax(-1)
            total += float(scores.gather(-1, ids[i, width : width + n, None]).double().sum())
        told = {
            "tokens": sum(len(row) for row, _ in rows),
            "checks": {"log-prob": [total / sum(real)]},
            "answer_tokens": sum(real),
            "generation_s": paused - began,
            "sampled": [{"tokens": row, "start": start} for row, start in rows],
        }
        began += time.perf_counter() - paused
        return out

    module.batch_generation = generation
    side.say({"versions": versions("trl")})
    torch.set_num_threads(side.args.threads)  # accelerate may have changed it
    trainer.train()


def trl_trainer(side: Side) -> Any:
    """Configured as a user of TRL would for this work; its optimizer, losses and padding are its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    work = side.work
    prompts, batch = work["prompts"], work["micro_batch"]
    tokenizer = AutoTokenizer.from_pretrained(side.args.model, padding_side="left")
    tokenizer.pad_token_id = PAD
    policy, reference, reward, value = causal(side), causal(side), scalar(side), scalar(side)
    rows = Dataset.from_dict({"input_ids": prompts})
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(prompts) // batch,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=len(prompts) * 1000,  # more than anybody will order
        response_length=work["new_tokens"],
        stop_token="eos" if work["stop"] else None,
        missing_eos_penalty=1.0 if work["stop"] else None,
        temperature=1.0,
        kl_coef=0.02,
        lam=0.95,
        num_sample_generations=0,
        local_rollout_forward_batch_size=len(prompts),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
    )


def versions(peer: str) -> dict[str, str]:
    return {name: str(import_module(name).__version__) for name in PACKAGES[peer]}


WORKLOADS: dict[str, dict[str, Callable[[Side, Iterator[Order]], None]]] = {
    "hf": {"sft": sft, "sft-ragged": sft, "rm": rm, "ppo-update": ppo_update},
    "trl": {"ppo": ppo, "ppo-ragged": ppo},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=sorted(WORKLOADS))
    parser.add_argument("workload")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The peers' own words go to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(args.threads)
    side = Side(args, json.loads(args.work.read_text()), answers)
    WORKLOADS[args.peer][args.workload](side, orders(sys.stdin))


if __name__ == "__main__":
    main()
