"""Which sequences run next, and which pages hold their keys and values. Pure Python: no tensor, no
model.

A *request* is one prompt and its K samples. Its prompt is computed once (prefill) into pages of
``page_size`` tokens; the samples share these pages. Pages are counted: a page returns to the pool
when nobody holds it any more.

    tokens with keys:   P + T - 1 for a prompt of P and T new ones (the last is never fed back)
    shared by K:        the P // page_size full pages of the prompt
    own, one writer:    the rest; if P % page_size > 0 its first page starts as a copy of the
                        prompt's last one (the last sample to start takes that page itself)

A sequence's pages are reserved whole when it starts, so a running sequence never has to give way,
and its page table never changes. Requests start in their order; the first that does not fit waits,
and all behind it. The request at the head keeps its prompt's pages until its K samples have all
started, so K samples need one prefill however few fit at once. Nothing can lock up: only the head
can hold pages without running, and a head fits alone (checked beforehand).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

from engine.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What generation may use: sequences at once, K/V cache (10^9 bytes), tokens a prefill."""

    max_active: int = 64
    kv_cache_gb: float = 2.0
    prefill_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_active", "kv_cache_gb", "prefill_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}; give a number above 0")


@dataclass(frozen=True)
class Request:
    """A prompt of ``length`` tokens, at least 1, wanted ``samples`` times, at least once."""

    length: int
    samples: int


@dataclass(frozen=True)
class Prefill:
    """Compute the keys and values of request ``request``'s prompt into ``pages``."""

    request: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Sample ``sample`` of ``request`` starts: ``pages`` is its whole page table, from position 0
    to its last.

    ``copy``: (source, destination) page to copy before the sample writes.
    """

    request: int
    sample: int
    pages: tuple[int, ...]
    copy: tuple[int, int] | None


@dataclass(frozen=True)
class Admission:
    """What happens before the next decode step: first all prefills, then the starts."""

    prefills: tuple[Prefill, ...]
    starts: tuple[Start, ...]


@dataclass(frozen=True)
class Need:
    """Pages of a request: full ones of its ``prompt`` (``shared``), all of it, a sequence's
    ``total``.
    """

    shared: int
    prompt: int
    total: int

    @property
    def own(self) -> int:
        """Writable pages of one sample."""
        return self.total - self.shared

    def alone(self, samples: int) -> int:
        """Pages that let the request run one sample at a time."""
        spare = self.prompt - self.shared if samples > 1 else 0  # the original of the copied page
        return self.total + spare


def pages_needed(length: int, max_new_tokens: int, page_size: int) -> Need:
    """Pages of a prompt of ``length`` tokens and of one sample of at most ``max_new_tokens``."""
    prompt = -(-length // page_size)
    return Need(length // page_size, prompt, -(-(length + max_new_tokens - 1) // page_size))


class PagePool:
    """Pages 0 .. num_pages - 1 with the number of holders of each. Used pages are reused first."""

    def __init__(self, num_pages: int) -> None:
        self.holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """``count`` free pages with one holder each; the caller has asked ``num_free`` before."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free and cannot be shared"
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each page; a page without any is free."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is released twice"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)


class Scheduler:
    """Admits requests in order within ``limits``; see the module's text for the rules.

    ``page_bytes`` is the size of one page over all layers, keys and values together.

    Raises:
        ConfigError: a request that can never fit into ``limits.kv_cache_gb``.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        limits: Limits,
        page_bytes: int,
        page_size: int = 16,
    ) -> None:
        self._requests = list(requests)
        self._limits = limits
        self._needs = [pages_needed(r.length, max_new_tokens, page_size) for r in self._requests]
        budget = int(limits.kv_cache_gb * 1e9) // page_bytes
        for index, (request, need) in enumerate(zip(self._requests, self._needs, strict=True)):
            if need.alone(request.samples) > budget:
                pages = need.alone(request.samples)
                raise ConfigError(
                    f"prompt {index} ({request.length} tokens) with "
                    f"max_new_tokens={max_new_tokens} needs {pages} pages of {page_size} tokens "
                    f"({pages * page_bytes / 1e9:.3g} GB), the K/V cache of "
                    f"kv_cache_gb={limits.kv_cache_gb:g} holds {budget}; raise kv_cache_gb or "
                    "shorten the sequence"
                )
        self.pool = PagePool(min(budget, self._most_pages_at_once()))
        self._running: dict[tuple[int, int], tuple[int, ...]] = {}
        self._head = 0  # the request that starts next
        self._started = 0  # samples of it that have started
        self._head_pages: tuple[int, ...] | None = None  # its prompt's pages, once computed

    @property
    def num_pages(self) -> int:
        """Pages that the cache must hold."""
        return len(self.pool.holders)

    @property
    def done(self) -> bool:
        """Whether every sequence has started and finished."""
        return self._head == len(self._requests) and not self._running

    def admit(self) -> Admission:
        """Start what fits now; the caller runs the prefills, then the copies, then decodes."""
        prefills: list[Prefill] = []
        starts: list[Start] = []
        tokens = 0
        while self._head < len(self._requests):
            request, need = self._requests[self._head], self._needs[self._head]
            if self._head_pages is None:
                too_long = bool(prefills) and tokens + request.length > self._limits.prefill_tokens
                no_room = need.alone(request.samples) > self.pool.num_free
                if too_long or no_room or self._full:
                    break
                self._head_pages = self.pool.take(need.prompt)
                prefills.append(Prefill(self._head, self._head_pages))
                tokens += request.length
            while self._started < request.samples and (start := self._start(need)) is not None:
                starts.append(start)
            if self._started < request.samples:
                break
            self._head, self._started, self._head_pages = self._head + 1, 0, None
        return Admission(tuple(prefills), tuple(starts))

    def finish(self, start: Start) -> None:
        """The sequence has ended: its pages lose this holder, its place is free."""
        self.pool.release(self._running.pop((start.request, start.sample)))

    @property
    def _full(self) -> bool:
        return len(self._running) >= self._limits.max_active

    def _start(self, need: Need) -> Start | None:
        """Start the head's next sample, or None if it has to wait."""
        prompt = self._head_pages
        assert prompt is not None
        shared, partial = prompt[: need.shared], prompt[need.shared :]
        last = self._started + 1 == self._requests[self._head].samples
        own = need.own - len(partial) if last else need.own
        if self._full or own > self.pool.num_free:
            return None
        pages = self.pool.take(own)
        copy = None
        if last:
            pages = partial + pages  # the head's hold of its prompt's pages passes to this sample
        else:
            self.pool.share(shared)
            copy = (partial[0], pages[0]) if partial else None
        start = Start(self._head, self._started, shared + pages, copy)
        self._running[start.request, start.sample] = start.pages
        self._started += 1
        return start

    def _most_pages_at_once(self) -> int:
        """Enough for any moment: the max_active largest sequences and one prompt that waits."""
        pairs = list(zip(self._requests, self._needs, strict=True))
        sizes = (size for r, n in pairs for size in repeat(n.total, r.samples))
        return sum(heapq.nlargest(self._limits.max_active, sizes)) + max(
            (n.prompt for _, n in pairs), default=0
        )
