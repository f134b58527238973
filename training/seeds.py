"""Seeds of the micro steps."""

from __future__ import annotations

import hashlib

_WORD = 1 << 32


def mix_seed(seed: int, index: int) -> int:
    """Return a seed of 32 bits for the ``index``-th random stream of a run.

    torch's generator for the CPU uses the lower 32 bits of a seed and drops the rest, so packing several numbers into
    one of 64 bits loses some of them. Every step here is a bijection of 32 bits: a run repeats no stream in 2**32, and
    runs of different seeds do not walk through the same sequence at an offset.

    Args:
        seed: seed of the run, any integer.
        index: number of the stream, from 0.
    """
    key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big")
    word = (index * (key >> 32 | 1) + key) % _WORD
    # Constants of a well-mixing integer hash: github.com/skeeto/hash-prospector, "lowbias32".
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ word >> shift) * factor % _WORD
    return word ^ word >> 16
