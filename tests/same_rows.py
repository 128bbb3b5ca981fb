"""Every way in which the engine computes the same rows, for tests that compare them with ==.

An episode is a prompt and the tokens that were sampled after it; its rows are those that predict these tokens.
`WAYS` are passes over episodes that are given, `CALLS` are calls of the sampler that must draw them again. None of
them knows what the others return: a test takes one as the standard and compares.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from cpu_classes import use_threads
from torch import Tensor

from engine.data.pack import Packed, Shift, cut_by_tokens, pack_groups, pack_sequences, predictions
from engine.generate.cache import PAGE, PageCache, page_bytes
from engine.generate.generator import Generated, generate
from engine.generate.sampling import Sampling
from engine.generate.scheduler import Limits
from engine.generate.steps import DefinedSteps, KernelSteps
from engine.generate.steps import Rows as StepRows
from engine.kernels.transformer_step import TransformerStep
from engine.model import transformer
from engine.model.network import step_network
from engine.model.transformer import Model
from engine.run import streams
from engine.run.optim import Optimizer

TEMPERATURE = 0.8
SEED = 3
CUT = 40  # tokens a micro-batch: several of them, and sequences larger than one
Episodes = Sequence[Generated]


@dataclass(frozen=True)
class Rows:
    """Of every answer token, episode after episode. The sampler keeps no hidden state."""

    hidden: Tensor | None  # (M, H)
    logprob: Tensor  # (M,)
    entropy: Tensor  # (M,)

    def differ(self, other: Rows) -> list[str]:
        """What is not equal to the bit."""
        return [
            name
            for name in ("hidden", "logprob", "entropy")
            if None not in (one := getattr(self, name), two := getattr(other, name))
            and not torch.equal(one, two)
        ]


def by_token(episodes: Episodes, parts: Sequence[Sequence[Tensor | None]]) -> Rows:
    """One (hidden, log-prob, entropy) for each row, in the order of the episodes."""
    hidden, logprob, entropy = zip(*parts, strict=True)
    assert len(parts) == sum(len(e.tokens) for e in episodes)
    return Rows(torch.stack(hidden), torch.stack(logprob), torch.stack(entropy))


def join(parts: Iterable[Rows]) -> Rows:
    hidden, logprob, entropy = zip(*((p.hidden, p.logprob, p.entropy) for p in parts), strict=True)
    return Rows(torch.cat(hidden), torch.cat(logprob), torch.cat(entropy))


def reordered(rows: Rows, episodes: Episodes, order: Sequence[int]) -> Rows:
    """Rows of the episodes in `order`, put back into the episodes' own order."""
    lengths = [len(episodes[i].tokens) for i in order]
    back = sorted(range(len(order)), key=lambda at: order[at])
    split = [x.split(lengths) for x in (rows.hidden, rows.logprob, rows.entropy)]
    return Rows(*(torch.cat([parts[at] for at in back]) for parts in split))


# --- passes over given tokens -----------------------------------------------------------------------


def read(model: Model, batch: Packed, shift: Shift) -> Rows:
    hidden = transformer.forward(model, batch)[shift.rows]
    logprob, entropy = transformer.logprobs(model, hidden, shift.targets, TEMPERATURE)
    return Rows(hidden.detach(), logprob.detach(), entropy.detach())


def packed(model: Model, episodes: Episodes) -> Rows:
    """All episodes in one batch, the prompt repeated in each."""
    batch = pack_sequences([e.prompt_tokens + e.tokens for e in episodes])
    return read(
        model, batch, predictions(batch, skip_first=[len(e.prompt_tokens) for e in episodes])
    )


def trained(model: Model, episodes: Episodes) -> Rows:
    """With the graph that a backward needs: training's own path through the ops."""
    assert model.trainable
    with torch.enable_grad():
        return packed(model, episodes)


def one_at_a_time(model: Model, episodes: Episodes) -> Rows:
    return join(packed(model, [episode]) for episode in episodes)


def backwards(model: Model, episodes: Episodes) -> Rows:
    order = range(len(episodes))[::-1]
    return reordered(packed(model, episodes[::-1]), episodes, order)


