"""Prefill, decode and the loop around them: prompts in, sampled sequences out, on one set of
weights.

Letters: N packed prompt tokens, R rows of a decode step (one a running sequence), H hidden.

``prefill`` runs whole prompts as one packed ragged batch and keeps their keys and values;
``decode`` runs one token of each running sequence. Both are
``engine.model.transformer.hidden_states`` and differ in where attention finds its keys. A token's
log-prob is a function of its own prefix and the weights alone, and its random number of (seed,
episode, position) alone: the batch, the slot and the order of prompts change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engine.data.pack import last_rows, pack_sequences
from engine.errors import ConfigError
from engine.generate.cache import PAGE, PageCache, page_bytes, prompt_slots
from engine.generate.sampling import Sampling, draw, filtered_law
from engine.generate.scheduler import Admission, Limits, Request, Scheduler, Start
from engine.kernels.attention import attention
from engine.kernels.attention_decode import attention_decode
from engine.kernels.linear_sample import linear_sample
from engine.model.transformer import Model, hidden_states, logits
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


@dataclass(frozen=True)
class Rows:
    """One decode step's input: the last token of each running sequence, and where its keys are."""

    tokens: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64
    page_table: Tensor  # (R, pages) int32; entries behind a sequence's length are never read
    lengths: Tensor  # (R,) int32, positions + 1


@dataclass(frozen=True)
class Drawn:
    """One token a row, with its log-prob and the entropy of the law it was drawn from."""

    tokens: Tensor  # (R,) int64
    logprobs: Tensor  # (R,) float32
    entropies: Tensor  # (R,) float32


@dataclass
class _Sequence:
    """A running sequence: what the scheduler said, and what has been drawn so far."""

    start: Start
    prompt_length: int
    episode_id: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


def prefill(
    model: Model, cache: PageCache, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]
) -> Tensor:  # (P, H)
    """Run P prompts as one packed batch and write their keys and values into their ``pages``.

    Returns the hidden row of each prompt's last token, the only one that the head has to see.
    """
    batch = pack_sequences(prompts)
    slots = torch.cat([prompt_slots(p, len(t)) for p, t in zip(pages, prompts, strict=True)])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, slots, k, v)
        return attention(q, k, v, batch.cu_seqlens)

    hidden = hidden_states(model, batch.tokens, batch.positions, attend)
    return hidden[last_rows(batch)]


def decode(model: Model, cache: PageCache, rows: Rows) -> Tensor:  # (R, H)
    """Run one token of each sequence, its key and value written into its page. Returns its hidden
    row.
    """
    page = rows.page_table.gather(1, (rows.positions // PAGE)[:, None]).squeeze(1)
    slots = page.long() * PAGE + rows.positions % PAGE

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, slots, k, v)
        pages = cache.keys[layer], cache.values[layer]
        return attention_decode(q, *pages, rows.page_table, rows.lengths)

    return hidden_states(model, rows.tokens, rows.positions, attend)


def next_tokens(model: Model, hidden: Tensor, uniform: Tensor, settings: Sampling) -> Drawn:
    """Draw a token for each hidden row (R, H) by its uniform (R,), from the law of ``settings``."""
    if settings.filters:
        return Drawn(*draw(filtered_law(logits(model, hidden), settings), uniform))
    return Drawn(*linear_sample(hidden, model.head, uniform, settings.temperature))


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
        page_bytes(layers, kv_heads, head_dim, model.act_dtype),
        PAGE,
    )
    cache = PageCache(layers, scheduler.num_pages, kv_heads, head_dim, model.act_dtype)
    run = _Run(model, cache, scheduler, settings, eos_ids, seed)
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
        model: Model,
        cache: PageCache,
        scheduler: Scheduler,
        settings: Sampling,
        eos_ids: frozenset[int],
        seed: int,
    ) -> None:
        self._model, self._cache, self._scheduler = model, cache, scheduler
        self._settings, self._eos_ids, self._seed = settings, eos_ids, seed
        self._running: list[_Sequence] = []
        self._table = torch.empty(0, 0, dtype=torch.int32)  # (R, pages) of the running ones
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
            rows = prefill(self._model, self._cache, [prompts[i] for i in requests], pages)
            self._prompt_rows.update(zip(requests, rows, strict=True))
        if not admission.starts:
            return
        self._cache.copy([start.copy for start in admission.starts if start.copy is not None])
        started = [
            _Sequence(
                start, len(prompts[start.request]), episodes[start.request * n + start.sample]
            )
            for start in admission.starts
        ]
        hidden = torch.stack([self._prompt_rows[start.request] for start in admission.starts])
        for start in admission.starts:
            if start.sample == n - 1:
                del self._prompt_rows[start.request]
        self._append(started, hidden)
        self._running += started
        self._drop_ended()

    def step(self) -> None:
        """One decode step of all running sequences."""
        if not self._running:
            return
        positions = torch.tensor([s.prompt_length + len(s.tokens) - 1 for s in self._running])
        tokens = torch.tensor([s.tokens[-1] for s in self._running])
        rows = Rows(tokens, positions, self._table, (positions + 1).int())
        self._append(self._running, decode(self._model, self._cache, rows))
        self._drop_ended()

    def _append(self, sequences: list[_Sequence], hidden: Tensor) -> None:
        """Draw the next token of each sequence from its hidden row."""
        episodes = [s.episode_id for s in sequences]
        uniform = streams.uniform(
            self._seed, "sample", episodes, [len(s.tokens) for s in sequences]
        )
        drawn = next_tokens(self._model, hidden, torch.from_numpy(uniform), self._settings)
        values = drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.entropies.tolist()
        for sequence, token, logprob, entropy in zip(sequences, *values, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.entropies.append(entropy)

    def _drop_ended(self) -> None:
        """Ended sequences leave the batch and give their pages back; the page table follows."""
        running = []
        for sequence in self._running:
            full = len(sequence.tokens) == self._settings.max_new_tokens
            if full or sequence.tokens[-1] in self._eos_ids:
                self._scheduler.finish(sequence.start)
                self.ended.append(sequence)
            else:
                running.append(sequence)
        if not len(running) == len(self._running) == len(self._table):  # some ended or started
            width = max((len(s.start.pages) for s in running), default=0)
            table = [[*s.start.pages, *[0] * (width - len(s.start.pages))] for s in running]
            self._table = torch.tensor(table, dtype=torch.int32)
        self._running = running


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
