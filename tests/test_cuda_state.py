"""How much memory the CUDA backend takes for logits, worked out on a machine without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_delta.gpu import ops
from vllm_delta.integration import cuda, cuda_state
from vllm_delta.plan import Plan, Role

GIB = 1 << 30
ROWS = 1024
TOTAL, FREE = 100 * GIB, 70 * GIB


@pytest.mark.parametrize(
    ("kv_cache_memory_bytes", "left"),
    [(None, 60 * GIB), (2 * GIB, 2 * GIB)],
    ids=["what the utilization leaves", "what is said to be the cache's"],
)
def test_logits_follow_the_memory_of_the_cache(monkeypatch, kv_cache_memory_bytes, left):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, TOTAL))
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1 << 20, dtype=torch.bfloat16),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes, gpu_memory_utilization=0.9),
    )
    impl = SimpleNamespace(num_heads=32, num_kv_heads=8, head_size=128, kv_cache_dtype="auto")
    layers = [SimpleNamespace(impl=impl)]
    tokens = cuda_state._logit_tokens(config, layers, ROWS, torch.device("cuda"))
    assert tokens * ops.LOGIT_BYTES * 32 == pytest.approx(cuda_state.LOGITS_SHARE * left, rel=1e-3)


def test_layers_know_whether_a_sparse_one_follows():
    roles = {
        1: Role.FULL,
        2: Role.SELECTION,
        5: Role.SPARSE,
        6: Role.SELECTION,
        7: Role.SELECTION,
        9: Role.SPARSE,
    }
    impls = {index: SimpleNamespace(precedes_sparse=False) for index in roles}
    layers = SimpleNamespace(
        eligible={index: SimpleNamespace(impl=impls[index]) for index in reversed(roles)},
        plan=Plan(roles, "settings"),
    )
    cuda_state._tell_order(layers)
    assert [index for index, impl in impls.items() if impl.precedes_sparse] == [2, 7]


@pytest.mark.parametrize("runs_full_layers", [False, True])
def test_which_layers_the_kernels_run(runs_full_layers):
    metadata = object.__new__(cuda.DeltaCUDAMetadata)
    metadata.runs_full_layers = runs_full_layers
    for chunks in ([], [("rows", "schedule")]):
        metadata.chunks = chunks
        assert metadata.has_rows_of(Role.SELECTION) is metadata.has_rows_of(Role.SPARSE) is bool(chunks)
        assert metadata.has_rows_of(Role.FULL) is (runs_full_layers and bool(chunks))
        assert not metadata.has_rows_of(None)