def in_micro_batches(model: Model, episodes: Episodes) -> Rows:
    lengths = [len(e.prompt_tokens) + len(e.tokens) for e in episodes]
    cuts = cut_by_tokens(lengths, CUT)
    assert len(cuts) > 2
    parts = [packed(model, [episodes[i] for i in cut]) for cut in cuts]
    return reordered(join(parts), episodes, [i for cut in cuts for i in cut])


def groups(episodes: Episodes) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    found = groupby(episodes, lambda episode: episode.prompt_tokens)
    return [(prompt, [e.tokens for e in members]) for prompt, members in found]


def on_shared_prompts(model: Model, episodes: Episodes, together: bool) -> Rows:
    """A prompt is one segment and its answers attend to it; all groups together, or one after the other."""
    found = groups(episodes)
    assert any(len(answers) > 1 for _, answers in found)
    parts = []
    for batch in map(pack_groups, [found] if together else [[group] for group in found]):
        answers = [s for s in range(batch.num_segments) if batch.prefix[s] != s]
        parts.append(read(model, batch, predictions(batch, answers)))
    return join(parts)


# --- passes of the sampler over cache pages ---------------------------------------------------------


def new_cache(model: Model, tables: Tensor) -> PageCache:
    a = model.architecture
    num_pages = int(tables.max()) + 1
    return PageCache(a.num_layers, num_pages, a.num_kv_heads, a.head_dim, model.kv_dtype)


