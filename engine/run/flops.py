"""Operations of the work that a stage does, and the padding that packing saves (InstructGPT 5.1's accounting).

    forward  = tokens 2 P + 4 Hq D pairs layers + rows 2 H columns        training = 3 forward

P: entries of the layers' matrices; pairs: (query, key) pairs that the causal mask leaves; rows: what the head is
computed for, of `columns` outputs (the vocabulary, or 1). Every token counts through every layer once: what
checkpointing computes again is not progress, and what is left out for rows that nobody reads is not taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.run.memory import Sizes

Segment = tuple[int, int]  # (keys before it, own tokens)


@dataclass(frozen=True)
class Work:
    """Of one phase: operations, tokens that it had, tokens that padded batches would have had."""

    flops: float
    tokens: int
    padded: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.tokens + other.tokens, self.padded + other.padded
        )


NOTHING = Work(0.0, 0, 0)


def layer_entries(a: Sizes) -> int:
    """Entries of one layer's matrices."""
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return a.hidden_size * (2 * queries + 2 * keys + (3 if a.gated else 2) * a.intermediate_size)


def forward_flops(a: Sizes, segments: Sequence[Segment], rows: int, columns: int) -> float:
    """Of one forward over packed segments, with the head at `rows` rows."""
    tokens = sum(own for _, own in segments)
    pairs = sum(own * before + own * (own + 1) // 2 for before, own in segments)
    attention = 4.0 * a.num_heads * a.head_dim * pairs
    return (
        a.num_layers * (2.0 * tokens * layer_entries(a) + attention)
        + 2.0 * rows * columns * a.hidden_size
    )


def grouped(prompts: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Segment]:
    """Segments of prompts with answers that share them, of these lengths."""
    found: list[Segment] = []
    for prompt, own in zip(prompts, answers, strict=True):
        found += [(0, prompt), *((prompt, length) for length in own)]
    return found


def padded_tokens(lengths: Sequence[int]) -> int:
    """Of a batch in which every row is as long as the longest."""
    return len(lengths) * max(lengths, default=0)


class Totals:
    """Work and seconds by phase, since this process began the run."""

    def __init__(self) -> None:
        self._work: dict[str, Work] = {}
        self._seconds: dict[str, float] = {}

    def add(self, phase: str, work: Work, seconds: float) -> dict[str, float]:
        """Counts it, and gives its metrics: operations, their rate, padded tokens over real ones."""
        self._work[phase] = self._work.get(phase, NOTHING) + work
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        if work.tokens == 0:  # no model ran: rewards from functions alone
            return {}
        return {
            f"perf/{phase}_flops": work.flops,
            f"perf/{phase}_flops_per_s": work.flops / seconds,
            f"perf/{phase}_padded_over_real": work.padded / work.tokens,
        }

    def lines(self) -> list[str]:
        """One a phase, for the end of a run."""
        found = []
        for phase, work in self._work.items():
            seconds = self._seconds[phase]
            if work.tokens == 0:
                continue
            rate, saved = work.flops / seconds / 1e12, work.padded / work.tokens
            found.append(
                f"{phase}: {work.flops / 1e12:.4g} TFLOP in {seconds:.1f} s, {rate:.3g} TFLOP/s;"
                f" {work.tokens} tokens, padded batches would have had {saved:.2f} times as many"
            )
        return found
