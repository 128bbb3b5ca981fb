"""From text and talks to token ids, through the tokenizer's chat template where it has one.

Text of the data stays text: a special token spelled out in it ("<|im_end|>") is encoded as plain
characters and cannot end a turn or open another one, unless ``parse_special_tokens`` asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from engine.data.rows import BadRow, Columns, check_text, require_column
from engine.errors import DataError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"user": "Human: ", "assistant": "Assistant: ", "tool": "Tool: ", "system": ""}
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
CUE = "\n\nAssistant:"
# Keys of a message that say something beside its content. Others are records about it (names, dates, languages),
# of which data sets of real talks have a dozen.
SAYS_MORE = frozenset(
    {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thoughts", "refusal"}
    | {"image", "images", "audio", "audios", "video", "videos", "documents", "citations"}
)
REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing: transformers hands each on as the others
CALLS = ("tool_calls", "function_call")  # of a turn that may do without content
# Columns that other trainers hand to the chat template, and what to do with them here.
FOR_TEMPLATE = {
    "tools": "write the definitions into the system message",
    "functions": "write the definitions into the system message",
    "chat_template_kwargs": "save a tokenizer whose chat template has these values",
}

# What a template's clock shows, so that a prompt is the same every day: the date Llama's own templates fall back to.
DATE = {
    "%a": "Fri", "%A": "Friday", "%b": "Jul", "%B": "July", "%d": "26", "%-d": "26", "%e": "26", "%F": "2024-07-26",
    "%H": "00", "%I": "12", "%j": "208", "%m": "07", "%-m": "7", "%M": "00", "%p": "AM", "%S": "00", "%T": "00:00:00",
    "%y": "24", "%Y": "2024",
}  # fmt: skip
CLOCK = (
    "{%- macro strftime_now(format) %}{% set said = format"
    + "".join(f" | replace({key!r}, {value!r})" for key, value in DATE.items())
    + " %}{% if '%' in said %}"
    + "{{ raise_exception('it asks for the time as ' + format + '; write a date into it') }}"
    + "{% endif %}{{ said }}{% endmacro +%}"  # +: a line that ends here stays
)


@dataclass(frozen=True)
class Talk:
    """A prompt: its text, its messages, or both (``text`` is then the talk as a transcript)."""

    text: str | None
    messages: tuple[Message, ...] | None = None

    @property
    def plain(self) -> str:
        """The prompt as text."""
        return self.text if self.text is not None else transcript(self.messages or ())

    @property
    def is_transcript(self) -> bool:
        """Whether ``plain`` is made of several turns; an answer then follows ``Assistant:``."""
        return self.text is None and len(self.messages or ()) > 1


class TextEncoder:
    """A tokenizer with the three things data needs: prompts, answers, documents.

    With a chat template a prompt is the rendered talk with its generation prompt; without one it is
    the raw text, after the beginning-of-sequence token if the tokenizer puts one, or a talk's
    transcript with ``Assistant:`` at its end. An answer is its own tokens and the end-of-sequence
    token (the one that ends a turn in chat models); it is encoded apart from the prompt, as the
    tokens of a sampled answer are. A template that asks for the date gets the 26th of July 2024,
    whatever the day.

    Raises:
        DataError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, parse_special_tokens: bool = False) -> None:
        if tokenizer.eos_token_id is None:
            reason = "has no end-of-sequence token, so no answer could end; set eos_token"
            raise DataError("tokenizer", reason)
        self.tokenizer = tokenizer
        self.parse_special_tokens = parse_special_tokens
        self.eos: int = tokenizer.eos_token_id
        self.has_template = bool(tokenizer.chat_template)
        template = tokenizer.get_chat_template() if self.has_template else ""
        self.template = CLOCK + template if "strftime_now" in template else template
        special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.control_ids = frozenset(special)
        names = sorted((t.content for t in special.values()), key=lambda s: (-len(s), s))
        self.control = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        # Pairs made from one ranking repeat their prompt and answers, often long ones.
        self._ids = lru_cache(maxsize=1024)(self._encode)
        self.lead = self._lead()

    def _lead(self) -> tuple[int, ...]:
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return tuple(full[: starts[0]]) if starts else ()

    def plain(self, text: str) -> list[int]:
        """Ids of a piece of text, without anything added."""
        split = not self.parse_special_tokens and bool(self.control.search(text))
        return list(self._ids(text, split))

    def _encode(self, text: str, split_special_tokens: bool = False) -> tuple[int, ...]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            verbose=False,
        )
        return tuple(encoded["input_ids"])

    def document(self, text: str) -> list[int]:
        """Ids of a text that starts a sequence."""
        return [*self.lead, *self.plain(text)]

    def answer(self, text: str, talk: Talk | None = None) -> list[int]:
        """Ids of an answer (to ``talk``) and the end-of-sequence token.

        After a transcript's ``Assistant:`` an answer begins with white space, as it does in one.
        """
        if talk is not None and talk.is_transcript and not self.has_template and not text[:1].isspace():
            text = " " + text
        return [*self.plain(text), self.eos]

    def prompt(self, talk: Talk) -> list[int]:
        """Ids of a prompt, ready for an answer to follow.

        Raises:
            BadRow: the chat template refuses the talk, or has no place for a key of its messages.
        """
        if talk.messages and (self.has_template or talk.text is None):
            check_shown(talk.messages, self.template, "messages")
        if not self.has_template:
            return self.document(talk.plain + CUE if talk.is_transcript else talk.plain)
        return self.chat(talk.messages or ({"role": "user", "content": talk.plain},))

    def chat(self, messages: Sequence[Message], generation_prompt: bool = True) -> list[int]:
        """Ids of a talk through the chat template."""
        text = self._render(messages, generation_prompt)
        ids = list(self._ids(text))
        if self.parse_special_tokens:
            return ids
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)
        literals: list[str] = []
        masked = [replace_text(m, lambda s: self._mask(s, mark, literals)) for m in messages]
        if not literals:
            return ids
        return self._chat_with_literals(
            text, self._render(masked, generation_prompt), mark, literals
        )

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self.template,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:  # templates meet values of any type
            reason = f"the tokenizer's chat template refuses the talk: {error}"
            raise BadRow("chat template", reason) from error

    def _mask(self, text: str, mark: str, literals: list[str]) -> str:
        def replace(match: re.Match[str]) -> str:
            literals.append(match.group())
            return f"{mark}{len(literals) - 1}{mark}"

        return self.control.sub(replace, text)

    def _chat_with_literals(
        self, text: str, masked: str, mark: str, literals: Sequence[str]
    ) -> list[int]:
        """Ids of ``text`` in which the marked spans of ``masked`` are plain characters.

        The template's own control tokens are those that stand in ``masked`` too.
        """
        spans: list[tuple[int, int]] = []
        built, at = "", 0
        for match in re.finditer(f"{mark}([0-9]+){mark}", masked):
            built += masked[at : match.start()]
            literal = literals[int(match.group(1))]
            spans.append((len(built), len(built) + len(literal)))
            built, at = built + literal, match.end()
        if built + masked[at:] != text:
            reason = "the chat template treats a special token in the text as its own mark-up"
            raise BadRow("special token in text", reason)
        if not self.tokenizer.is_fast:
            reason = (
                "special tokens in text need a fast tokenizer (tokenizer.json) to be told apart"
            )
            raise BadRow("special token in text", reason)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = []
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            literal_token = token in self.control_ids and any(
                a < end and start < b for a, b in spans
            )
            ids.extend(self.plain(text[start:end]) if literal_token else [token])
        if self._controls(ids) != self._controls(self._encode(masked)):
            reason = "a special token in the text cannot be told from the chat template's own"
            raise BadRow("special token in text", reason)
        return ids

    def _controls(self, ids: Sequence[int]) -> list[int]:
        unknown = self.tokenizer.unk_token_id  # stands for any unknown character: no control token
        return [i for i in ids if i in self.control_ids and i != unknown]


