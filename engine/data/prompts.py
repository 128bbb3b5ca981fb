"""Prompts for sampling and PPO: ``prompt`` or ``messages``, other columns kept for rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.chat import Message, TextEncoder, check_prompt
from engine.data.rows import (
    BadRow,
    BadRows,
    Dataset,
    DataSource,
    Row,
    check_length,
    collect,
    row_source,
)


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for an answer to follow."""

    tokens: tuple[int, ...]
    text: str
    """The prompt as text; a talk as a transcript."""
    messages: tuple[Message, ...] | None
    """The talk, if the row has one."""
    columns: Mapping[str, Any]
    """All other columns of the row, for reward functions."""
    source: str

    @property
    def key(self) -> tuple[int, ...]:
        """What makes two rows the same prompt."""
        return self.tokens


ARGUMENTS = ("prompts", "completions")  # of a reward function, beside the columns


def reward_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns as reward functions get them: by name, a value a prompt, None where its row has none.

    ``messages`` is one of them where a row has a talk, since ``prompts`` are texts. Columns of the names of the
    function's own arguments are not; see :func:`not_for_rewards`.
    """
    names = sorted({name for prompt in prompts for name in prompt.columns} - set(ARGUMENTS))
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    if any(prompt.messages is not None for prompt in prompts):
        columns["messages"] = [None if p.messages is None else [dict(m) for m in p.messages] for p in prompts]
    return columns


def not_for_rewards(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Lines for a log about columns that no reward function gets."""
    hidden = [name for name in ARGUMENTS if any(name in prompt.columns for prompt in prompts)]
    if not hidden:
        return ()
    arguments = ", ".join(ARGUMENTS)
    return (f"columns that no reward function gets, since {arguments} are its own arguments: {', '.join(hidden)}",)


def load_prompts(
    sources: Sequence[DataSource | str],
    tokenizer: Any,
    max_length: int | None = None,
    bad_rows: BadRows = "error",
    parse_special_tokens: bool = False,
) -> Dataset[Prompt]:
    """Prompts from rows with ``prompt`` (text or messages) or ``messages``.

    Prompts of more than ``max_length`` tokens are left out and counted [InstructGPT C: longer than
    1k tokens], whatever ``bad_rows`` says.

    Raises:
        DataError: a bad row with ``bad_rows="error"``, or no usable one.
    """
    encoder = TextEncoder(tokenizer, parse_special_tokens)

    def parse(row: Row) -> Prompt:
        talk = check_prompt(row.columns, "prompt")
        tokens = tuple(encoder.prompt(talk))
        if not tokens:
            raise BadRow("empty prompt", "prompt: no tokens are left of it")
        check_length(len(tokens), max_length, "the prompt", filtered=True)
        others = {k: v for k, v in row.columns.items() if k not in ("prompt", "messages")}
        return Prompt(tokens, talk.plain, talk.messages, others, row_source(row))

    return collect(sources, parse, bad_rows)
