"""The loop around prefill and decode: prompts in, sampled sequences out, on one set of weights.

Letters: R rows of a decode step (one a running sequence), H hidden.

Prefill runs whole prompts as one packed ragged batch and keeps their keys and values; decode runs
one token of each running sequence (steps.py). A token's
log-prob is a function of its own prefix and the weights alone, and its random number of (seed,
episode, position) alone: the batch, the slot and the order of prompts change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError
from engine.generate.cache import page_bytes
from engine.generate.sampling import Sampling
from engine.generate.scheduler import Admission, Limits, Request, Scheduler, Start
from engine.generate.steps import Drawn, Rows, Steps, steps_for
from engine.kernels.attention_decode import PAGE
from engine.model.transformer import Model
from engine.run import streams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generated:
    """One sampled sequence. Position t of ``logprobs`` and ``entropies`` belongs to ``tokens[t]``.

    ``tokens`` ends with the stop token if ``finish_reason`` is "stop". ``logprobs`` are of the law
    that was sampled (temperature and filters applied); ``weights_version`` is the version of the
    weights that it was sampled from.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: Tensor  # (T,) float32
    entropies: Tensor  # (T,) float32, of the law that each token was drawn from
    finish_reason: FinishReason
    episode_id: int
    weights_version: int


@dataclass
class _Sequence:
    """A running sequence: what the scheduler said, and what has been drawn so far."""

    start: Start
    prompt_length: int
    episode_id: int
    uniform: NDArray[np.float64]  # (max_new_tokens,): what each of its tokens is drawn by
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    eos_ids: frozenset[int],
    n: int = 1,
    seed: int = 0,
    episode_ids: Sequence[int] | None = None,
    limits: Limits | None = None,
) -> list[Generated]:
    """Sample ``n`` sequences for each prompt; result i * n + k is sample k of prompt i.

    Args:
        model: the network and its weights.
        prompts: token ids, at least one a prompt.
        settings: the law and the most new tokens.
        eos_ids: a sequence ends with the first of these that it draws (the token is kept).
        n: samples a prompt; they share its prefill.
        seed: the key of the random numbers.
        episode_ids: their addresses, one a result; ``None`` means 0, 1, 2, ... The same id, seed
            and prompt give the same tokens in any batch.
        limits: sequences at once and memory; they change the speed, never a token.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a sequence longer than the
            model's context or larger than the cache, or a wrong number of ids; all before anything
            runs.
    """
    limits = Limits() if limits is None else limits
    episodes = _checked_episodes(len(prompts) * n, n, episode_ids)
    _check_prompts(model, prompts, settings.max_new_tokens)
    shape = model.architecture
    layers, kv_heads, head_dim = shape.num_layers, shape.num_kv_heads, shape.head_dim
    scheduler = Scheduler(
        [Request(len(prompt), n) for prompt in prompts],
        settings.max_new_tokens,
        limits,
        page_bytes(layers, kv_heads, head_dim, model.kv_dtype),
        PAGE,
    )
    longest = max((len(prompt) for prompt in prompts), default=0) + settings.max_new_tokens
    steps = steps_for(model, scheduler.num_pages, settings, longest)
    run = _Run(steps, scheduler, settings, eos_ids, seed)
    while not scheduler.done:
        run.start(scheduler.admit(), prompts, episodes, n)
        run.step()
    return [
        Generated(
            prompt_tokens=tuple(prompts[sequence.start.request]),
            tokens=tuple(sequence.tokens),
            logprobs=torch.tensor(sequence.logprobs, dtype=torch.float32),
            entropies=torch.tensor(sequence.entropies, dtype=torch.float32),
            finish_reason="stop" if sequence.tokens[-1] in eos_ids else "length",
            episode_id=sequence.episode_id,
            weights_version=model.version,
        )
        for sequence in sorted(run.ended, key=lambda s: (s.start.request, s.start.sample))
    ]


