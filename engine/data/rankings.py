"""Rankings of K answers to one prompt: K-way rows, NeMo-RL rows and pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.chat import (
    CUE,
    Message,
    Talk,
    TextEncoder,
    check_answer,
    check_messages,
    check_not_for_template,
    check_prompt,
    split_transcript,
)
from engine.data.rows import (
    BadRow,
    BadRows,
    Columns,
    Dataset,
    DataSource,
    Row,
    check_length,
    check_text,
    collect,
    require_column,
    row_source,
)

MAX_RANK = 2**53  # beyond it, different whole numbers are one float and would tie


@dataclass(frozen=True)
class RankedGroup:
    """K ranked answers to one prompt: one batch element of the reward model [InstructGPT 3.5]."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    """K answers, each with its end-of-sequence token unless it was cut, best first from :func:`load_rankings`."""
    ranks: tuple[float, ...]
    """Lower is better, equal is a tie."""
    source: str

    @property
    def key(self) -> tuple[int, ...]:
        """What makes two rows the same prompt."""
        return self.prompt


def load_rankings(
    sources: Sequence[DataSource | str],
    tokenizer: Any,
    max_length: int | None = None,
    bad_rows: BadRows = "error",
    parse_special_tokens: bool = False,
) -> Dataset[RankedGroup]:
    """Ranked groups from rows of any of the forms below, K free to differ between rows.

    * ``prompt``, ``responses [K]``, ``ranks [K]``: lower is better, equal is a tie;
    * ``context``, ``completions: [{rank, completion}]`` (NeMo-RL);
    * ``prompt``, ``chosen``, ``rejected``: answers, or whole talks that begin with the prompt;
    * ``chosen``, ``rejected``: the prompt is their common beginning, see :func:`split_pair`.

    Texts are strings or lists of messages. An answer ends with the end-of-sequence token; where
    ``finish_reasons [K]`` stands beside ``responses``, as :mod:`engine.sample` writes it, those
    that were cut ("length") do not: PPO has the reward model score cut answers too. A group whose
    prompt and longest answer have more than
    ``max_length`` tokens is a bad row: an answer without its end would be scored elsewhere.

    Raises:
        DataError: a bad row with ``bad_rows="error"``, or no usable one.
    """
    encoder = TextEncoder(tokenizer, parse_special_tokens)

    def parse(row: Row) -> RankedGroup:
        talk, answers, ranks = parse_ranking(row.columns)
        prompt = tuple(encoder.prompt(talk))
        if not prompt:
            raise BadRow("empty prompt", "prompt: no tokens are left of it")
        if encoder.has_template and is_cut(row.columns):
            # Cut from running text, they begin with the white space that a turn's text has not.
            answers = tuple(answer.strip() for answer in answers)
        unfinished = check_unfinished(row.columns, len(answers))
        whole = [encoder.answer(answer, talk) for answer in answers]
        responses = tuple(tuple(ids[:-1] if u else ids) for ids, u in zip(whole, unfinished, strict=True))
        longest = max(len(response) for response in responses)
        check_length(len(prompt) + longest, max_length, "the prompt with its longest answer")
        # So ranking_loss needs not sort them, and rows that say the same are the same group.
        best_first = sorted(range(len(ranks)), key=ranks.__getitem__)
        return RankedGroup(
            prompt,
            tuple(responses[i] for i in best_first),
            tuple(ranks[i] for i in best_first),
            row_source(row),
        )

    return collect(sources, parse, bad_rows)


def parse_ranking(columns: Columns) -> tuple[Talk, tuple[str, ...], tuple[float, ...]]:
    """Prompt, answers and ranks of a row of any form.

    Raises:
        BadRow: a missing column, K below 2, ranks of another length or not finite, an empty answer.
    """
    form = require_column(columns, "responses", "completions", "chosen")
    if form == "chosen":
        require_column(columns, "rejected")
        return parse_pair(columns)
    if form == "responses":
        require_column(columns, "ranks")
        talk = check_prompt(columns, "prompt")
        answers = check_list(columns["responses"], "responses")
        ranks = check_list(columns["ranks"], "ranks")
    else:
        talk = check_prompt(columns, "context", "prompt")
        entries = check_list(columns["completions"], "completions")
        for number, entry in enumerate(entries):
            if not isinstance(entry, Mapping) or not {"rank", "completion"} <= set(entry):
                reason = f"completions[{number}]: got {str(entry)[:60]!r}"
                raise BadRow("missing column", f"{reason}, want {{'rank', 'completion'}}")
        answers = [entry["completion"] for entry in entries]
        ranks = [entry["rank"] for entry in entries]
    if len(ranks) != len(answers):
        reason = f"{len(ranks)} ranks for {len(answers)} answers; want one rank an answer"
        raise BadRow("ranks of another length", reason)
    if len(answers) < 2:
        reason = f"K = {len(answers)} answer(s); want at least 2 to compare"
        raise BadRow("fewer than two answers", reason)
    texts = tuple(check_answer(answer, f"answer {i}") for i, answer in enumerate(answers))
    return talk, texts, tuple(check_rank(rank, i) for i, rank in enumerate(ranks))


def check_unfinished(columns: Columns, count: int) -> list[bool]:
    """Whether each answer was cut at its longest: only rows of ``responses`` say it, in ``finish_reasons``.

    Raises:
        BadRow: not one of "stop" and "length" an answer.
    """
    given = columns.get("finish_reasons")
    if given is None or columns.get("responses") is None:
        return [False] * count
    reasons = check_list(given, "finish_reasons")
    if len(reasons) != count or not all(reason in ("stop", "length") for reason in reasons):
        reason = f"finish_reasons: got {str(reasons)[:60]}, want 'stop' or 'length' for each of {count} answers"
        raise BadRow("bad finish reasons", reason)
    return [reason == "length" for reason in reasons]


def check_list(value: Any, column: str) -> list[Any]:
    """A list; a string is none."""
    if not isinstance(value, (list, tuple)):
        raise BadRow("not a list", f"{column}: got {type(value).__name__}, want a list")
    return list(value)


def check_rank(value: Any, number: int) -> float:
    """A finite number.

    Raises:
        BadRow: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reason = f"ranks[{number}]: got {str(value)[:40]!r}, want a number"
        raise BadRow("rank not a number", reason)
    if not abs(value) <= MAX_RANK:  # false for nan too
        raise BadRow("rank not finite", f"ranks[{number}]: got {value}, want a finite number")
    return float(value)


