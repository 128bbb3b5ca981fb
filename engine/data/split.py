"""Splits by hash: which side a row is on depends on its own key and the seed, on no other row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

from engine.data.rows import Dataset
from engine.errors import DataError


class Keyed(Protocol):
    """An item of a data set: demonstration, ranked group or prompt."""

    @property
    def key(self) -> tuple[int, ...]:
        """What makes two rows the same prompt."""


T = TypeVar("T", bound=Keyed)


def hash_share(key: str, seed: int) -> float:
    """A number in [0, 1) that is a function of key and seed: sha256 / 2^53, uniform over keys."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def assign_split(key: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a key; ``shares`` are the splits in order with their shares, summing to 1.

    Raises:
        DataError: a negative share, or a sum other than 1.
    """
    if any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1.0) > 1e-9:
        raise DataError("split shares", f"got {dict(shares)}; want shares >= 0 that sum to 1")
    place, edge = hash_share(key, seed), 0.0
    for name, share in shares.items():
        edge += share
        if place < edge:
            return name
    return [name for name, share in shares.items() if share > 0][-1]  # the sum rounded below 1


def hold_back(data: Dataset[T], fraction: float, seed: int = 0) -> tuple[Dataset[T], Dataset[T]]:
    """Split into (training, validation) by a hash of the prompt: no prompt is on both sides.

    The share is met on average over prompts.

    Raises:
        DataError: a fraction outside [0, 1), or nothing left to train on.
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError("validation share", f"got {fraction}; want 0 <= share < 1")
    train: list[T] = []
    held: list[T] = []
    for item in data.items:
        key = ",".join(map(str, item.key))
        (held if hash_share(key, seed) < fraction else train).append(item)
    if not train:
        reason = f"{fraction} of {len(data)} rows leaves none to train on; give a smaller share"
        raise DataError("validation share", reason)
    return keep(data, train), keep(data, held)


def keep(data: Dataset[T], items: list[T]) -> Dataset[T]:
    """The data set with these of its items; the report tells of the rows that were read for it."""
    return Dataset(tuple(items), replace(data.report, kept=len(items)))