def tables_of(episodes: Episodes) -> Tensor:  # (E, pages) int32
    """Pages of its own for each episode, one after the other."""
    width = max(-(-(len(e.prompt_tokens) + len(e.tokens)) // PAGE) for e in episodes)
    return torch.arange(len(episodes) * width, dtype=torch.int32).view(-1, width)


def uniform_of(episodes: Episodes, position: int) -> Tensor:  # (E,) float64
    """The random numbers that these tokens were drawn by."""
    ids = [e.episode_id for e in episodes]
    return torch.from_numpy(streams.uniform(SEED, "sample", ids, [position] * len(ids)))


def prefilled(model: Model, episodes: Episodes) -> Rows:
    """Every row is the last one of a prompt: the prompt and the tokens before."""
    longest = max(len(e.prompt_tokens) + len(e.tokens) for e in episodes)
    cuts = [(e, t) for e in episodes for t in range(len(e.tokens))]
    tables = tables_of([e for e, _ in cuts])
    steps = KernelSteps(model, new_cache(model, tables), Sampling(1, TEMPERATURE), longest)
    hidden = steps.prefill([e.prompt_tokens + e.tokens[:t] for e, t in cuts], tables.tolist())
    targets = torch.tensor([e.tokens[t] for e, t in cuts])
    return Rows(hidden, *transformer.logprobs(model, hidden, targets, TEMPERATURE))


def decoded(
    model: Model, episodes: Episodes, tables: Tensor | None = None, cache: PageCache | None = None
) -> Rows:
    """The prompts in one step, then a token of each episode a step; each step draws the next token again."""
    tables = tables_of(episodes) if tables is None else tables
    cache = new_cache(model, tables) if cache is None else cache
    longest = max(len(e.prompt_tokens) + len(e.tokens) for e in episodes)
    step, found = TransformerStep(step_network(model, longest), cache.keys, cache.values), {}
    for t in range(max(len(e.tokens) for e in episodes)):
        live = [i for i, e in enumerate(episodes) if len(e.tokens) > t]
        rows = [
            episodes[i].prompt_tokens if t == 0 else episodes[i].tokens[t - 1 : t] for i in live
        ]
        first = torch.tensor(
            [0 if t == 0 else len(episodes[i].prompt_tokens) + t - 1 for i in live]
        )
        batch = pack_sequences(rows)
        hidden, tokens, logprob, entropy = step(
            batch.tokens,
            batch.positions + first.repeat_interleave(batch.lengths),
            batch.cu_seqlens,
            tables[live],
            uniform_of([episodes[i] for i in live], t),
            TEMPERATURE,
        )
        assert tokens.tolist() == [episodes[i].tokens[t] for i in live], f"token {t}"
        found |= {
            (i, t): x for i, x in zip(live, zip(hidden, logprob, entropy, strict=True), strict=True)
        }
    return by_token(episodes, [found[key] for key in sorted(found)])


def decoded_one_at_a_time(model: Model, episodes: Episodes) -> Rows:
    return join(decoded(model, [episode]) for episode in episodes)


def decoded_on_used_pages(model: Model, episodes: Episodes) -> Rows:
    """Pages in no order, full of what others left there."""
    tables = tables_of(episodes)
    order = list(range(tables.numel()))
    random.Random(1).shuffle(order)
    tables = torch.tensor(order, dtype=torch.int32).view(tables.shape)
    cache = new_cache(model, tables)
    for pages in (*cache.keys, *cache.values):
        pages.normal_(std=10.0)
    return decoded(model, episodes, tables, cache)


class _Watched(DefinedSteps):
    """Keeps the hidden rows that it draws from."""

    hidden: Tensor

    def draw(self, hidden, uniform):
        self.hidden = hidden
        return super().draw(hidden, uniform)


def decoded_layer_by_layer(model: Model, episodes: Episodes) -> Rows:
    """Without the fused step: the network's definition over pages, a kernel an op."""
    tables, found = tables_of(episodes), {}
    steps = _Watched(model, new_cache(model, tables), Sampling(1, TEMPERATURE))
    first = steps.prefill([e.prompt_tokens for e in episodes], tables.tolist())
    for t in range(max(len(e.tokens) for e in episodes)):
        live = [i for i, e in enumerate(episodes) if len(e.tokens) > t]
        uniform = uniform_of([episodes[i] for i in live], t)
        if t == 0:
            drawn = steps.draw(first, uniform)
        else:
            last = torch.tensor([episodes[i].tokens[t - 1] for i in live])
            positions = torch.tensor([len(episodes[i].prompt_tokens) + t - 1 for i in live])
            drawn = steps.decode(StepRows(last, positions, tables[live]), uniform)
        assert drawn.tokens.tolist() == [episodes[i].tokens[t] for i in live], f"token {t}"
        results = zip(steps.hidden, drawn.logprobs, drawn.entropies, strict=True)
        found |= {(i, t): x for i, x in zip(live, results, strict=True)}
    return by_token(episodes, [found[key] for key in sorted(found)])


def as_sampled(model: Model, episodes: Episodes) -> Rows:
    """What the sampler said when it drew."""
    logprobs, entropies = zip(*((e.logprobs, e.entropies) for e in episodes), strict=True)
    return Rows(None, torch.cat(logprobs), torch.cat(entropies))


def on_two_threads(way: Callable[..., Rows], model: Model, episodes: Episodes) -> Rows:
    with use_threads(2):
        return way(model, episodes)


WAYS: dict[str, Callable[[Model, Episodes], Rows]] = {
    "training forward": trained,
    "training forward, two threads": partial(on_two_threads, trained),
    "forward without a graph": packed,
    "one sequence at a time": one_at_a_time,
    "in the other order": backwards,
    "in micro-batches": in_micro_batches,
    "answers on a shared prompt": partial(on_shared_prompts, together=True),
    "answers on a shared prompt, a group a batch": partial(on_shared_prompts, together=False),
    "prefill": prefilled,
    "decode": decoded,
    "decode, two threads": partial(on_two_threads, decoded),
    "decode, one sequence at a time": decoded_one_at_a_time,
    "decode on used pages": decoded_on_used_pages,
    "decode, layer by layer": decoded_layer_by_layer,
    "the sampler": as_sampled,
}


@torch.no_grad()
def ways_that_differ(model: Model, episodes: Episodes) -> dict[str, list[str]]:
    """Of all `WAYS`, those whose rows are not the training forward's to the bit."""
    want = trained(model, episodes)
    found = {name: way(model, episodes).differ(want) for name, way in WAYS.items()}
    return {name: wrong for name, wrong in found.items() if wrong}


# --- calls of the sampler ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Prompts, samples a prompt, and what ends a sequence; sample k of prompt i is episode 100 + i n + k."""

    prompts: Sequence[Sequence[int]]
    n: int
    new_tokens: int
    stops: frozenset[int]

    def sample(
        self,
        model: Model,
        limits: Limits | None = None,
        chosen: Sequence[int] | None = None,
        repeat: bool = False,
    ) -> list[Generated]:
        """`chosen` prompts in that order; `repeat`: each n times, with one sample each."""
        chosen = range(len(self.prompts)) if chosen is None else chosen
        ids = [100 + i * self.n + k for i in chosen for k in range(self.n)]
        prompts = [self.prompts[i] for i in chosen for _ in range(self.n if repeat else 1)]
        settings = Sampling(self.new_tokens, TEMPERATURE)
        n = 1 if repeat else self.n
        return generate(model, prompts, settings, self.stops, n, SEED, ids, limits)


def few_pages(model: Model, request: Request) -> Limits:
    """Pages for the longest request and a few more: sequences wait, and take the pages of those that ended."""
    a = model.architecture
    longest = max(map(len, request.prompts)) + request.new_tokens
    pages = -(-longest // PAGE) + 4
    one = page_bytes(a.num_layers, a.num_kv_heads, a.head_dim, model.kv_dtype)
    return Limits(kv_cache_gb=(pages + 0.5) * one * 1e-9)


def some_prompts(request: Request) -> list[int]:
    """A third of them, in no order."""
    order = list(range(len(request.prompts)))
    random.Random(2).shuffle(order)
    return order[: -(-len(order) // 3)]


def sample_on_two_threads(model: Model, request: Request) -> list[Generated]:
    with use_threads(2):
        return request.sample(model)


def sample_in_any_order(model: Model, request: Request) -> list[Generated]:
    order = list(range(len(request.prompts)))
    random.Random(1).shuffle(order)
    return request.sample(model, chosen=order)


def sample_alone(model: Model, request: Request) -> list[Generated]:
    return [g for i in some_prompts(request) for g in request.sample(model, chosen=[i])]


# name -> call; it returns all episodes or some of them, in any order
CALLS: dict[str, Callable[[Model, Request], list[Generated]]] = {
    "once more": lambda model, request: request.sample(model),
    "on two threads": sample_on_two_threads,
    "one slot": lambda model, request: request.sample(model, Limits(1), some_prompts(request)),
    "seven slots, small prefills": lambda model, request: request.sample(model, Limits(7, 2.0, 10)),
    "few pages": lambda model, request: request.sample(model, few_pages(model, request)),
    "prompts in another order": sample_in_any_order,
    "prompts repeated instead of shared": lambda model, request: request.sample(model, repeat=True),
    "each prompt in a call of its own": sample_alone,
}


def calls_that_differ(model: Model, request: Request, want: Episodes) -> dict[str, list[int]]:
    """Of all `CALLS`, those that drew other tokens, log-probs or entropies than `want`, and in which episodes."""
    by_id = {g.episode_id: g for g in want}
    found = {}
    for name, call in CALLS.items():
        drawn = call(model, request)
        assert len({g.episode_id for g in drawn}) == len(drawn) >= len(want) // 3
        found[name] = [g.episode_id for g in drawn if not same_draws(g, by_id[g.episode_id])]
    return {name: wrong for name, wrong in found.items() if wrong}


def same_draws(one: Generated, other: Generated) -> bool:
    return (
        one.prompt_tokens == other.prompt_tokens
        and one.tokens == other.tokens
        and torch.equal(one.logprobs, other.logprobs)
        and torch.equal(one.entropies, other.entropies)
    )


def optimizer_step(model: Model, episodes: Episodes, learning_rate: float) -> None:
    """One real step of the engine's optimizer towards these answers, and a new compute copy."""
    optimizer = Optimizer(model.parameters())
    batch = pack_sequences([e.prompt_tokens + e.tokens for e in episodes])
    shift = predictions(batch)
    hidden = transformer.forward(model, batch)[shift.rows]
    logprob, _ = transformer.logprobs(model, hidden, shift.targets, TEMPERATURE)
    (-logprob.mean()).backward()
    assert not optimizer.step(learning_rate, 1.0).skipped
    optimizer.zero_grad()
    model.refresh()
