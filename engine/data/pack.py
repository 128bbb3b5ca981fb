"""From row numbers to ragged token lists to packed batches, and the one place that shifts targets.

Letters: N packed tokens, S segments, M predictions. A batch has no pad token and no mask: segment s
is rows ``cu_seqlens[s] : cu_seqlens[s + 1]``. K answers to one prompt are one prompt segment and K
answer segments that attend to it, so that the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import DataError

INT32_MAX = 2**31 - 1
# Keeps the order of rows apart from every other use of the same seed.
ORDER_STREAM = 0x726F7773


@dataclass(frozen=True)
class Packed:
    """A ragged batch of token segments.

    ``prefix[s]`` is the segment whose keys segment s also attends to, before its own; ``prefix[s]
    == s`` means none. A prefix comes before its users and has no prefix itself. ``prefix=None``: no
    segment has one.
    """

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64; a segment with a prefix starts at the prefix's length
    cu_seqlens: Tensor  # (S + 1,) int32
    prefix: Tensor | None = None  # (S,) int32

    @property
    def num_segments(self) -> int:
        """S, empty segments included."""
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:  # (S,) int64
        """Tokens of each segment, its prefix not counted."""
        return self.cu_seqlens.long().diff()

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on another device."""
        prefix = None if self.prefix is None else self.prefix.to(device)
        return Packed(
            self.tokens.to(device), self.positions.to(device), self.cu_seqlens.to(device), prefix
        )


@dataclass(frozen=True)
class Shift:
    """Which hidden row predicts which token.

    ``targets[i]`` is predicted by hidden row ``rows[i]``; predictions of the j-th chosen segment
    are ``cu[j] : cu[j + 1]``, in the order of its tokens.
    """

    rows: Tensor  # (M,) int64
    targets: Tensor  # (M,) int64
    cu: Tensor  # (S' + 1,) int32


def pack_sequences(sequences: Sequence[Sequence[int]]) -> Packed:
    """Pack independent sequences of token ids; empty ones stay as empty segments."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = _flat(sequences, int(lengths.sum()))
    cu = _offsets(lengths)
    positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(cu[:-1], lengths)
    return Packed(
        torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(cu.astype(np.int32))
    )


def pack_groups(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Packed:
    """Pack (prompt, K answers): the prompt's segment, then K segments that have it as prefix.

    An answer's positions go on where the prompt stops. Answers may be empty, and K may differ
    between groups; a prompt may be empty only if all its answers are, since the first token of an
    answer needs a row to predict it.

    Raises:
        DataError: a group with answers but without a prompt.
    """
    sequences: list[Sequence[int]] = []
    prefix: list[int] = []
    starts: list[int] = []
    for number, (prompt, answers) in enumerate(groups):
        if len(prompt) == 0 and any(len(answer) for answer in answers):
            reason = "the prompt has no tokens, so nothing predicts the first token of its answers"
            raise DataError(f"group {number}", f"{reason}; give at least one token", "empty prompt")
        head = len(sequences)
        sequences.append(prompt)
        sequences.extend(answers)
        prefix.extend([head] * (1 + len(answers)))
        starts.extend([0] + [len(prompt)] * len(answers))
    packed = pack_sequences(sequences)
    shift = np.repeat(np.array(starts, dtype=np.int64), packed.lengths.numpy())
    positions = packed.positions + torch.from_numpy(shift)
    prefix_tensor = torch.tensor(prefix, dtype=torch.int32)
    return Packed(packed.tokens, positions, packed.cu_seqlens, prefix_tensor)


def predictions(
    batch: Packed, segments: Sequence[int] | None = None, skip_first: Sequence[int] | None = None
) -> Shift:
    """The shift: position t - 1 predicts token t. The only place in the engine that knows it.

    A token that is not the first of its segment is predicted by the row before it; the first token
    of a segment with a prefix by the last row of that prefix; the first token of a segment without
    one by nothing, and it is left out.

    Args:
        batch: the packed batch.
        segments: the segments wanted, in the order wanted; ``None`` means all of them.
        skip_first: for each chosen segment, how many of its first tokens are context and not
            predicted (a prompt inside an SFT sequence); ``None`` means 0. More than the segment
            has: no predictions of it.

    Raises:
        DataError: a segment outside the batch, or ``skip_first`` of another length than
            ``segments``.
    """
    cu = batch.cu_seqlens.cpu().numpy().astype(np.int64)
    count = len(cu) - 1
    chosen = np.arange(count) if segments is None else np.asarray(segments, dtype=np.int64)
    skip = np.zeros(len(chosen), np.int64)
    if skip_first is not None:
        skip = np.asarray(skip_first, dtype=np.int64)
    if len(skip) != len(chosen) or (skip < 0).any():
        reason = f"got {skip.tolist()} for {len(chosen)} segments; give one count >= 0 for each"
        raise DataError("skip_first", reason)
    if ((chosen < 0) | (chosen >= count)).any():
        raise DataError("segments", f"got {chosen.tolist()}; the batch has segments 0..{count - 1}")
    prefix = np.arange(count) if batch.prefix is None else batch.prefix.cpu().numpy()

    head = prefix[chosen]
    alone = head == chosen
    first = np.minimum(cu[chosen] + np.maximum(skip, alone), cu[chosen + 1])
    lengths = cu[chosen + 1] - first
    out = _offsets(lengths)
    # The row that holds each token to predict.
    targets = np.arange(out[-1]) - np.repeat(out[:-1] - first, lengths)
    rows = targets - 1
    from_prefix = (~alone) & (first == cu[chosen]) & (lengths > 0)
    if (cu[head + 1] == cu[head])[from_prefix].any():
        bad = chosen[from_prefix][(cu[head + 1] == cu[head])[from_prefix]].tolist()
        raise DataError(f"segments {bad}", "their prefix has no row to predict their first token")
    rows[out[:-1][from_prefix]] = cu[head[from_prefix] + 1] - 1
    device = batch.tokens.device
    return Shift(
        torch.from_numpy(rows).to(device),
        batch.tokens[torch.from_numpy(targets).to(device)],
        torch.from_numpy(out.astype(np.int32)).to(device),
    )


def last_rows(batch: Packed, segments: Sequence[int] | None = None) -> Tensor:  # (S',) int64
    """The last row of each chosen segment: where a scalar model's score is read.

    An empty segment with a prefix is read at the last row of the prefix.

    Raises:
        DataError: a segment without any row.
    """
    cu = batch.cu_seqlens.cpu().numpy().astype(np.int64)
    chosen = np.arange(len(cu) - 1) if segments is None else np.asarray(segments, dtype=np.int64)
    prefix = np.arange(len(cu) - 1) if batch.prefix is None else batch.prefix.cpu().numpy()
    empty = cu[chosen + 1] == cu[chosen]
    owner = np.where(empty, prefix[chosen], chosen)
    if (cu[owner + 1] == cu[owner]).any():
        bad = chosen[cu[owner + 1] == cu[owner]].tolist()
        raise DataError(f"segments {bad}", "have no tokens, so no row to read a score at", "empty")
    return torch.from_numpy(cu[owner + 1] - 1).to(batch.tokens.device)


def cut_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut items into micro-batches of at most ``budget`` tokens: first-fit, longest first,
    deterministic.

    Returns lists of indices into ``lengths``; every index is in exactly one. One item larger than
    the budget gets a micro-batch of its own, so the caller's memory bound is max(budget, longest
    item).

    Raises:
        DataError: a budget below 1.
    """
    if budget < 1:
        raise DataError("token budget", f"got {budget}; at least 1 token a micro-batch is wanted")
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        slot = next((b for b, free in enumerate(room) if free >= length), None)
        if slot is None:
            batches.append([])
            room.append(budget)
            slot = len(batches) - 1
        batches[slot].append(index)
        room[slot] -= length
    return batches


