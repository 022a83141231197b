"""Tile sizes and numbers of programs, by device and shape. Nothing here depends on lengths or batch contents.

Measured with ``benchmarks/kernels.py --tune`` on one H200 (132 multiprocessors), in bfloat16 with a head
size of 128; other devices and sizes start from the same numbers. A program streams its piece of the cache
through shared memory, ``num_stages`` tiles deep, so a tile shrinks as a token's key and value grow.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How the attention kernel runs for one shape."""

    #: tokens that a program reads at a time
    tile: int
    num_warps: int
    #: tiles in flight
    num_stages: int
    #: programs that the schedule aims at, per multiprocessor
    programs: int


#: Rows times KV heads, at most, of a small step: too few to fill the GPU without many pieces a row.
SMALL_STEP = 64

#: (bytes of a key in the kernel's own type, at most; settings of a small step; of a larger one)
_SELECTION = (
    (
        256,
        Tuning(tile=128, num_warps=4, num_stages=3, programs=2),
        Tuning(tile=64, num_warps=4, num_stages=2, programs=3),
    ),
    (
        512,
        Tuning(tile=64, num_warps=4, num_stages=3, programs=2),
        Tuning(tile=64, num_warps=4, num_stages=2, programs=3),
    ),
    (
        1024,
        Tuning(tile=32, num_warps=4, num_stages=2, programs=2),
        Tuning(tile=32, num_warps=4, num_stages=2, programs=3),
    ),
)
_SPARSE = (
    (
        256,
        Tuning(tile=128, num_warps=4, num_stages=3, programs=3),
        Tuning(tile=128, num_warps=4, num_stages=4, programs=2),
    ),
    (
        512,
        Tuning(tile=64, num_warps=4, num_stages=3, programs=3),
        Tuning(tile=64, num_warps=4, num_stages=3, programs=2),
    ),
    (
        1024,
        Tuning(tile=32, num_warps=4, num_stages=2, programs=3),
        Tuning(tile=32, num_warps=4, num_stages=2, programs=2),
    ),
)


def choose_tuning(padded_head_size: int, itemsize: int, units: int, *, sparse: bool) -> Tuning:
    """The settings for keys of `padded_head_size` elements of `itemsize` bytes, as the kernel computes.

    `units` is the number of rows times KV heads.

    Raises:
        ValueError: keys of more than 1024 bytes.
    """
    for limit, small, large in _SPARSE if sparse else _SELECTION:
        if padded_head_size * itemsize <= limit:
            return small if units <= SMALL_STEP else large
    raise ValueError(f"no kernel for a head size of {padded_head_size} elements of {itemsize} bytes")
