"""Settings of the GPU's attention kernel, tried out: what `vllm_delta.kernels.gpu.tuning` was made from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from unittest import mock

import torch

from benchmarks.kernels.gpu_layers import Layers
from benchmarks.kernels.graphs import captured, time_graphs
from benchmarks.kernels.timing import Heads
from benchmarks.lib.cases import Case
from vllm_delta.kernels.gpu import l2, tuning
from vllm_delta.kernels.gpu.schedule import Schedule
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.kernels.gpu.tuning import Tuning
from vllm_delta.kernels.gpu.workspace import Workspace


def tune(heads: Heads, cases: Sequence[Case], query_len: int = 1) -> None:
    """Try settings of the attention kernel; print the best of each case, for sparse and selection layers."""
    shape = LayerShape(*heads)
    grid = itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 6), (1, 2, 3, 4, 6))
    candidates = [Tuning(*values) for values in grid if values[0] * values[2] <= 512]
    small = [candidate for candidate in candidates if candidate.tile * candidate.num_stages <= 384]
    l2.set_aside_l2(torch.device("cuda"))
    all_layers = [Layers.make(case, shape, query_len) for case in cases]
    for sparse, tried in ((True, candidates), (False, small)):
        for layers in all_layers:
            results = []
            for candidate in tried:
                if (time := time_candidate(layers, candidate, sparse=sparse)) is not None:
                    results.append((time, candidate))
            print("sparse" if sparse else "selection", layers.case, flush=True)
            for time, candidate in sorted(results, key=lambda result: result[0])[:6]:
                print(
                    f"   {time:8.1f} us  tile {candidate.tile} warps {candidate.num_warps} "
                    f"stages {candidate.num_stages} programs {candidate.programs}"
                )


def time_candidate(layers: Layers, candidate: Tuning, *, sparse: bool) -> float | None:
    """Microseconds of the kernel with these settings; None, with a printed reason, if it does not run."""
    case, shape, query_len = layers.case, layers.shape, layers.rows.max_query_len
    rules = (tuning.Rule(candidate, key_bytes=1024),)
    table = ("_MULTI_TOKEN" if query_len > 1 else "") + ("_SPARSE" if sparse else "_SELECTION")
    with mock.patch.object(tuning, table, rules):
        layers.schedule = Schedule.allocate(case.batch, shape.num_kv_heads, "cuda")
        layers.workspace = Workspace.allocate(
            {shape},
            max_rows=case.batch,
            max_length=case.context,
            page_size=layers.config.page_size,
            logit_tokens=case.batch * -(-case.context // 128) * 128,
            device="cuda",
            max_query_len=query_len,
        )
        layers.plan()
        run = layers.run_sparse if sparse else layers.run_selection_attention
        try:
            return time_graphs({"": captured(run, len(layers.caches))}, 5)[""]
        except Exception as error:  # too much shared memory
            print(candidate, type(error).__name__)
            torch.cuda.synchronize()
            return None
