"""Time of one attention layer on a GPU: DELTA's kernels beside FlashAttention 3, on a cache of random tokens.

    python benchmarks/kernels.py                       # appends to benchmarks/results/kernels_gpu.csv
    python benchmarks/kernels.py --tune                # tries settings, writes nothing

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
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

from benchmarks import ROOT
from benchmarks.lib.cases import Case
from benchmarks.lib.provenance import describe_environment, find_machine
from vllm_delta.kernels.gpu import l2, ops, tuning
from vllm_delta.kernels.gpu.attention import attend
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.schedule import Schedule, make_schedule
from vllm_delta.kernels.gpu.select import select_pages
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.kernels.gpu.tuning import Tuning
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.rows import DecodeRows

#: query heads, KV heads, head size
SHAPES = {"qwen2.5-1.5b": (12, 2, 128), "qwen2.5-7b": (28, 4, 128), "qwen3-8b": (32, 8, 128)}
CASES = "1x1k,1x32k,8x32k,32x2k,32x32k,64x16k,4x128k"
BLOCK = 16
#: of keys and values that the calls of a graph go round in, several times the GPU's cache
ROTATED_BYTES = 2**29
#: vLLM's bound in CUDA graphs
FA3_SPLITS = 32


@dataclass
class Layers:
    """Several layers' caches with the same batch, and DELTA's buffers for them."""

    case: Case
    shape: LayerShape
    queries: list[Tensor]
    caches: list[Tensor]
    block_table: Tensor
    rows: DecodeRows
    config: DeltaConfig
    workspace: Workspace
    schedule: Schedule
    table: SelectionTable
    compact_table: Tensor

    @classmethod
    def make(cls, case: Case, shape: LayerShape) -> Layers:
        """Random caches and queries, and a selection made from them."""
        config = DeltaConfig()
        batch, context = case.batch, case.context
        token_bytes = shape.num_kv_heads * shape.head_size * 4
        kept_bytes = batch * min(context, config.budget_tokens) * token_bytes
        copies = min(64, max(2, -(-ROTATED_BYTES // kept_bytes)))
        blocks_per_row = -(-context // BLOCK)
        copies = min(copies, max(2, 20 * 2**30 // (batch * context * token_bytes)))
        size = (batch * blocks_per_row, shape.num_kv_heads, BLOCK, 2 * shape.head_size)
        device = "cuda"
        caches = [torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        queries = [
            torch.randn(batch, shape.num_heads, shape.head_size, dtype=torch.bfloat16, device=device)
            for _ in range(copies)
        ]
        block_table = torch.randperm(size[0], device=device).view(batch, -1).int()
        index = torch.arange(batch, dtype=torch.int32, device=device)
        kept_pages = torch.full_like(index, config.budget_pages)
        rows = DecodeRows(index, index, torch.full_like(index, context), kept_pages)
        workspace = Workspace.allocate(
            {shape},
            max_rows=batch,
            max_length=context,
            page_size=config.page_size,
            logit_tokens=batch * blocks_per_row * BLOCK,
            device=device,
        )
        layers = cls(
            case,
            shape,
            queries,
            caches,
            block_table,
            rows,
            config,
            workspace,
            Schedule.allocate(batch, shape.num_kv_heads, device),
            SelectionTable.allocate(batch, config.budget_pages, device, frames=True),
            torch.empty(0),
        )
        layers.plan()
        layers.run_selection(0)
        layers.compact_table = block_table
        if blocks_per_row > config.budget_pages:  # else rows keep everything, and the table has no entries
            layers.compact_table = torch.gather(block_table, 1, layers.table.pages.long())
        return layers

    def plan(self) -> None:
        """Make the schedule, which depends on the tuning."""
        counters = torch.zeros(5, dtype=torch.int64, device="cuda")
        make_schedule(self.schedule, self.rows, self.shape, 2, self.workspace, self.config.rule, counters, 0)
        self.counters = counters
        self.output = torch.zeros_like(self.queries[0])  # a launch between the schedule's and the layer's
        self.parameters = AttentionParameters(self.shape.head_size**-0.5, dtype=torch.bfloat16)

    def _inputs(self, copy: int) -> LayerInputs:
        return LayerInputs(
            self.queries[copy],
            self.caches[copy],
            self.block_table,
            self.rows,
            self.schedule,
            self.parameters,
            self.config.rule,
        )

    def _arguments(self, copy: int) -> tuple[LayerInputs, Workspace, Tensor, Tensor]:
        return self._inputs(copy), self.workspace, self.counters, self.output

    def run_full(self, copy: int) -> None:
        """A full layer."""
        ops.full_attention(*self._arguments(copy))

    def run_selection(self, copy: int) -> None:
        """A selection layer."""
        ops.selection_attention(*self._arguments(copy), self.table)

    def run_selection_attention(self, copy: int) -> None:
        """Its attention."""
        attend(*self._arguments(copy), keeps_logits=True, dependent=True)

    def run_scores(self, copy: int) -> None:
        """Its page scores."""
        ops.page_scores(self._inputs(copy), self.workspace)

    def run_select(self, copy: int) -> None:
        """Its selection."""
        workspace = self.workspace
        select_pages(
            workspace.scores,
            workspace.listed,
            self.rows,
            self.block_table,
            BLOCK,
            self.config.rule,
            self.table,
        )

    def run_sparse(self, copy: int) -> None:
        """A sparse layer."""
        ops.sparse_attention(*self._arguments(copy), self.table, same_blocks=True)

    def fa3(self, *, compact: bool) -> Callable[[int], None]:
        """FlashAttention 3 as vLLM calls it in a CUDA graph."""
        batch, device = self.case.batch, "cuda"
        block_table = self.compact_table if compact else self.block_table
        length = min(self.case.context, self.config.budget_tokens) if compact else self.case.context
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        size = self.shape.head_size
        metadata = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=length,
            num_heads_q=self.shape.num_heads,
            num_heads_kv=self.shape.num_kv_heads,
            headdim=size,
            cache_seqlens=lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=BLOCK,
            causal=True,
            num_splits=FA3_SPLITS,
        )

        def run(copy: int) -> None:
            keys, values = self.caches[copy].transpose(1, 2).chunk(2, dim=-1)
            flash_attn_varlen_func(
                q=self.queries[copy],
                k=keys,
                v=values,
                out=self.output,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lengths,
                max_seqlen_k=length,
                softmax_scale=self.parameters.scale,
                causal=True,
                block_table=block_table,
                scheduler_metadata=metadata,
                fa_version=3,
                num_splits=FA3_SPLITS,
            )

        return run


def captured(run: Callable[[int], None], copies: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that calls `run` on every copy, a few times round."""
    calls = list(range(copies)) * max(1, 16 // copies)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in calls:
            run(copy)
    return graph, len(calls)


def time_graphs(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Median microseconds per call; the graphs alternate."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for index in range(rounds + 1):
        for name, (graph, calls) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if index:
                samples[name].append(start.elapsed_time(end) * 1000 / calls)
    return {name: median(times) for name, times in samples.items()}


def copy_bandwidth() -> float:
    """GB/s of a large copy within the device's memory."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)

    def run(_: int) -> None:
        torch.add(source, 1, out=target)

    times = time_graphs({"copy": captured(run, 1)}, 5)
    return 2 * source.nbytes / times["copy"] / 1000


def measure(case: Case, shape: LayerShape, rounds: int) -> dict[str, tuple[float, float]]:
    """Microseconds and bytes read of each kernel."""
    layers = Layers.make(case, shape)
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
    return {name: (time, token_bytes * tokens.get(name, case.context)) for name, time in times.items()}


def tune(shape: LayerShape) -> None:
    """Try settings of the attention kernel; print the best of each case."""
    grid = itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 6), (1, 2, 3, 4, 6))
    candidates = [Tuning(*values) for values in grid if values[0] * values[2] <= 512]
    l2.set_aside_l2(torch.device("cuda"))
    all_layers = [Layers.make(case, shape) for case in map(Case.parse, CASES.split(","))]
    for sparse in (True, False):
        for layers in all_layers:
            results = []
            for candidate in candidates:
                if not sparse and candidate.tile * candidate.num_stages > 384:
                    continue
                table = (tuning.Rule(candidate, key_bytes=1024),)
                name = "_SPARSE" if sparse else "_SELECTION"
                with mock.patch.object(tuning, name, table):
                    layers.schedule = Schedule.allocate(layers.case.batch, shape.num_kv_heads, "cuda")
                    layers.workspace = Workspace.allocate(
                        {shape},
                        max_rows=layers.case.batch,
                        max_length=layers.case.context,
                        page_size=layers.config.page_size,
                        logit_tokens=layers.case.batch * -(-layers.case.context // 128) * 128,
                        device="cuda",
                    )
                    layers.plan()
                    run = layers.run_sparse if sparse else layers.run_selection_attention
                    try:
                        graph = captured(run, len(layers.caches))
                        time = time_graphs({"": graph}, 5)[""]
                    except Exception as error:  # too much shared memory
                        print(candidate, type(error).__name__)
                        torch.cuda.synchronize()
                        continue
                results.append((time, candidate))
            results.sort(key=lambda result: result[0])
            print("sparse" if sparse else "selection", layers.case, flush=True)
            for time, candidate in results[:6]:
                print(
                    f"   {time:8.1f} us  tile {candidate.tile} warps {candidate.num_warps} "
                    f"stages {candidate.num_stages} programs {candidate.programs}"
                )


def main(argv: Sequence[str]) -> int:
    """Measure, print, append to the CSV; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", help="where the repository is not at hand")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels_gpu.csv")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; benchmarks/kernels_cpu.py measures on the CPU")
    if arguments.tune:
        for name in arguments.shapes.split(","):
            tune(LayerShape(*SHAPES[name]))
        return 0
    environment = describe_environment("benchmarks/kernels.py") | {"machine": find_machine()[1]}
    if arguments.commit:
        environment["commit"] = arguments.commit
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth:.0f} GB/s")
    rows = []
    for name in arguments.shapes.split(","):
        for case in map(Case.parse, arguments.cases.split(",")):
            results = measure(case, LayerShape(*SHAPES[name]), arguments.rounds)
            for kernel, (time, read) in results.items():
                rate = read / time / 1000
                rows.append(
                    environment
                    | {
                        "shape": name,
                        "batch": case.batch,
                        "context": case.context,
                        "kernel": kernel,
                        "us": round(time, 2),
                        "gb_per_s": round(rate),
                        "copy_gb_per_s": round(bandwidth),
                        "ratio_to_fa3": round(time / results["fa3"][0], 4),
                    }
                )
            print(f"{name} {case}: " + ", ".join(f"{k} {t:.1f}" for k, (t, _) in results.items()), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    is_new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
