"""One contract for the reference and all kernels: the same cases, the same check."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import Batch, Case, check
from gpu_batch import DTYPE
from implementations import IMPLEMENTATIONS

from vllm_delta.kernels.limits import CPU, GPU
from vllm_delta.method.rows import ALL_PAGES

MIXED = (1, 300, 0, 64, 65, 17, 129)

#: Sizes that all have: a cache in each platform's layout.
SHARED = {
    "mixed lengths": Case(MIXED),
    "one row": Case((500,), kept_pages=8),
    "one kv head per head": Case((130, 260), num_heads=3, num_kv_heads=3),
    "16 heads a kv head": Case((130, 260), num_heads=16, num_kv_heads=1),
    "7 heads a kv head": Case((130, 260), num_heads=14, num_kv_heads=2, head_size=128),
    "head size 96": Case((200, 77), head_size=96),
    "head size 256": Case((200, 77), head_size=256),
    "page 32 in 32": Case((400, 129), page_size=32, block_size=32, sink_pages=0),
    "page 16 in 64": Case((400, 129), block_size=64),
    "page 128": Case((900, 129), page_size=128, block_size=128),
    "recent only": Case((400,), recent_pages=4, sink_pages=0),
    "all of the budget is forced": Case((400,), recent_pages=2, sink_pages=2),
    "one page": Case((400, 16, 17), kept_pages=1, recent_pages=0, sink_pages=0),
    "soft cap": Case((200, 90), softcap=5.0),
    "sinks": Case((200, 90), sinks=True),
    "sinks and soft cap": Case((200, 90), sinks=True, softcap=5.0),
    "a row that keeps everything": Case((200, 150), kept_pages=(4, ALL_PAGES)),
    "a budget for each row": Case(MIXED, kept_pages=(2, 3, 4, ALL_PAGES, 5, 6, 7)),
    "a budget above every length": Case((200, 90), kept_pages=13),
    "pages behind the end": Case((200, 64, 65, 1), following_pages=3),
    "several query tokens": Case((300, 0, 64, 65, 17, 129), query_lens=(4, 1, 4, 2, 1, 3), recent_pages=2),
    "8 query tokens, 7 heads": Case(
        (400, 130, 90, 8), 14, 2, 128, query_lens=(8, 8, 8, 8), recent_pages=2, following_pages=2
    ),
    "16 query tokens": Case((400, 130, 16), 4, 1, query_lens=(16, 16, 16), kept_pages=5, recent_pages=2),
    "3 query tokens, sinks, soft cap": Case(
        (200, 90), query_lens=(3, 3), sinks=True, softcap=5.0, recent_pages=2
    ),
    "5 query tokens, a budget for each row": Case(
        (300, 200, 150), query_lens=(5, 5, 5), kept_pages=(4, ALL_PAGES, 6), recent_pages=2
    ),
}

CASES = {
    **{f"{name}, plain": replace(case, dtype=DTYPE) for name, case in SHARED.items()},
    **{
        f"{name}, vec": replace(case, layout="vec", block_size=max(32, case.block_size), dtype=torch.float32)
        for name, case in SHARED.items()
    },
    # a GPU's
    "float16": Case(MIXED),
    "head size 192": Case((200, 77), head_size=192, dtype=DTYPE),
    "page 1": Case((200, 64, 65), page_size=1, kept_pages=64, recent_pages=5, sink_pages=3, dtype=DTYPE),
    "page 8": Case((200, 64, 65), page_size=8, kept_pages=8, recent_pages=2, sink_pages=2, dtype=DTYPE),
    "fp8 cache": Case((200, 90), fp8=True, dtype=DTYPE),
    "fp8 cache, 8 query tokens": Case(
        (200, 90, 8), query_lens=(8, 8, 8), recent_pages=2, fp8=True, dtype=DTYPE
    ),
    "no room for logits": Case(MIXED, logit_tokens=0, dtype=DTYPE),
    "room for some logits": Case((300, 300, 300), logit_tokens=600, dtype=DTYPE),
    "no room, fp8, soft cap": Case((200, 90), fp8=True, softcap=5.0, logit_tokens=0, dtype=DTYPE),
    # a CPU's
    "vec, bfloat16": Case(MIXED, layout="vec", block_size=128, dtype=torch.bfloat16),
    "vec, float16, page 128": Case((900, 129), page_size=128, layout="vec", block_size=128),
    "vec, 28 heads": Case((700, 90), 28, 4, 128, 32, 128, layout="vec"),
    "vec, head size 512": Case((700, 90), 20, 2, 512, 32, 32, layout="vec", dtype=torch.bfloat16),
    "vec16, head size 80": Case((700, 90), 6, 6, 80, 16, 16, layout="vec16", dtype=torch.float32),
    "vec16, head size 112": Case((700, 90), 6, 3, 112, 64, 128, layout="vec16", dtype=torch.bfloat16),
    "vec16, block of 48": Case((700, 90), 5, 1, 80, 16, 48, layout="vec16"),
    "amx": Case(MIXED, 8, 2, 64, 16, 128, layout="amx", dtype=torch.bfloat16),
    "amx, block of 32": Case((700, 90), 3, 1, 96, 32, 32, layout="amx", dtype=torch.bfloat16),
    "amx, float16": Case((700, 90), 12, 4, 128, 64, 64, layout="amx"),
    "vec, 8 query tokens, 3 heads": Case(
        (1500, 513, 512, 40),
        9,
        3,
        64,
        16,
        128,
        6,
        2,
        query_lens=(8, 8, 4, 2),
        layout="vec",
        dtype=torch.bfloat16,
    ),
    "vec, 5 query tokens, 7 heads": Case(
        (700, 515, 90), 28, 4, 128, 32, 128, query_lens=(5, 5, 5), following_pages=2, layout="vec"
    ),
    "vec16, 16 query tokens": Case(
        (1100, 520, 16), 6, 6, 80, 16, 48, 7, 2, query_lens=(16, 16, 16), layout="vec16", dtype=torch.float32
    ),
    "amx, 8 query tokens, 4 heads": Case(
        (1030, 517, 8), 8, 2, 64, 16, 128, 5, 2, query_lens=(8, 8, 8), layout="amx", dtype=torch.bfloat16
    ),
    "amx, float16, 3 query tokens": Case(
        (700, 514, 90), 12, 4, 128, 64, 64, query_lens=(3, 3, 2), following_pages=1, layout="amx"
    ),
    "long": Case((1, 512, 513, 1500, 2100), layout="vec", block_size=128, dtype=torch.float32, kept_pages=40),
}


@pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=pytest.mark.triton) if name == "triton" else name for name in IMPLEMENTATIONS],
)
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, implementation: str) -> None:
    case, under_test = CASES[name], IMPLEMENTATIONS[implementation]
    if not under_test.supports(case):
        return  # not skipped: `test_every_limit_has_a_case` says what has to be there
    batch = Batch.random(case)
    check(batch, under_test.run(batch), under_test.precision)


def test_every_limit_has_a_case() -> None:
    """What a platform says it supports is in the table, and every implementation has its part of it."""
    for name, under_test in IMPLEMENTATIONS.items():
        assert sum(under_test.supports(case) for case in CASES.values()) >= len(SHARED), name
    for limits, implementation in ((CPU, "cpp"), (GPU, "triton")):
        of_platform = [case for case in CASES.values() if IMPLEMENTATIONS[implementation].supports(case)]
        assert {case.page_size for case in of_platform} == set(limits.page_sizes) - (
            {64} if limits is GPU else set()
        )
        assert {case.layout for case in of_platform} == set(limits.layouts)
        assert max(case.head_size for case in of_platform) == limits.largest_head_size
