"""Time of one attention layer on a GPU: DELTA's kernels beside FlashAttention 3, on a cache of random tokens.

Every kernel is captured into a CUDA graph that calls it on several caches in turn, so that no call finds its
keys and values in the GPU's cache, and the graph's replay is timed. The kernels of a case alternate; a time
is the median over the rounds. While DELTA's kernels run, a part of the second-level cache is set aside, as
in a server, and none while FlashAttention's do. GB/s are the bytes of keys and values that are read, beside
what a copy within the device's memory moves (bytes read plus bytes written).

- fa3: what vLLM's FLASH_ATTN runs in every layer, with its scheduling done ahead, as in vLLM
- fa3_compact: FlashAttention 3 over a block table of the kept pages alone
- full: a full layer of few rows, which DELTA's kernel runs
- selection_attention, scores, select: the parts of a selection layer; selection: all of them
- sparse: a sparse layer

Each row has one query token or, as where drafts are verified, several.
"""

from __future__ import annotations

from statistics import median

import torch

from benchmarks.kernels.gpu_layers import Layers
from benchmarks.kernels.graphs import captured, time_graphs
from benchmarks.kernels.timing import Heads, Timing
from benchmarks.lib.cases import Case
from vllm_delta.kernels.gpu import l2
from vllm_delta.kernels.gpu.shape import LayerShape

SHAPES: dict[str, Heads] = {
    "qwen2.5-1.5b": (12, 2, 128),
    "qwen2.5-7b": (28, 4, 128),
    "qwen3-8b": (32, 8, 128),
}
CASES = "1x1k,1x32k,8x32k,32x2k,32x32k,64x16k,4x128k"
ROUNDS = 9


def prepare() -> float:
    """Bytes per second of a large copy within the device's memory, read and written."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)

    def run(_: int) -> None:
        torch.add(source, 1, out=target)

    times = time_graphs({"copy": captured(run, 1)}, 5)
    return 2 * source.nbytes / times["copy"] * 1e6


def measure(case: Case, heads: Heads, dtype: str, rounds: int, query_len: int = 1) -> list[Timing]:
    """All kernels, in bfloat16 whatever `dtype` says, for rows of `query_len` query tokens."""
    shape = LayerShape(*heads)
    layers = Layers.make(case, shape, query_len)
    runs = {
        "fa3": layers.fa3(compact=False),
        "fa3_compact": layers.fa3(compact=True),
        "full": layers.run_full,
        # Scores drop the logits that they have read: the select kernel comes behind whole layers' scores.
        "selection": layers.run_selection,
        "select": layers.run_select,
        "sparse": layers.run_sparse,
        "selection_attention": layers.run_selection_attention,
        "scores": layers.run_scores,
    }
    graphs = {name: captured(run, len(layers.caches)) for name, run in runs.items()}
    dense = {name: graphs[name] for name in ("fa3", "fa3_compact")}
    delta = {name: graph for name, graph in graphs.items() if name not in dense}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for some, share in ((dense, 0.0), (delta, l2.SHARE)):
            l2.set_aside_l2(torch.device("cuda"), share)
            for name, time in time_graphs(some, 1).items():
                samples[name].append(time)
    times = {name: median(values) for name, values in samples.items()}
    token_bytes = case.batch * shape.num_kv_heads * shape.head_size * 4
    kept = min(case.context, layers.config.budget_tokens)
    tokens = {"scores": 0, "select": 0, "sparse": kept, "fa3_compact": kept}
    return [
        Timing(name, time, time / times["fa3"], token_bytes * tokens.get(name, case.context))
        for name, time in times.items()
    ]
