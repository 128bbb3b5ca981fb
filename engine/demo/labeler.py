"""The demo's labeler: a word list that stands in for people.

No person ranked anything here. vaderSentiment's lexicon gives a text a compound score from -1 (negative) to 1
(positive), and the demo pretends that this is how a labeler who likes positive reviews judges. It is a fixed
function, so what RLHF did to the model can be checked exactly. PPO never sees it: it ranks samples for the reward
model, and at the end it judges answers to prompts that no stage has trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from engine.demo.model import require

NOTE = (
    "The labeler is vaderSentiment's lexicon standing in for people: it prefers positive reviews. "
    "PPO never sees it, only the reward model trained on its rankings."
)
TIE_MARGIN = 0.05
"""Scores no further apart than this are a tie: the lexicon's own threshold of neutral."""


@cache
def analyzer() -> Any:
    """vaderSentiment's analyzer; it reads its lexicon from disk once."""
    require("vaderSentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The labeler's score of every completion, -1 to 1, higher is better; TRL's signature of a reward function.

    Only the completion is judged: what the prompt asks for has no sentiment of its own.
    """
    return [float(analyzer().polarity_scores(text)["compound"]) for text in completions]
