"""Demonstrations for SFT, and running text packed into full rows for the pretraining mix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.chat import TextEncoder, check_answer, check_messages, check_prompt
from engine.data.pack import epoch_order, stream_rows
from engine.data.rows import (
    BadRow,
    BadRows,
    Columns,
    Dataset,
    DataSource,
    Report,
    Row,
    check_length,
    check_text,
    collect,
    require_column,
    row_source,
)
from engine.errors import DataError

# The order of documents is one pass over them, apart from the order of the rows cut from them.
DOCUMENT_PASS = 0
FORMS = ("completion", "messages", "text")  # of a demonstration, by the column that it has; the first counts


@dataclass(frozen=True)
class Example:
    """One demonstration. Tokens from ``response_start`` on are trained, the end token with them."""

    tokens: tuple[int, ...]
    response_start: int
    prompt_length: int
    """Tokens of the prompt, 0 of a text without one, before which a token may begin the sequence all the same."""
    source: str

    @property
    def key(self) -> tuple[int, ...]:
        """What makes two rows the same prompt; a text without a prompt is its own."""
        return self.tokens[: self.prompt_length] or self.tokens


def load_sft(
    sources: Sequence[DataSource | str],
    tokenizer: Any,
    max_length: int | None = None,
    full_sequence: bool = False,
    truncate: bool = False,
    bad_rows: BadRows = "error",
    parse_special_tokens: bool = False,
) -> Dataset[Example]:
    """Demonstrations from rows of any of the forms below.

    * ``prompt``, ``completion``: strings or messages; with ``messages`` beside them, these are the
      prompt's talk;
    * ``messages``: the last turn, the assistant's, is the response;
    * ``text``: no prompt, all of it is the response.

    A response is its tokens and the end-of-sequence token. With ``full_sequence`` the prompt's
    tokens are trained too. Rows of more than ``max_length`` tokens are bad rows, or with
    ``truncate`` lose the end of their response and are counted in the report.

    Raises:
        DataError: a bad row with ``bad_rows="error"``, or no usable one.
    """
    encoder = TextEncoder(tokenizer, parse_special_tokens)
    truncated = 0

    def parse(row: Row) -> Example:
        nonlocal truncated
        prompt, response = encode_demonstration(encoder, row.columns)
        tokens = prompt + response
        if truncate and max_length is not None and len(tokens) > max_length > len(prompt):
            tokens = tokens[:max_length]
            truncated += 1
        check_length(len(tokens), max_length, "the prompt with its response")
        start = 0 if full_sequence else len(prompt)
        asked = 0 if require_column(row.columns, *FORMS) == "text" else len(prompt)
        return Example(tuple(tokens), start, asked, row_source(row))

    return collect(sources, parse, bad_rows, lambda: truncated)


def encode_demonstration(encoder: TextEncoder, columns: Columns) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids of a row of any form.

    Raises:
        BadRow: a missing column, an empty response, a talk that does not end with the assistant.
    """
    form = require_column(columns, *FORMS)
    if form == "completion":
        talk = check_prompt(columns, "prompt")
        response = encoder.answer(check_answer(columns["completion"], "completion"), talk)
        return encoder.prompt(talk), response
    if form == "text":
        text = check_text(columns["text"], "text")
        if not text.strip():
            raise BadRow("empty answer", "text: it is empty")
        return list(encoder.lead), encoder.answer(text)
    messages = check_messages(columns["messages"], "messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        reason = "messages: want a talk that ends with the assistant's answer to a prompt"
        raise BadRow("bad messages", f"{reason}; got {[m['role'] for m in messages]}")
    answer = check_answer([messages[-1]], "messages")
    talk = check_prompt({**columns, "messages": messages[:-1]}, "messages")
    return encoder.prompt(talk), encoder.answer(answer, talk)


@dataclass(frozen=True)
class PretrainRows:
    """Running text as R full rows of L tokens, addressed by number.

    ``rows`` follows the endless stream of passes over the R rows, each in its own order, so a place
    in that stream is all that a resume needs.
    """

    table: NDArray[np.int32]  # (R, L)
    seed: int
    report: Report
    tokens_left_over: int
    """Tokens after the last full row, left out."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def length(self) -> int:
        """L."""
        return int(self.table.shape[1])

    def __getitem__(self, number: int) -> list[int]:
        return [int(token) for token in self.table[number]]

    def rows(self, places: Iterable[int]) -> list[list[int]]:
        """The rows at these places of the stream of passes, each of L tokens."""
        return [self[i] for i in stream_rows(len(self), self.seed, places)]

    @property
    def num_tokens(self) -> int:
        """R * L."""
        return int(self.table.size)

    def lines(self) -> list[str]:
        """What became of the text, as lines for a log."""
        count, length = self.table.shape
        left = f"  tokens after the last full row, left out: {self.tokens_left_over}"
        return [*self.report.lines(), f"  {count} rows of {length} tokens", left]


def load_pretrain(
    sources: Sequence[DataSource | str],
    tokenizer: Any,
    length: int,
    seed: int = 0,
    bad_rows: BadRows = "error",
    parse_special_tokens: bool = False,
) -> PretrainRows:
    """Rows with ``text``, shuffled as documents, joined by end-of-sequence tokens and cut.

    Every row is ``length`` tokens and may hold the end of one document and the start of the next,
    as in pretraining. The order is a function of ``seed`` alone.

    Raises:
        DataError: a bad row with ``bad_rows="error"``, or less text than one row.
    """
    if length < 2:
        raise DataError("pretraining rows", f"got length {length}; want at least 2 tokens a row")
    encoder = TextEncoder(tokenizer, parse_special_tokens)

    def parse(row: Row) -> NDArray[np.int32]:
        text = check_text(row.columns[require_column(row.columns, "text")], "text")
        if not text.strip():
            raise BadRow("empty text", "text: it is empty")
        return np.array([*encoder.document(text), encoder.eos], dtype=np.int32)

    documents = collect(sources, parse, bad_rows)
    order = epoch_order(len(documents), seed, DOCUMENT_PASS)
    stream = np.concatenate([documents[int(i)] for i in order])
    count = len(stream) // length
    if count == 0:
        reason = f"{len(stream)} tokens of text, less than one row of {length}; give more text"
        raise DataError("pretraining rows", f"{reason} or shorter rows", "no rows")
    table = stream[: count * length].reshape(count, length)
    return PretrainRows(table, seed, documents.report, len(stream) - count * length)
