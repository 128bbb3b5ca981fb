"""The scalar head of reward and value models.

    score = w . hidden + constant

The output matrix of the language model is replaced by one row w (InstructGPT C.2), drawn with
standard deviation 1 / sqrt(H + 1) (Stiennon et al. 2020, as their code has it). There is no bias:
the constant that makes demonstrations score 0 on average is one, and the ranking loss cannot see
it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.kernels.linear import PackedWeight

from .transformer import Model

ENDINGS = ("end", "eo", "/")  # <|im_end|>, <eos>, <|eot_id|>, </s>: a scored text may stop with one


@dataclass(frozen=True)
class ScalarModel(Model):
    """A model whose head gives one number a row. The head stays float32 in every storage type."""

    constant: float = 0.0

    @property
    def head_name(self) -> str:
        return "score.weight"

    @property
    def head(self) -> PackedWeight:
        raise ModelError("a scalar model has no vocabulary to predict; use heads.scores")

    def with_constant(self, constant: float) -> ScalarModel:
        """The same weights, with another constant added to every score."""
        return replace(self, constant=constant)


def scores(model: ScalarModel, hidden: Tensor) -> Tensor:  # (M, H) -> (M,) float32
    """hidden . w + constant, a row; differentiable."""

    def head(x: Tensor) -> Tensor:  # (M, H) float32 -> (M, 1)
        (score,) = model.weights.project(x, ("score",))
        return score

    return model.weights.through("score", head, hidden.float()).squeeze(1) + model.constant


def new_score_weight(hidden_size: int, seed: int) -> Tensor:  # (1, H) float32
    """A fresh head: normal, standard deviation 1 / sqrt(H + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def choose_pad_token(
    config: Mapping[str, Any], tokenizer: Any | None, ends: Collection[int]
) -> int | None:
    """The pad token by which transformers finds the last token of a sequence; None where no token
    will do.

    transformers reads the score at the last token that is not the pad token. A pad token that is
    also an end-of-sequence token, common in language models, would make it read one token too
    early. So it is the first of these that is no end: the tokenizer's pad token, the config's, a
    special token with "pad" in its name, the unknown token, the begin-of-sequence token, a special
    token whose name does not speak of an end (the start of a turn, say).
    """
    candidates = [config.get("pad_token_id")]
    if tokenizer is not None:
        added = sorted(tokenizer.added_tokens_decoder.items())
        special = [(i, str(token).lower()) for i, token in added if token.special]
        candidates.insert(0, tokenizer.pad_token_id)
        candidates += [i for i, name in special if "pad" in name]
        candidates += [tokenizer.unk_token_id, tokenizer.bos_token_id]
        candidates += [i for i, name in special if not any(end in name for end in ENDINGS)]
    fits = [c for c in candidates if c is not None and 0 <= c < config["vocab_size"]]
    return next((c for c in fits if c not in ends), None)
