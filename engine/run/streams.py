"""Addressed random numbers: every draw is a pure function of (seed, purpose, episode, position).

    key     = derived_seed(seed, purpose), from sha256
    counter = (episode, position), 64 bits each
    u       = floor(Philox4x32-10(counter, key)[first 64 bits] / 2^11) / 2^53

There is no generator state to save, to share or to lose, so a sample cannot depend on the batch it
sits in, on the order of the schedule, on the number of ranks or on a restart.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32, 10 rounds).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import EngineError

ROUNDS = 10
# Constants of Philox4x32 (Salmon et al. 2011, section 3.3): the multipliers, the Weyl increments.
# The order of each pair is that of the words they meet: (word 0, word 2) and (key 0, key 1).
MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """The Philox4x32-10 bijection on n counters at once: (4, n) words in, (4, n) words out.

    The 32-bit words are held in uint64 so that the 32 x 32 -> 64 bit products need no splitting.
    `key` is two 32-bit words.
    """
    multiplied, mixed = counter[0::2], counter[1::2]  # words (0, 2) and words (1, 3), both (2, n)
    first, second = key
    for _ in range(ROUNDS):
        product = multiplied * MULTIPLIERS
        # Row 0 of the next state takes the product of word 2, row 1 that of word 0: reversed.
        round_key = np.array([[first], [second]], dtype=np.uint64)
        multiplied = (product >> HALF)[::-1] ^ mixed ^ round_key
        mixed = (product & WORD)[::-1]
        first, second = (first + WEYL[0]) & 0xFFFFFFFF, (second + WEYL[1]) & 0xFFFFFFFF
    return np.stack([multiplied[0], mixed[0], multiplied[1], mixed[1]])


def derived_seed(seed: int, purpose: str, *address: int) -> int:
    """A 63-bit seed for a library's own generator, e.g. `torch.Generator().manual_seed(...)`.

    Stable between processes, machines and versions: sha256 of the written address, not `hash`.
    """
    if not purpose:
        raise EngineError("streams: got an empty purpose, want a name such as 'sample'")
    # JSON-like writing with the length of the purpose first: no two addresses share one text.
    text = f"{int(seed)}|{len(purpose)}:{purpose}|" + ",".join(str(int(part)) for part in address)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """A numpy generator for draws of unknown number (shuffles), addressed like everything else.

    Make a new one at each address (an epoch, an iteration) instead of keeping one: a kept one is a
    stream, whose state a resumed run would have to restore.
    """
    return np.random.Generator(np.random.Philox(key=derived_seed(seed, purpose, *address)))


def uniform(
    seed: int, purpose: str, episode: ArrayLike, position: ArrayLike
) -> NDArray[np.float64]:
    """Uniform doubles in [0, 1), multiples of 2^-53, one for each (episode, position).

    `episode` and `position` are whole numbers in [0, 2^63), of shapes that broadcast together; the
    result has the broadcast shape. Raises `EngineError` for anything else.
    """
    episodes, positions = np.broadcast_arrays(
        _words(episode, "episode"), _words(position, "position")
    )
    flat_episode, flat_position = episodes.ravel(), positions.ravel()
    counter = np.stack(
        [flat_episode & WORD, flat_episode >> HALF, flat_position & WORD, flat_position >> HALF]
    )
    key = derived_seed(seed, purpose)
    words = philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))
    bits = (words[0] << HALF) | words[1]
    draws: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws.reshape(episodes.shape)


def _words(values: ArrayLike, name: str) -> NDArray[np.uint64]:
    array = np.asarray(values)
    if array.size == 0 and array.dtype == np.float64:  # numpy's type for an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise EngineError(f"streams: {name} has type {array.dtype}, want whole numbers")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise EngineError(f"streams: {name} holds {int(array.min())}, want numbers >= 0")
    return array.astype(np.uint64)
