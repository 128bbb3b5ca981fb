"""Where a PPO iteration's time goes: seconds by phase, and the work that nobody can do without.

FLOP of a phase (P prompt tokens, A answer tokens of all episodes, T = P + A; E_l elements of the layers' matrices, E_h
of the head; S the attention's FLOP, causal; a multiplication and an addition are two):

    rollout            2 E_l T + 2 E_h A + S          prefill and decoding, each token once
    reference          2 E_l T + 2 E_h A + S
    reward, value      2 E_l T + S
    policy update      3 (2 E_l T + 2 E_h A + S)      forward and backward; what is computed again does not count
    value update       3 (2 E_l T + S)
    optimizer          no FLOP worth counting: bytes, two models' masters, moments and gradients, 16 read and 12 written
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from bench import machine
from engine.model.transformer import Model
from engine.run.flops import forward_flops, grouped
from engine.run.memory import Sizes
from engine.run.optim import Optimizer
from engine.stages.ppo import reward_sources, score, trainer, update

Row = dict[str, Any]
PHASES = (
    "rollout",
    "reference",
    "reward",
    "value",
    "policy update",
    "value update",
    "optimizer",
    "rest",
)
BYTES_A_PARAMETER = (
    28  # of a float32 Adam step: master, two moments, gradient read; the first three written
)


@contextmanager
def clocked(reference: Model) -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs inside the block. `reference` tells its forward from the policy's own."""
    seconds = dict.fromkeys(PHASES[:-1], 0.0)

    def timed(run: Callable[..., Any], phase_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*given, **named)
            finally:
                phase = phase_of(*given)
                seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

        return call

    def scorer(model: Model, *_: Any) -> str:
        return "reference" if model is reference else "policy again"

    places: list[tuple[Any, str, Callable[..., str]]] = [
        (trainer, "rollout", lambda *_: "rollout"),
        (score, "answer_logprobs", scorer),
        (score, "all_values", lambda *_: "value"),
        (reward_sources, "model_scores", lambda *_: "reward"),
        (update, "policy_backward", lambda *_: "policy update"),
        (update, "value_backward", lambda *_: "value update"),
        (Optimizer, "step", lambda *_: "optimizer"),
    ]
    with ExitStack() as stack:
        for module, name, phase_of in places:
            wrapped = timed(getattr(module, name), phase_of)
            stack.enter_context(mock.patch.object(module, name, wrapped))
        yield seconds


def phase_flop(a: Sizes, prompts: Sequence[int], answers: Sequence[int]) -> dict[str, float]:
    """FLOP by phase, as the module's formulas; one answer a prompt, lengths in tokens."""
    segments = grouped(prompts, [[n] for n in answers])
    trunk = forward_flops(a, segments, 0, 0)
    head = forward_flops(a, [], sum(answers), a.vocab_size)
    return {
        "rollout": trunk + head,
        "reference": trunk + head,
        "reward": trunk,
        "value": trunk,
        "policy update": 3 * (trunk + head),
        "value update": 3 * trunk,
    }


def optimizer_bytes(parameters: int) -> float:
    """Of one step over so many float32 masters, each byte once."""
    return float(BYTES_A_PARAMETER * parameters)


def phases(answers: Sequence[Row], limits: Row) -> Row:
    """By phase, of some iterations: median seconds, share, and FLOP (bytes) a second over the machine's.

    `answers` are those of an engine's side to {"phases": true}.
    """
    totals = [answer["seconds"] for answer in answers]
    names = dict.fromkeys(name for answer in answers for name in answer["phases"])
    out: Row = {}
    for name in names:
        found = [answer["phases"].get(name, 0.0) for answer in answers]
        part = {"seconds": statistics.median(found)}
        part["share"] = statistics.median(s / t for s, t in zip(found, totals, strict=True))
        rates = [
            answer["flop"].get(name, 0.0) / s for answer, s in zip(answers, found, strict=True) if s
        ]
        if any(rates):
            part["gflops"] = statistics.median(rates) * 1e-9
            part["of_peak"] = statistics.median(rates) / machine.product_rate(limits)
        out[name] = part
    rest = [t - sum(a["phases"].values()) for t, a in zip(totals, answers, strict=True)]
    out["rest"] = {
        "seconds": statistics.median(rest),
        "share": statistics.median(s / t for s, t in zip(rest, totals, strict=True)),
    }
    size = answers[0]["optimizer_bytes"]
    rate = size / out["optimizer"]["seconds"]
    out["optimizer"] |= {"gb_per_s": rate * 1e-9, "of_copy": rate / machine.copy_rate(limits, size)}
    return out
