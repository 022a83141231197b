"""The logits that a selection layer leaves behind, in 16 bits each.

A logit x[t] is kept as its distance below the largest of its tile, ``d = max_t x[t] - x[t]``: d + 1, below
128, as a float of 3 bits of exponent and 13 of mantissa. That rounds d by at most ``2^-14 (d + 1)``, and so
2^-d by at most 0.0042% (d + 1) of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

#: Tokens of a tile of logits: the largest tile of the attention kernel and the largest page.
LOGIT_TILE = 128

# A float's bits less those of 0.5 have 26 bits where it is from 1 to 128; a code is the upper 16 of them.
_CODE_SHIFT = tl.constexpr(10)
_CODE_BITS = tl.constexpr(0x03FFFC00)
_ROUND_UP = tl.constexpr(512)  # half of what the shift drops
_HALF = tl.constexpr(0x3F000000)  # the bits of 0.5
_LARGEST = tl.constexpr(127.9921875)
_RESCALE = tl.constexpr(8.507059173023462e37)  # 2^126, which makes up for the bits of 0.5


@triton.jit
def encode_distance(distance_and_one):
    """Distances, not negative, plus 1, to 16 bits: those below the exponent's lowest are left of a float."""
    nearest = tl.minimum(distance_and_one, _LARGEST).to(tl.int32, bitcast=True) + _ROUND_UP
    return ((nearest - _HALF) >> _CODE_SHIFT).to(tl.int16)


@triton.jit
def decode_distance(code):
    """What `encode_distance` was given, float32, from the lower half of an int32."""
    return ((code << _CODE_SHIFT) & _CODE_BITS).to(tl.float32, bitcast=True) * _RESCALE


@triton.jit
def scaled_logits(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """Dot products to logits in base 2; tanh(y) is 1 - 2 / (e^2y + 1)."""
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp2(raw * scale * (2.0 * LOG2_E) / softcap) + 1.0)) * LOG2_E
    else:
        x = raw * (scale * LOG2_E)
    return x


@triton.jit
def store_logits(
    logits_ptrs,  # of codes and of the maxima of tiles, see `attention_kernel`
    logits,  # [TILE, COLUMNS]
    maximum,  # [COLUMNS], of the tile
    first_tile,
    kv_head,
    start,  # the tile's first token, as `first_tile` of the row's tiles
    column,
    columns,  # those that are stored
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile's logits, as codes, and their maxima."""
    tile = (first_tile + start // SHAPE.LOGIT_TILE).to(tl.int64)
    subtile = tile * (SHAPE.LOGIT_TILE // TILE) + start % SHAPE.LOGIT_TILE // TILE
    token = (start + tl.arange(0, TILE)) % SHAPE.LOGIT_TILE
    place = (tile * SHAPE.KV_HEADS + kv_head) * SHAPE.LOGIT_TILE + token
    # They stay in the L2 cache until they are scored.
    tl.store(
        logits_ptrs[0] + place[:, None] * SHAPE.QUERIES + column[None, :],
        encode_distance((maximum + 1.0)[None, :] - logits),
        mask=(column < columns)[None, :],
        eviction_policy="evict_last",
    )
    tl.store(
        logits_ptrs[1] + (subtile * SHAPE.KV_HEADS + kv_head) * SHAPE.QUERIES + column,
        maximum,
        mask=column < columns,
        eviction_policy="evict_last",
    )


@triton.jit
def locate_codes(logits_ptr, first_tile, start, SHAPE: tl.constexpr):
    """Where a tile's codes begin; an int32 has those of two heads, the even one's in its lower half."""
    tile = (first_tile + start // SHAPE.LOGIT_TILE).to(tl.int64)
    pairs_ptr = logits_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return pairs_ptr + (tile * (SHAPE.KV_HEADS * SHAPE.LOGIT_TILE) + start % SHAPE.LOGIT_TILE) * (
        SHAPE.QUERIES // 2
    )


@triton.jit
def load_codes(logits_ptr, first_tile, start, end, pair, places, SHAPE: tl.constexpr):
    """Codes of a tile, in pairs: ``[TILE, pairs]``."""
    tile_ptr = locate_codes(logits_ptr, first_tile, start, SHAPE)
    end_pair = tl.where(start < end, SHAPE.KV_HEADS * (SHAPE.QUERIES // 2), 0)
    return tl.load(tile_ptr + places, mask=(pair < end_pair)[None, :], other=0)


@triton.jit
def discard_codes(
    logits_ptr, first_tile, start, SHAPE: tl.constexpr, KV_HEADS_PAD: tl.constexpr, TILE: tl.constexpr
):
    """Drop a tile's codes from the L2 cache: what has not been written to memory yet need not be."""
    pairs: tl.constexpr = SHAPE.QUERIES // 2
    line: tl.constexpr = 32  # pairs
    lines: tl.constexpr = TILE * pairs // line
    index = tl.arange(0, KV_HEADS_PAD * lines)
    kv_head = tl.minimum(index // lines, SHAPE.KV_HEADS - 1)
    tile_ptr = locate_codes(logits_ptr, first_tile, start, SHAPE)
    tl.inline_asm_elementwise(
        "discard.global.L2 [$1], 128; mov.b32 $0, 0;",
        "=r,l",
        [(tile_ptr + kv_head * (SHAPE.LOGIT_TILE * pairs) + index % lines * line).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