class _Run:
    """The state of one ``generate``: running sequences, ended ones, prompts whose samples still
    wait.
    """

    def __init__(
        self,
        steps: Steps,
        scheduler: Scheduler,
        settings: Sampling,
        eos_ids: frozenset[int],
        seed: int,
    ) -> None:
        self._steps, self._scheduler = steps, scheduler
        self._settings, self._eos_ids, self._seed = settings, eos_ids, seed
        self._running: list[_Sequence] = []
        self._rows: Rows | None = None  # of the running ones, while they stay the same
        self._prompt_rows: dict[int, Tensor] = {}  # request -> (H,), until its last sample starts
        self.ended: list[_Sequence] = []

    def start(
        self,
        admission: Admission,
        prompts: Sequence[Sequence[int]],
        episodes: Sequence[int],
        n: int,
    ) -> None:
        """Run the admitted prefills, copy pages, draw the first token of each start."""
        if admission.prefills:
            requests = [prefill.request for prefill in admission.prefills]
            pages = [prefill.pages for prefill in admission.prefills]
            rows = self._steps.prefill([prompts[i] for i in requests], pages)
            self._prompt_rows.update(zip(requests, rows, strict=True))
        if not admission.starts:
            return
        self._steps.cache.copy([start.copy for start in admission.starts if start.copy is not None])
        ids = [episodes[start.request * n + start.sample] for start in admission.starts]
        positions = np.arange(self._settings.max_new_tokens)
        draws = streams.uniform(self._seed, "sample", [[i] for i in ids], positions)
        started = [
            _Sequence(start, len(prompts[start.request]), episode, row)
            for start, episode, row in zip(admission.starts, ids, draws, strict=True)
        ]
        hidden = torch.stack([self._prompt_rows[start.request] for start in admission.starts])
        for start in admission.starts:
            if start.sample == n - 1:
                del self._prompt_rows[start.request]
        self._append(started, self._steps.draw(hidden, self._uniform(started)))
        self._running += started
        self._rows = None
        self._drop_ended()

    def step(self) -> None:
        """One decode step of all running sequences."""
        if not self._running:
            return
        rows = self._rows_of_running() if self._rows is None else self._rows
        drawn = self._steps.decode(rows, self._uniform(self._running))
        self._append(self._running, drawn)
        self._rows = Rows(drawn.tokens, rows.positions + 1, rows.page_table)
        self._drop_ended()

    def _rows_of_running(self) -> Rows:
        """From Python's lists; as long as nobody starts or ends, a step's rows follow from the step before."""
        running = self._running
        width = max(len(s.start.pages) for s in running)
        table = [[*s.start.pages, *[0] * (width - len(s.start.pages))] for s in running]
        return Rows(
            torch.tensor([s.tokens[-1] for s in running]),
            torch.tensor([s.prompt_length + len(s.tokens) - 1 for s in running]),
            torch.tensor(table, dtype=torch.int32),
        )

    def _uniform(self, sequences: list[_Sequence]) -> Tensor:  # (R,) float64
        """The random number that each sequence's next token is drawn by."""
        draws = [s.uniform[len(s.tokens)] for s in sequences]
        return torch.tensor(draws, dtype=torch.float64)

    def _append(self, sequences: list[_Sequence], drawn: Drawn) -> None:
        """Each sequence's next token."""
        values = drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.entropies.tolist()
        for sequence, token, logprob, entropy in zip(sequences, *values, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.entropies.append(entropy)

    def _drop_ended(self) -> None:
        """Ended sequences leave the batch and give their pages back."""
        running = []
        for sequence in self._running:
            full = len(sequence.tokens) == self._settings.max_new_tokens
            if full or sequence.tokens[-1] in self._eos_ids:
                self._scheduler.finish(sequence.start)
                self.ended.append(sequence)
            else:
                running.append(sequence)
        if len(running) < len(self._running):
            self._running, self._rows = running, None


def _checked_episodes(count: int, n: int, episode_ids: Sequence[int] | None) -> Sequence[int]:
    if n < 1:
        raise ConfigError(f"n: got {n}; give at least 1 sample a prompt")
    if episode_ids is None:
        return range(count)
    if len(episode_ids) != count:
        raise ConfigError(f"episode_ids: got {len(episode_ids)}; give one a sample, {count} here")
    return [int(episode) for episode in episode_ids]


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    context, vocab_size = model.architecture.max_positions, model.architecture.vocab_size
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(
                f"prompt {index} has no tokens, so nothing predicts its first new one; give at "
                "least one token (the beginning-of-sequence token, say)"
            )
        if len(prompt) + max_new_tokens > context:
            raise ConfigError(
                f"prompt {index}: {len(prompt)} tokens and max_new_tokens={max_new_tokens} make "
                f"{len(prompt) + max_new_tokens}, the model's context is {context}; shorten one"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"prompt {index}: token ids {min(prompt)}..{max(prompt)}, the model has "
                f"0..{vocab_size - 1}; was it made by another model's tokenizer?"
            )
