"""Tile sizes and numbers of programs, by device and shape. Nothing here depends on lengths or batch contents.

Measured with ``benchmarks/kernels.py --tune`` on one H200 (132 multiprocessors), in bfloat16 with a head
size of 128; other devices and sizes start from the same numbers. A program streams its split of the cache
through shared memory, ``num_stages - 1`` tiles ahead, so a tile shrinks as a token's key and value grow.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How the attention kernel runs for one shape."""

    #: tokens that a program reads at a time
    tile: int
    num_warps: int
    #: tiles in flight, with the one that is computed
    num_stages: int
    #: programs that a multiprocessor runs at a time
    programs: int
    #: how often a multiprocessor is given that many, at most
    waves: int = 1
    #: for sparse layers whose rows fill the GPU without being cut: programs store outputs, and combine the
    #: splits of what is cut nevertheless
    whole: bool = False

    def programs_per_head(self, rows: int, num_kv_heads: int, multiprocessors: int) -> int:
        """Programs per KV head that the schedule aims at.

        Rows of like lengths are cut into equal numbers of splits, which fill a wave only if it is about a
        multiple of their number: the fewest waves of which nine tenths are filled so, or else the fullest.
        """
        wave = self._wave_per_head(num_kv_heads, multiprocessors)
        filled = {waves: waves * wave // rows * rows / (waves * wave) for waves in range(1, self.waves + 1)}
        enough = min(0.9, max(filled.values()))
        return wave * next(waves for waves, share in filled.items() if share >= enough)

    def most_programs_per_head(self, num_kv_heads: int, multiprocessors: int) -> int:
        """The largest number that `programs_per_head` gives, for any rows."""
        return self.waves * self._wave_per_head(num_kv_heads, multiprocessors)

    def _wave_per_head(self, num_kv_heads: int, multiprocessors: int) -> int:
        return -(-self.programs * multiprocessors // num_kv_heads)


@dataclass(frozen=True)
class Rule:
    """Settings, and up to where they hold."""

    tuning: Tuning
    #: of a key, padded and in the kernel's own type
    key_bytes: int
    #: rows times KV heads
    units: float = math.inf
    #: the same, per multiprocessor: more than the first number, up to the second
    load: tuple[float, float] = (0.0, math.inf)
    #: whether they hold for a quantised cache, too, whose programs compute more
    quantized: bool = True

    def holds(self, key_bytes: int, units: int, multiprocessors: int, quantized: bool) -> bool:
        """Whether it holds for these keys, rows times KV heads, GPU and cache."""
        over, most = self.load
        return (
            key_bytes <= self.key_bytes
            and units <= self.units
            and over * multiprocessors < units <= most * multiprocessors
            and (self.quantized or not quantized)
        )


#: The least tile of any setting, in tokens.
MIN_TILE = 32

# The first rule that holds counts.
_LONG_KEYS = (
    Rule(Tuning(tile=64, num_warps=4, num_stages=2, programs=2), key_bytes=512),
    Rule(Tuning(tile=32, num_warps=4, num_stages=2, programs=2), key_bytes=1024),
)
_SELECTION = (
    Rule(Tuning(tile=64, num_warps=4, num_stages=2, programs=3, waves=4), key_bytes=256),
    *_LONG_KEYS,
)
# Whole rows take more tiles in flight to a program, as there is one program, or two, to a multiprocessor.
_WHOLE_ROWS = (
    Rule(
        Tuning(tile=128, num_warps=4, num_stages=3, programs=1, whole=True),
        key_bytes=256,
        load=(0.8, 1.0),
        quantized=False,
    ),
    Rule(
        Tuning(tile=64, num_warps=4, num_stages=4, programs=2, whole=True),
        key_bytes=256,
        load=(1.2, 2.0),
        quantized=False,
    ),
)
_SPARSE = (
    *_WHOLE_ROWS,
    Rule(Tuning(tile=64, num_warps=4, num_stages=2, programs=3), key_bytes=256, units=8),
    Rule(Tuning(tile=32, num_warps=2, num_stages=2, programs=6), key_bytes=256, units=32, quantized=False),
    Rule(Tuning(tile=64, num_warps=4, num_stages=2, programs=3), key_bytes=256, units=32),
    Rule(Tuning(tile=64, num_warps=4, num_stages=2, programs=4), key_bytes=256),
    *_LONG_KEYS,
)
# Several query tokens take the registers of two programs. Long keys were not measured.
_MULTI_TOKEN_LONG_KEYS = (
    Rule(Tuning(tile=64, num_warps=8, num_stages=2, programs=1), key_bytes=512),
    Rule(Tuning(tile=32, num_warps=8, num_stages=2, programs=1), key_bytes=1024),
)
_MULTI_TOKEN_SELECTION = (
    Rule(Tuning(tile=64, num_warps=4, num_stages=3, programs=2, waves=4), key_bytes=256),
    *_MULTI_TOKEN_LONG_KEYS,
)
_MULTI_TOKEN_SPARSE = (
    Rule(Tuning(tile=64, num_warps=4, num_stages=3, programs=2), key_bytes=256),
    *_MULTI_TOKEN_LONG_KEYS,
)

#: Bytes of shared memory that a program takes beside its tiles, at most, where rows have one query token.
_SHARED_MARGIN = 12 << 10


def choose_tuning(
    key_bytes: int,
    units: int,
    shared_memory: int,
    multiprocessors: int,
    *,
    sparse: bool,
    quantized: bool = False,
    queries: int | None = None,
) -> Tuning:
    """The settings for keys of `key_bytes`, padded and in the type in which the kernel computes.

    Args:
        key_bytes: at most 1024.
        units: rows times KV heads, and bands of query tokens.
        shared_memory: bytes that a program may take. Where the measured settings need more, fewer or smaller
            tiles are in flight, and rows are cut.
        multiprocessors: of the GPU.
        sparse: for sparse layers, else for selection layers.
        quantized: whether the cache is, so that keys are converted.
        queries: of a program, where rows have several query tokens; None where they have one.

    Raises:
        ValueError: longer keys, or too little shared memory for the smallest tiles.
    """
    rules: tuple[Rule, ...]
    if queries is None:
        rules = _SPARSE if sparse else _SELECTION
    else:
        rules = _MULTI_TOKEN_SPARSE if sparse else _MULTI_TOKEN_SELECTION
    for rule in rules:
        if not rule.holds(key_bytes, units, multiprocessors, quantized):
            continue
        tuning = _fit(rule.tuning, key_bytes, queries or 0, shared_memory)
        # Whole rows are for the very tiles and keys that were measured.
        if not tuning.whole or (tuning == rule.tuning and key_bytes == rule.key_bytes):
            return tuning
    raise ValueError(f"no kernel for keys of {key_bytes} bytes")


def most_full_units(key_bytes: int, multiprocessors: int) -> int:
    """Rows times KV heads up to which full layers should run with the attention kernel.

    On an H200, with up to half as many as multiprocessors, it took 0.57 to 1.01 times as long as
    FlashAttention 3, and it stores the rows' keys and values, too; with twice as many as multiprocessors up
    to 1.02 times. Keys of other sizes have not been compared. Arguments as above.
    """
    return multiprocessors // 2 if key_bytes == 256 else 0


def _fit(tuning: Tuning, key_bytes: int, queries: int, shared_memory: int) -> Tuning:
    while shared_bytes(tuning, key_bytes, queries) > shared_memory:
        if tuning.num_stages > 2:
            tuning = dataclasses.replace(tuning, num_stages=tuning.num_stages - 1)
        elif tuning.tile > MIN_TILE:
            tuning = dataclasses.replace(tuning, tile=tuning.tile // 2)
        else:
            raise ValueError(f"keys of {key_bytes} bytes need more shared memory than {shared_memory} bytes")
    return tuning


def shared_bytes(tuning: Tuning, key_bytes: int, queries: int) -> int:
    """Bytes of shared memory that a program takes, at most; `queries` as in `choose_tuning`, or 0.

    Beside its tiles these are the queries and a tile's probabilities, in up to 4 bytes each.
    """
    beside = queries * (key_bytes + 4 * tuning.tile)
    return tuning.num_stages * tuning.tile * 2 * key_bytes + beside + _SHARED_MARGIN


def all_tunings() -> list[Tuning]:
    """All settings."""
    tables = _SELECTION, _SPARSE, _MULTI_TOKEN_SELECTION, _MULTI_TOKEN_SPARSE
    return [rule.tuning for table in tables for rule in table]