def replace_text(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with every string in it changed, but for the roles of messages."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else replace_text(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_text(item, change) for item in value]
    return value


def transcript(messages: Sequence[Message]) -> str:
    """Messages as text, for a model without a chat template.

    One message is its content; more are ``Human: ...``, a blank line, ``Assistant: ...``, and so
    on, ending with the last turn.
    """
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(SPEAKERS[m["role"]] + m["content"] for m in messages)


def split_transcript(text: str) -> tuple[Message, ...] | None:
    """The messages of a ``Human:`` / ``Assistant:`` transcript that ends with ``Assistant:``.

    ``None`` if the text is not one.
    """
    pieces = TURN.split(text)
    if len(pieces) < 5 or pieces[0].strip() or pieces[-2] != "Assistant" or pieces[-1].strip():
        return None
    turns = zip(pieces[1:-2:2], pieces[2:-2:2], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[who], "content": words.strip()} for who, words in turns)


def check_messages(value: Any, column: str) -> tuple[Message, ...]:
    """A list of role/content messages; keys without a value are left away.

    A turn that calls tools may have no content, which is then empty.

    Raises:
        BadRow: not a list of messages, an unknown role, content that is not a string.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow("bad messages", f"{column}: got {str(value)[:60]!r}, want a list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            shown = f"{column}[{number}]: got {str(message)[:60]!r}"
            wanted = f"want {{'role': one of {', '.join(ROLES)}, 'content': text}}"
            raise BadRow("bad messages", f"{shown}, {wanted}")
        said = {key: item for key, item in message.items() if item is not None}
        if any(said.get(key) for key in CALLS):
            said.setdefault("content", "")
        check_text(said.get("content"), f"{column}[{number}].content")
        messages.append(said)
    return tuple(messages)


def check_shown(messages: Sequence[Message], template: str, column: str) -> None:
    """A message says nothing under another key that the template (none: "") has no place for.

    Raises:
        BadRow: the first key that would be lost.
    """
    for number, message in enumerate(messages):
        for key, value in message.items():
            names = REASONING if key in REASONING else (key,)
            if value and key in SAYS_MORE and not any(reads(template, name) for name in names):
                reason = f"{column}[{number}]: {key!r} would be lost; write it into the content as the model is to"
                raise BadRow("more than content", f"{reason} see it, or leave it out")


@lru_cache(maxsize=256)
def reads(template: str, key: str) -> bool:
    """Whether a template names a key of messages: ``message.key``, ``message['key']``, ``'key' in message``."""
    return re.search(rf"""[.'"]{re.escape(key)}\b""", template) is not None


def check_not_for_template(columns: Columns) -> None:
    """Raises:
    BadRow: a column that is meant for the chat template, which is given messages alone.
    """
    for name, advice in FOR_TEMPLATE.items():
        value = columns.get(name)
        if value and value not in ("[]", "{}", "null"):  # some data sets have these as JSON
            reason = f"{name}: got {str(value)[:60]!r}, which the prompt would not have; {advice}"
            raise BadRow(name, f"{reason}, or take the column out of the rows that need none")


def check_prompt(columns: Columns, *names: str) -> Talk:
    """The prompt of a row: ``messages`` if it has them, else the first of ``names``.

    A row with both has the same talk twice: the template sees the messages, a model without a
    template the text. Messages that go on to the answer, as in UltraFeedback's rows, end before it.

    Raises:
        BadRow: no prompt, an empty one, one that ends with the assistant's turn, or tools beside it.
    """
    check_not_for_template(columns)
    column = require_column(columns, *names, "messages")
    value = columns[column]
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    if isinstance(value, str):
        text = check_text(value, column)
        if columns.get("messages") is not None:
            messages = check_messages(columns["messages"], "messages")
            if messages[-1]["role"] == "assistant" and len(messages) > 1:
                messages = messages[:-1]
    else:
        messages = check_messages(value, column) if column == "messages" else as_talk(value, column)
    if messages is not None and messages[-1]["role"] == "assistant":
        reason = f"{column}: the talk ends with the assistant; want one that an answer can follow"
        raise BadRow("bad messages", reason)
    if (text is not None and not text) or (messages and not messages[-1]["content"]):
        raise BadRow("empty prompt", f"{column}: the prompt is empty")
    return Talk(text, messages)


def as_talk(value: Any, column: str) -> tuple[Message, ...]:
    """A prompt column that is no string: a list of messages.

    Raises:
        BadRow: it is neither.
    """
    if not isinstance(value, (list, tuple)):
        check_text(value, column)
    return check_messages(value, column)


def check_answer(value: Any, column: str) -> str:
    """An answer: a string, or a list of one assistant message.

    Raises:
        BadRow: another type, more than one message, one that says more than its content, or nothing but white space.
    """
    if isinstance(value, (list, tuple)):
        messages = check_messages(value, column)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = [message["role"] for message in messages]
            raise BadRow("bad messages", f"{column}: got turns {roles}, want one assistant message")
        check_shown(messages, "", column)
        value = messages[0]["content"]
    text = check_text(value, column)
    if not text.strip():
        raise BadRow("empty answer", f"{column}: the answer is empty")
    return text
