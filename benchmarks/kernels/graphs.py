"""CUDA graphs of calls, and the time of their replay."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch


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
