"""Reading sequences out of the paged cache, in every layout, against how the kernels' tests pack it."""

from __future__ import annotations

import pytest
import torch
from cpu_cache import pack

from vllm_delta.method import reference
from vllm_delta.plain.cache import read_sequence


@pytest.mark.parametrize("layout", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("length", [1, 32, 75])
def test_what_was_packed_is_read(layout, length):
    torch.manual_seed(0)
    block_size, heads, size = 32, 2, 64
    keys, values = torch.randn(2, length, heads, size).bfloat16().unbind()
    blocks = torch.tensor([5, 2, 7], dtype=torch.int32)
    token = torch.arange(length)
    slots = blocks[token // block_size] * block_size + token % block_size
    cache = pack(keys, values, slots, 9, block_size, layout)
    read = read_sequence(cache, blocks, length, layout)
    for part, expected in zip(read, (keys, values), strict=True):
        assert torch.equal(part, expected.float())


def test_plain_layout_is_that_of_the_reference():
    cache = torch.randn(6, 2, 16, 2 * 32)
    blocks = torch.tensor([4, 0, 3])
    expected = reference.gather_sequence(cache, blocks, 41)
    for part, other in zip(read_sequence(cache, blocks, 41), expected, strict=True):
        assert torch.equal(part, other)


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="one of plain, vec, vec16, amx, not 'vsx'"):
        read_sequence(torch.zeros(1, 1, 16, 32), torch.zeros(1, dtype=torch.int32), 1, "vsx")