@lru_cache(maxsize=8)  # a pass asks for it once a step; eight orders serve all streams of a run
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:  # (n,)
    """The order in which pass ``epoch`` visits n rows: argsort of n words of Philox(seed, epoch).

    A pure function of its arguments, stable between machines and versions of numpy (raw words and a
    stable sort, no library shuffle). Passes differ in the high counter word, so they never overlap.

    Raises:
        DataError: a negative argument, or a seed above 64 bits.
    """
    if n < 0 or epoch < 0 or not 0 <= seed < 2**64:
        reason = f"got n={n}, seed={seed}, epoch={epoch}; want numbers >= 0 (seed < 2^64)"
        raise DataError("epoch order", reason)
    words = np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, 0, 0, epoch]).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def epoch_steps(n: int, batch_size: int) -> int:
    """Steps of one pass over n rows: ceil(n / batch_size); the last may be smaller."""
    if n < 1 or batch_size < 1:
        reason = f"got {n} rows and batch size {batch_size}; at least 1 of each is wanted"
        raise DataError("batches", reason)
    return -(-n // batch_size)


def step_rows(n: int, batch_size: int, seed: int, step: int, wrap: bool = False) -> list[int]:
    """The rows of global step ``step``, counted over all passes: the only cursor a resume needs.

    With ``wrap=False`` every pass visits every row once and ends with a smaller batch if it must
    (:func:`epoch_steps` steps a pass). With ``wrap=True`` the passes are one endless stream, cut
    into batches of exactly ``batch_size``; a batch larger than n repeats rows.

    Raises:
        DataError: no rows, a batch below 1 or a negative step.
    """
    per_epoch = epoch_steps(n, batch_size)
    if step < 0:
        raise DataError("step", f"got {step}; steps count from 0")
    if not wrap:
        epoch, at = divmod(step, per_epoch)
        first = at * batch_size
        return [int(i) for i in epoch_order(n, seed, epoch)[first : first + batch_size]]
    return stream_rows(n, seed, range(step * batch_size, (step + 1) * batch_size))


def stream_rows(n: int, seed: int, places: Iterable[int]) -> list[int]:
    """The rows at the given places of the endless stream of passes over n rows.

    Place p is the (p mod n)-th row of pass p div n.
    """
    if n < 1:
        raise DataError("rows", "got none; at least 1 is wanted")
    orders: dict[int, NDArray[np.int64]] = {}
    rows = []
    for place in places:
        epoch, at = divmod(place, n)
        if epoch not in orders:
            orders[epoch] = epoch_order(n, seed, epoch)
        rows.append(int(orders[epoch][at]))
    return rows


def _flat(sequences: Sequence[Sequence[int]], total: int) -> NDArray[np.int64]:
    tokens = np.empty(total, dtype=np.int64)
    at = 0
    for sequence in sequences:
        tokens[at : at + len(sequence)] = sequence
        at += len(sequence)
    return tokens


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > INT32_MAX:
        raise DataError("batch", f"{offsets[-1]} tokens do not fit int32 offsets; cut it smaller")
    return offsets
