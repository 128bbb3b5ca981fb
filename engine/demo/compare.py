"""Before against after, on prompts that no stage has trained on: win rate, KL, perplexity.

win rate = mean over prompts of w,  w = 1 if the labeler prefers the new answer, 1/2 for a tie, 0 else
95 % half width = 1.96 sqrt(sum (w - mean)^2 / (n - 1) / n)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import HybridEngine
from engine.data.chat import TextEncoder
from engine.demo.labeler import TIE_MARGIN, score
from engine.errors import EngineError


@dataclass(frozen=True)
class WinRate:
    """Counts of the labeler's choices between two answers to the same prompt."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """Share of wins, a tie counting half."""
        return (self.wins + 0.5 * self.ties) / (self.wins + self.ties + self.losses)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval, from the sample variance of the outcomes 1, 1/2, 0."""
        count, rate = self.wins + self.ties + self.losses, self.rate
        if count < 2:
            raise EngineError(f"win rate: got {count} comparison, an interval needs at least 2")
        squares = (
            self.wins * (1 - rate) ** 2 + self.ties * (0.5 - rate) ** 2 + self.losses * rate**2
        )
        return 1.96 * math.sqrt(squares / (count - 1) / count)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, within what a rate can be."""
        return max(self.rate - self.half_width, 0.0), min(self.rate + self.half_width, 1.0)


def win_rate(
    before: Sequence[float], after: Sequence[float], margin: float = TIE_MARGIN
) -> WinRate:
    """How often the second of two scores is better by more than `margin`."""
    gains = [new - old for old, new in zip(before, after, strict=True)]
    wins, losses = sum(g > margin for g in gains), sum(g < -margin for g in gains)
    return WinRate(wins, len(gains) - wins - losses, losses)


@dataclass(frozen=True)
class Answer:
    """A sampled answer, the labeler's score, and what it took from the reference."""

    prompt: str
    text: str
    score: float
    sequence: tuple[int, ...]  # prompt and answer
    logprobs: tuple[float, ...]  # of the answer's tokens


def answers(engine: HybridEngine, prompts: Sequence[str], length: int, seed: int) -> list[Answer]:
    """One answer a prompt, sampled at temperature 1; the same random numbers for every model."""
    out = engine.generate(prompts, max_new_tokens=length, seed=seed)
    scores = score(prompts, [o.text for o in out])
    return [
        Answer(p, o.text, s, (*o.prompt_tokens, *o.tokens), tuple(o.logprobs.tolist()))
        for p, o, s in zip(prompts, out, scores, strict=True)
    ]


def sequence_kl(found: Sequence[Answer], reference: HybridEngine) -> list[float]:
    """log pi(answer) - log ref(answer) of every answer: its mean estimates KL(pi || ref) a sequence."""
    theirs = reference.logprobs([a.sequence for a in found])
    return [
        math.fsum(a.logprobs) - math.fsum(ref[len(ref) - len(a.logprobs) :].tolist())
        for a, ref in zip(found, theirs, strict=True)
    ]


def perplexity(engine: HybridEngine, texts: Sequence[str]) -> float:
    """exp of the mean negative log-prob of every token after a text's first, the end token included."""
    encoder = TextEncoder(engine.tokenizer)
    values = engine.logprobs([[*encoder.document(text), encoder.eos] for text in texts])
    return math.exp(-sum(float(v.double().sum()) for v in values) / sum(v.numel() for v in values))


def read_column(path: Path, name: str) -> list[Any]:
    """One column of a JSON lines file."""
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]
