"""Which samples a step sees, and their randomness: pure functions of seed, epoch, step and sample id.

Nothing here has state, so resuming at a step needs no more than the step's number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def key(*parts: int | str) -> int:
    """A 63-bit key of the parts, the same on every machine: the first bytes of their SHA-256."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Order of the samples in an epoch, [num_samples] int64."""
    generator = np.random.Generator(np.random.Philox(key=key("order", seed, epoch)))
    return generator.permutation(num_samples)


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample as one step sees it: its index, its epoch and the key of its randomness.

    place: where it stands in the stream of all samples that a run sees; -1 outside of a run.
    """

    index: int
    epoch: int
    seed: int
    place: int = -1


def window(*, seed: int, step: int, num_samples: int, batch_size: int) -> list[Draw]:
    """The samples of one optimizer step: places [step * batch_size, (step + 1) * batch_size) of the stream.

    The stream is the epochs' permutations one after the other, so every window is full and every sample
    is seen once an epoch.
    """
    draws: list[Draw] = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(place, num_samples)
        index = int(permutation(seed, epoch, num_samples)[offset])
        draws.append(Draw(index, epoch, key("sample", seed, epoch, index), place))
    return draws


def round_contexts(*, seed: int, round_index: int, num_contexts: int, size: int) -> list[int]:
    """Indices of the `size` <= num_contexts contexts of a round, all different.

    Rounds go through a permutation of all contexts until it holds less than a round's, then begin another.
    """
    epoch, place = divmod(round_index, num_contexts // size)
    return permutation(seed, epoch, num_contexts)[place * size : (place + 1) * size].tolist()


def micro_batches(
    draws: Sequence[Draw], lengths: Sequence[int], *, rank: int, num_ranks: int, micro_batch_size: int
) -> list[list[Draw]]:
    """This rank's share of a window, cut into micro-batches of samples of similar length.

    lengths[i] is the cost of sample i. Sorted by length, samples go to the ranks in turn, so that ranks have
    equal work; the longest micro-batch comes first, so that running out of memory shows at once.
    """
    by_length = sorted(draws, key=lambda d: (-lengths[d.index], d.seed))
    mine = by_length[rank::num_ranks]
    return [mine[i : i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, equal ones in order: how held-out samples are batched wherever they are."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def num_steps_of(*, num_samples: int, batch_size: int, num_epochs: float) -> int:
    """Steps that see every sample num_epochs times, rounded up, at least one."""
    # Rounded, or 0.07 of 100 samples would be 7.000000000000001 and take a step more.
    return max(1, math.ceil(round(num_samples * num_epochs / batch_size, 9)))
