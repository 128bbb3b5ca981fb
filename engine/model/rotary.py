"""Rotary position embedding: its settings in both spellings of ``config.json``, and its table.

Letters: P positions, R rotated part of a head (``rotary_dim``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.run.device import HOST, to_device

KINDS = ("default", "linear", "llama3")
THETA_KEYS = ("rope_theta", "rotary_emb_base")
SHARE_KEYS = ("partial_rotary_factor", "rotary_pct")
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Rope:
    """The angle of pair j at position p is ``p * f_j`` with ``f_j = theta^(-2j / rotary_dim)``,
    scaled by ``kind``.

    linear: f / factor. llama3: wavelengths above ``original / low_freq_factor`` are divided by
    ``factor``, those below ``original / high_freq_factor`` stay, and those between are
    interpolated.
    """

    rotary_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0

    def table(self, positions: int) -> Tensor:  # (P, R) float32
        """cos in ``[:, :R/2]``, sin in ``[:, R/2:]`` of positions 0 .. P-1.

        Frequencies and angles are rounded to float32 as transformers does: a model saw exactly
        these in training, and a more exact angle would differ from them by 1e-4 at position 4,096.
        """
        half = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32)
        frequency = self._scaled(1.0 / self.theta ** (half / self.rotary_dim))  # (R/2,)
        angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    def _scaled(self, frequency: Tensor) -> Tensor:  # (R/2,) -> (R/2,)
        if self.kind == "default":
            return frequency
        if self.kind == "linear":
            return frequency / self.factor
        wavelength = 2 * math.pi / frequency
        turns = self.original_max_positions / wavelength
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - blend) * frequency / self.factor + blend * frequency
        scaled = torch.where(turns < self.low_freq_factor, frequency / self.factor, between)
        return torch.where(turns > self.high_freq_factor, frequency, scaled)


@functools.lru_cache(maxsize=8)
def rope_table(
    rope: Rope, positions: int, device: torch.device = HOST
) -> Tensor:  # (P, R) float32, P >= positions
    """A table with at least this many rows, kept between calls.

    A row does not depend on how many there are, so growing by doubling changes no result. Angles are those of the
    host's arithmetic on every device.
    """
    return to_device(rope.table(positions), device)


def read_rope(config: Mapping[str, Any], head_dim: int, max_positions: int, partial: bool) -> Rope:
    """The rope of a config: ``rope_parameters`` (transformers 5), or ``rope_theta`` with
    ``rope_scaling`` (before).

    ``partial``: this family may rotate a part of the head only.

    Raises:
        ModelError: a kind other than default, linear, llama3; both spellings that do not say the same; a setting
            missing, contradictory or out of range.
    """
    settings = _stated(config)
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise ModelError(
            f"config.json: rope_parameters: got one set a layer type ({', '.join(settings)}),"
            " want one for all layers"
        )
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in KINDS:
        raise ModelError(f"config.json: rope_type: got {kind!r}, want one of {', '.join(KINDS)}")
    theta = _agreed(config, settings, THETA_KEYS, 10000.0)
    share = _agreed(config, settings, SHARE_KEYS, 0.25 if partial else 1.0)
    if not partial and share != 1.0:
        raise ModelError(
            f"config.json: partial_rotary_factor: got {share}, want 1.0 for {config['model_type']}"
        )
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ModelError(
            f"config.json: {share} of head_dim {head_dim} gives {rotary_dim} rotated entries,"
            f" want an even number from 2 to {head_dim}"
        )
    if theta <= 0:
        raise ModelError(f"config.json: rope_theta: got {theta}, want a number > 0")
    if kind == "default":
        return Rope(rotary_dim, theta)
    factor = _number(settings, "factor", kind)
    if kind == "linear":
        return Rope(rotary_dim, theta, kind, factor)
    settings.setdefault("original_max_position_embeddings", max_positions)
    low, high, original = (_number(settings, key, kind) for key in LLAMA3_KEYS)
    if high <= low:
        raise ModelError(
            f"config.json: high_freq_factor: got {high}, want more than low_freq_factor {low}"
        )
    return Rope(rotary_dim, theta, kind, factor, low, high, int(original))


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the one spelling, or of both where they say the same.

    transformers takes `rope_scaling` alone then, and a rope_theta that only `rope_parameters` has is lost there, which
    nobody means who adds a scaling to a config that transformers 5 wrote.
    """
    found = [dict(config[key]) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if len(found) == 2 and _whole(config, found[0]) != _whole(config, found[1]):
        raise ModelError(
            f"config.json: got rope_parameters {found[0]} and rope_scaling {found[1]}, want one of them, or both the"
            " same; write the scaling into rope_parameters beside its rope_theta, and take rope_scaling out"
        )
    return found[0] if found else {}


def _whole(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling's settings under their newer names, with what the config states beside them."""
    named = {"rope_type": settings.get("rope_type") or settings.get("type") or "default"}
    beside = {key: config.get(key) for key in (*THETA_KEYS, *SHARE_KEYS)}
    own = {key: value for key, value in settings.items() if key not in ("rope_type", "type")}
    return {key: value for key, value in {**beside, **own, **named}.items() if value is not None}


def _agreed(
    config: Mapping[str, Any], settings: Mapping[str, Any], keys: tuple[str, ...], default: float
) -> float:
    """One number that old and new spelling may both state; stating two different ones is an
    error."""
    stated = [place.get(key) for place in (settings, config) for key in keys]
    found = [value for value in stated if value is not None]
    if len(set(found)) > 1:
        raise ModelError(
            f"config.json: {' / '.join(keys)}: got {found} in different places, want one value"
        )
    return float(found[0]) if found else default


def _number(settings: Mapping[str, Any], key: str, kind: str) -> float:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelError(f"config.json: rope {kind!r}: {key}: got {value!r}, want a number > 0")
    return float(value)
