"""How well scores order the answers: accuracy with its standard error, log loss, by K, by source, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.data.rankings import RankedGroup


def count_pairs(ranks: Sequence[float]) -> int:
    """Pairs that are not ties."""
    return sum(a != b for a, b in combinations(ranks, 2))


def margins(group: RankedGroup, scores: Tensor) -> NDArray[np.float64]:  # (pairs,)
    """score of the better answer minus score of the worse one, for every pair that is not a tie."""
    values = [float(s) for s in scores]
    return np.array(
        [
            (values[i] - values[j]) * (1.0 if group.ranks[i] < group.ranks[j] else -1.0)
            for i, j in combinations(range(len(values)), 2)
            if group.ranks[i] != group.ranks[j]
        ]
    )


def accuracy_with_error(by_prompt: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Share of pairs in the right order, and its standard error with prompts as the independent units: pairs of one
    prompt share their answers, so they are one cluster."""
    right = np.array([np.sum(m > 0) for m in by_prompt], dtype=np.float64)
    pairs = np.array([m.size for m in by_prompt], dtype=np.float64)
    total = pairs.sum()
    if total == 0:
        return math.nan, math.nan
    share = right.sum() / total
    clusters = int((pairs > 0).sum())
    if clusters < 2:
        return float(share), math.nan
    residual = right - share * pairs
    error = math.sqrt(clusters / (clusters - 1) * float((residual**2).sum())) / total
    return float(share), error


def ranking_metrics(
    groups: Sequence[RankedGroup], scores: Sequence[Tensor], bins: int
) -> dict[str, float]:
    """Metrics over all pairs that are not ties; a value that nothing defines (no pairs) is left out."""
    by_prompt = [margins(g, s) for g, s in zip(groups, scores, strict=True)]
    flat = np.concatenate(by_prompt) if by_prompt else np.empty(0)
    everything = np.concatenate([s.double().numpy() for s in scores])
    accuracy, error = accuracy_with_error(by_prompt)
    out = {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "log_loss": float(np.logaddexp(0.0, -flat).mean()) if flat.size else math.nan,
        "margin": float(flat.mean()) if flat.size else math.nan,
        "min_reward": float(everything.min()),
        "mean_reward": float(everything.mean()),
        "max_reward": float(everything.max()),
        "num_pairs": float(flat.size),
        "num_prompts": float(len(groups)),
    }
    for key, members in partition(groups).items():
        share, deviation = accuracy_with_error([by_prompt[i] for i in members])
        out |= {f"{key}/accuracy": share, f"{key}/accuracy_stderr": deviation}
        out[f"{key}/num_pairs"] = float(sum(by_prompt[i].size for i in members))
    out |= calibration(flat, bins)
    return {name: value for name, value in out.items() if not math.isnan(value)}


def partition(groups: Sequence[RankedGroup]) -> dict[str, list[int]]:
    """Groups by K, and by source where there is more than one."""
    parts: dict[str, list[int]] = {}
    sources = {group.source for group in groups}
    for i, group in enumerate(groups):
        parts.setdefault(f"by_k/{len(group.responses)}", []).append(i)
        if len(sources) > 1:
            parts.setdefault(f"by_source/{group.source}", []).append(i)
    return dict(sorted(parts.items()))


def calibration(flat: NDArray[np.float64], bins: int) -> dict[str, float]:
    """Pairs sorted into bins by the predicted probability that one answer beats the other, each pair counted from the
    side that the model prefers (0.5 to 1): mean predicted probability against the share that it got right."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(flat)))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    out = {}
    for b in range(bins):
        inside = which == b
        if inside.any():
            out[f"calibration/{b}/predicted"] = float(confidence[inside].mean())
            out[f"calibration/{b}/observed"] = float((flat[inside] > 0).mean())
            out[f"calibration/{b}/num_pairs"] = float(inside.sum())
    return out
