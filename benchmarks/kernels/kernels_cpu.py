"""Time of one attention layer: DELTA's CPU kernels beside vLLM's own, on a full cache of random tokens.

For each case (batch x context) and shape, the four ways to run a layer alternate, and the fastest of a few
calls counts in each round: what disturbs a call only ever makes it slower. The ratio is the median over the
rounds of time / vLLM's time in the same round. GB/s are the bytes of keys and values that a layer reads,
beside what a plain read of memory reaches here with the same threads. Calls go round between several
sequences, as a model's layers do, so that no call finds its keys and values in the processor's cache.

- dense: vLLM's operator, what CPU_ATTN runs in every layer
- full, selection, sparse: DELTA's layers; a selection layer computes attention, scores and the selection
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from benchmarks.kernels.timing import Heads, Timing
from benchmarks.lib.cases import Case
from vllm_delta.kernels.cpu import ops
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.rows import DecodeRows

SHAPES: dict[str, Heads] = {
    "tiny28": (8, 2, 64),
    "qwen2.5-7b": (28, 4, 128),
    "qwen3-8b": (32, 8, 128),
    "mha": (8, 8, 64),
}
CASES = "1x1k,1x16k,4x16k,4x32k"
ROUNDS = 7
#: tokens of a KV block in vLLM's default, and where DELTA chooses it; with vLLM's names of the layouts
DENSE_BLOCK, DENSE_LAYOUT = 128, "vec"
DELTA_BLOCK, DELTA_LAYOUT = 16, "vec16"
#: of keys and values that calls go round in: several times a processor's cache
ROTATED_BYTES = 2**28


def layers(case: Case, heads: Heads, dtype: torch.dtype) -> dict[str, tuple[Callable[[], None], int]]:
    """The ways to run one layer, by name, each with the tokens of a sequence that it reads."""
    num_heads, num_kv_heads, head_size = heads
    config = DeltaConfig()
    tokens = -(-case.context // DENSE_BLOCK) * DENSE_BLOCK
    copies = -(-ROTATED_BYTES // (case.batch * tokens * num_kv_heads * 2 * head_size * dtype.itemsize))
    # One memory for both: random numbers are as good in one layout as in another.
    memory = torch.randn(copies * case.batch * tokens, num_kv_heads, 2 * head_size, dtype=dtype)
    keys, values = memory.view(-1, num_kv_heads, 2 * DENSE_BLOCK, head_size).chunk(2, dim=2)
    cache = memory.view(-1, num_kv_heads, DELTA_BLOCK, 2 * head_size)

    def block_tables(block_size: int) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(memory) // block_size).int()
        return itertools.cycle(order.view(copies, case.batch, tokens // block_size))

    dense_tables, delta_tables = block_tables(DENSE_BLOCK), block_tables(DELTA_BLOCK)
    query = torch.randn(case.batch, num_heads, head_size).to(dtype)
    output = torch.empty_like(query)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32)
    starts = torch.arange(case.batch + 1, dtype=torch.int32)
    scale = head_size**-0.5

    schedule = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=DENSE_LAYOUT,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )

    def dense() -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=next(dense_tables),
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    rows = DecodeRows(starts[:-1], starts[:-1], lengths, torch.full_like(lengths, config.budget_pages))
    table = SelectionTable.allocate(case.batch, config.budget_pages)
    workspace = ops.allocate_workspace(case.context, num_heads, head_size)
    counters = torch.zeros(3, dtype=torch.int64)
    parameters = AttentionParameters(scale, layout=DELTA_LAYOUT)
    scratch = workspace, counters, output

    def delta(function: Callable[..., None], *more: Any) -> Callable[[], None]:
        return lambda: function(query, cache, next(delta_tables), rows, parameters, *more)

    full = delta(ops.full_attention, *scratch)
    selection = delta(ops.selection_attention, config.rule, *scratch, table)
    sparse = delta(ops.sparse_attention, config.rule, *scratch, table)
    selection()  # writes the table that `sparse` reads
    kept = min(case.context, config.budget_tokens)
    return {
        "dense": (dense, case.context),
        "full": (full, case.context),
        "selection": (selection, case.context),
        "sparse": (sparse, kept),
    }


def fastest(call: Callable[[], None], calls: int) -> float:
    """Seconds of the fastest of `calls` calls, after one to warm up."""
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def prepare() -> float:
    """Load the kernels; returns bytes per second of a plain read of memory, with torch's threads."""
    current_platform.import_kernels()
    ops.load_library()
    data = torch.ones(2**28)
    return data.nbytes / fastest(lambda: data.sum(), calls=10)  # type: ignore[arg-type]


def measure(case: Case, heads: Heads, dtype: str, rounds: int) -> list[Timing]:
    """The ways to run the layer."""
    _, num_kv_heads, head_size = heads
    torch_dtype: torch.dtype = getattr(torch, dtype)
    ways = layers(case, heads, torch_dtype)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (call, _) in ways.items():
            times[name].append(fastest(call, calls=10))
    token_bytes = 2 * case.batch * num_kv_heads * head_size * torch_dtype.itemsize
    timings = []
    for name, (_, tokens) in ways.items():
        ratios = [own / dense for own, dense in zip(times[name], times["dense"], strict=True)]
        timings.append(Timing(name, median(times[name]) * 1e6, median(ratios), token_bytes * tokens))
    return timings
