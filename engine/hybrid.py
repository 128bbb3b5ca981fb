"""HybridEngine: one set of weights that generates, scores and trains.

    model = HybridEngine.from_pretrained("folder", dtype="bfloat16")
    out = model.generate(["Write a haiku."], max_new_tokens=64, n=4, seed=0)
    out[0].tokens, out[0].logprobs, out[0].text, out[0].finish_reason
    model.logprobs([[1, 2, 3]])  # [tensor of log p(2 | 1), log p(3 | 1, 2)]

There is no second copy of the weights: what an optimizer steps is what the next ``generate``
samples from, once ``refresh`` has remade the compute copy from the masters.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.data.chat import TextEncoder, check_prompt
from engine.data.pack import cut_by_tokens, pack_sequences, predictions
from engine.data.rows import BadRow
from engine.data.tokenizer import load_tokenizer
from engine.errors import ConfigError
from engine.generate.generator import Generated, generate
from engine.generate.sampling import Sampling
from engine.generate.scheduler import Limits
from engine.model import transformer
from engine.model.transformer import Model
from engine.model.weights import load_policy, save_policy
from engine.run.device import to_host
from engine.run.distributed import ALONE, Ranks

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]  # text, a chat, or token ids


@dataclass(frozen=True)
class Completion(Generated):
    """A sampled sequence with its text (special tokens left out)."""

    text: str


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def token_ids(given: object, wanted: str = "a flat list of token ids", key: str = "") -> list[int]:
    """Whole numbers, of Python, numpy or torch, as a list of int.

    Raises:
        ConfigError: something else than `wanted`; the message begins with `key`.
    """
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    items = list(cast(Sequence[object], values)) if is_list(values) else None
    try:
        if items is None or any(isinstance(item, bool) for item in items):
            raise TypeError
        return [operator.index(item) for item in items]  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{key}got {repr(given)[:60]}, want {wanted}") from None


def stop_ids(given: object, vocab_size: int) -> frozenset[int]:
    """Tokens of the vocabulary, from a list, set or tensor of their ids.

    Raises:
        ConfigError: something else.
    """
    key = "stop_token_ids: "
    wanted = f"a flat list of token ids of the vocabulary, 0 to {vocab_size - 1}; give [id] for one"
    ids = token_ids(list(given) if isinstance(given, Set) else given, wanted, key)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"{key}got {token}, want {wanted}")
    return frozenset(ids)


def check_prompts(prompts: object) -> None:
    """Raises ConfigError for what is not a list of prompts, one string above all: its letters would be prompts."""
    if not is_list(prompts) and not isinstance(prompts, Tensor | np.ndarray):
        got = "one string" if isinstance(prompts, str) else type(prompts).__name__
        raise ConfigError(f"prompts: got {got}; give a list of prompts, [prompt] for one")


class HybridEngine:
    """A policy with its tokenizer: ``generate`` and ``logprobs`` here, gradients through ``model``.

    ``score_tokens``: the most tokens in one forward of ``logprobs``; like ``limits`` it bounds
    memory and changes no result.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        limits: Limits | None = None,
        score_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limits = Limits() if limits is None else limits
        self.score_tokens = score_tokens

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: str = "auto",
        trainable: bool = False,
        limits: Limits | None = None,
        device: str = "auto",
        ranks: Ranks = ALONE,
    ) -> HybridEngine:
        """Load a Hugging Face folder or hub id (safetensors, never remote code).

        Args:
            folder: with the model and its tokenizer.
            dtype: of the compute copy: "auto", "bfloat16" or "float32".
            trainable: keep float32 masters beside it.
            limits: sequences decoded together and memory for keys and values (None: the defaults).
            device: "cpu", "cuda", or "auto": the GPU where there is one.
            ranks: the processes that train it together.

        Raises:
            ModelError: no such folder, or not a model (with a tokenizer) that this engine runs.
            ConfigError: a device that is not there.
        """
        with ThreadPoolExecutor(1) as beside:  # Python imports for a second while C++ packs weights
            tokenizer = beside.submit(load_tokenizer, folder)
            model = load_policy(folder, dtype=dtype, trainable=trainable, device=device, ranks=ranks)
            return cls(model, tokenizer.result(), limits)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: the tokenizer's and the model's generation config's."""
        own = self.tokenizer.eos_token_id
        return self.model.eos_token_ids | ({own} if own is not None else set())

    @property
    def version(self) -> int:
        """The version of the weights: ``refresh`` moves it on by one."""
        return self.model.version

    def refresh(self) -> None:
        """Remake the compute copy from the masters; call it after each optimizer step."""
        self.model.refresh()

    def whole(self) -> HybridEngine:
        """This engine, or where its weights are sharded over processes a frozen one with all of them, which the
        processes make together: what generates, scores and is saved."""
        model = transformer.whole(self.model)
        return self if model is self.model else HybridEngine(model, self.tokenizer, self.limits, self.score_tokens)

    def with_limits(self, limits: Limits) -> HybridEngine:
        """The same model and tokenizer under other limits."""
        other = copy.copy(self)
        other.limits = limits
        return other

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain Hugging Face folder with the tokenizer."""
        save_policy(self.model, folder, tokenizer=self.tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as the prompts of a data set are encoded; ids stay as they are.

        Text and messages go through the chat template where the tokenizer has one (text as a
        user's message); without one, text is taken as it is. Special tokens spelled out in them
        are plain text.

        Raises:
            ConfigError: none of these, an empty text, or a talk that the template refuses.
        """
        if not isinstance(prompt, str) and not (is_list(prompt) and prompt and isinstance(prompt[0], Mapping)):
            kinds = "text, a list of messages, or a flat list of token ids"
            return token_ids(prompt, f"for a prompt {kinds} (and of prompts a list, [prompt] for one)")
        try:
            talk = check_prompt({"prompt": prompt}, "prompt")
            return TextEncoder(self.tokenizer).prompt(talk)
        except BadRow as error:
            raise ConfigError(f"prompts: {error}") from error

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        n: int = 1,
        seed: int = 0,
        episode_ids: Sequence[int] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        stop_token_ids: Sequence[int] | Set[int] = (),
    ) -> list[Completion]:
        """Sample ``n`` completions a prompt; result i * n + k is sample k of prompt i.

        A sequence ends with the model's end-of-sequence token, one of ``stop_token_ids``, or after
        ``max_new_tokens`` (``finish_reason`` "length"). ``episode_ids``, one a result (default 0,
        1, 2, ...), are the addresses of the random numbers: the same id, seed and prompt give the
        same tokens in any batch. ``top_k``, ``top_p`` and ``greedy`` filter the law, and the
        log-probs are then those of the filtered law.

        Raises:
            ConfigError: an empty prompt, or one that with its new tokens does not fit the context
                or the cache; a stop token that is no token of the vocabulary.
        """
        settings = Sampling(max_new_tokens, temperature, top_k, top_p, greedy)
        check_prompts(prompts)
        results = generate(
            self.model,
            [self.encode(prompt) for prompt in prompts],
            settings,
            self.eos_ids | stop_ids(stop_token_ids, self.model.architecture.vocab_size),
            n,
            seed,
            episode_ids,
            self.limits,
        )
        if not results:  # of which batch_decode makes a text
            return []
        texts = self.tokenizer.batch_decode([r.tokens for r in results], skip_special_tokens=True)
        return [Completion(**vars(r), text=text) for r, text in zip(results, texts, strict=True)]

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        context = self.model.architecture.max_positions
        for index, sequence in enumerate(sequences):
            if not 1 <= len(sequence) <= context:
                raise ConfigError(
                    f"sequence {index}: got {len(sequence)} tokens; give 1 to {context}, "
                    "the model's context"
                )

    @torch.no_grad()
    def logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Tensor]:  # each (n - 1,)
        """log p(token t | tokens before it) for t = 1 .. n - 1 of each sequence, float32.

            log p(x_t | x_<t) = log softmax(logits_{t-1} / temperature)[x_t]

        The forward is the training forward; for sampled tokens this is the sampler's log-prob
        again.

        Raises:
            ConfigError: a sequence without tokens, or longer than the context, or no list of token ids.
            ModelError: a token outside the vocabulary.
        """
        sequences = [token_ids(sequence) for sequence in sequences]
        self._check(sequences)
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        for chosen in cut_by_tokens([len(s) for s in sequences], self.score_tokens):
            batch = pack_sequences([sequences[i] for i in chosen])
            shift = predictions(batch)
            hidden = transformer.forward(self.model, batch, rows=shift.rows)
            values, _ = transformer.logprobs(self.model, hidden, shift.targets, temperature)
            lengths = shift.cu.long().diff().tolist()
            for i, part in zip(chosen, torch.split(to_host(values), lengths), strict=True):
                results[i] = part.clone()
        return results