def parse_pair(columns: Columns) -> tuple[Talk, tuple[str, ...], tuple[float, ...]]:
    """A pair is K = 2 with ranks (0, 1).

    Raises:
        BadRow: an answer that is none; equal ones; whole talks that do not share the prompt beside them.
    """
    chosen, rejected = columns["chosen"], columns["rejected"]
    check_not_for_template(columns)
    if is_cut(columns):
        talk, answers = split_pair(chosen, rejected)
        if not has_no_prompt(columns):
            check_shared(columns, talk.messages or ())
    else:
        talk, answers = check_prompt(columns, "prompt"), (chosen, rejected)
    texts = tuple(
        check_answer(answer, column)
        for answer, column in zip(answers, ("chosen", "rejected"), strict=True)
    )
    if texts[0] == texts[1]:
        raise BadRow("equal answers", "chosen and rejected are equal, of which none is better")
    return talk, texts, (0.0, 1.0)


def is_whole_talk(value: Any) -> bool:
    """Whether it is a list of messages that begins with a prompt's, as those of HuggingFaceH4's pairs do."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, Mapping) and first.get("role") in ("system", "user")


def is_cut(columns: Columns) -> bool:
    """Whether a pair's answers are the ends of two talks, for lack of a prompt or beside it."""
    return has_no_prompt(columns) or all(is_whole_talk(columns.get(name)) for name in ("chosen", "rejected"))


def check_shared(columns: Columns, shared: Sequence[Message]) -> None:
    """Raises:
    BadRow: the row's own prompt is not in the turns that both talks share.
    """
    column = require_column(columns, "prompt", "context", "messages")
    given = columns[column]
    if column == "messages":  # H4's have the chosen talk there
        is_there = common_length(check_messages(given, column), shared) == len(shared)
    elif isinstance(given, str):
        is_there = any(message["content"].strip() == given.strip() for message in shared)
    else:
        talk = check_messages(given, column)
        is_there = common_length(talk, shared) == len(talk)
    if not is_there:
        reason = f"{column}: is not among the {len(shared)} turns that chosen and rejected begin with"
        raise BadRow("no common prompt", f"{reason}; want whole talks after that prompt, or answers alone")


def has_no_prompt(columns: Columns) -> bool:
    """Whether the prompt is only to be found in the answers."""
    return all(columns.get(name) is None for name in ("prompt", "messages", "context"))


def split_pair(chosen: Any, rejected: Any) -> tuple[Talk, tuple[Any, Any]]:
    """The prompt that two full talks share, and what each goes on with.

    Message lists share whole turns. Texts share whole turns too if they are transcripts, that is if
    ``Assistant:`` opens a turn in their common beginning: they are cut after the last one (the form
    of hh-rlhf; with a chat template its turns become messages). Other texts are cut at the last
    white space of the common beginning, which goes to the answers; never inside a word.

    Raises:
        BadRow: nothing is shared, or nothing differs.
    """
    if isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple)):
        first, second = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
        shared = common_length(first, second)
        if shared == 0:
            raise BadRow("no common prompt", "chosen and rejected share no first message")
        if first == second:
            raise BadRow("no common prompt", "chosen and rejected are equal")
        if first[shared - 1]["role"] == "assistant":
            reason = (
                "chosen and rejected part after an assistant's turn; want two answers to a prompt"
            )
            raise BadRow("no common prompt", reason)
        return Talk(None, first[:shared]), (list(first[shared:]), list(second[shared:]))
    first_text, second_text = check_text(chosen, "chosen"), check_text(rejected, "rejected")
    common = first_text[: common_length(first_text, second_text)]
    if first_text == second_text:
        raise BadRow("no common prompt", "chosen and rejected are equal")
    turn = common.rfind(CUE)
    if turn >= 0:
        cut = turn + len(CUE)
        messages = split_transcript(common[:cut])
    else:
        cut, messages = last_boundary(common, first_text, second_text), None
    if not common[:cut].strip():
        raise BadRow("no common prompt", "chosen and rejected share no first word")
    answers = (first_text[cut:], second_text[cut:])
    if messages is not None:
        return Talk(common[:cut], messages), answers
    return Talk(common[:cut]), answers


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many first items are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def last_boundary(common: str, *texts: str) -> int:
    """Where the last whole shared word ends that leaves something of every text."""
    follows = [text[len(common) : len(common) + 1] for text in texts]
    if common and not common[-1].isspace() and all(c.isspace() for c in follows):
        return len(common)
    spaces = [match.start() for match in re.finditer(r"\s+", common)]
    return spaces[-1] if spaces else 0
