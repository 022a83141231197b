"""The tables of what the speed benchmarks measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from benchmarks.across.query import (
    MODELS,
    Query,
    ReportError,
    grouped,
    markdown,
    percent,
    provenance,
    ratio,
    span,
    times,
)
from benchmarks.lib.base import DELTA
from benchmarks.lib.cases import KIBI, Case
from benchmarks.lib.rows import Generation, Measurement, Serving
from benchmarks.speed.summary import Summary, summarise


def decode(query: Query) -> list[str]:
    """Time of a decode step; `short` has two backends, and one share of attended tokens."""
    rows = query.rows(Measurement)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    dense = [rows[-1].baseline]
    if not query.short:
        dense = list(dict.fromkeys([*dense, *(row.arm for row in rows if row.backend != DELTA)]))
    summaries = {(shape, s.case, s.arm): s for shape in shapes for s in summarise(_of(rows, shape))}
    found = [
        (shape, case, [summaries[shape, case, arm] for arm in (*dense, DELTA)])
        for shape, case, arm in summaries
        if arm == DELTA and all((shape, case, other) in summaries for other in dense)
    ]
    if not found:
        raise ReportError(f"table {query.name}: no case has all backends")
    lines = []
    for (_, case, several), name in zip(found, grouped([MODELS.get(f[0], f[0]) for f in found]), strict=True):
        cells = _short_cells(several) if query.short else _long_cells(several, rows)
        lines.append([name] * (len(shapes) > 1) + [times(case), *cells])
    unit = "ms per step" if query.short else "ms"
    head = ["model's shape"] * (len(shapes) > 1) + ["sequences x context"]
    head += [f"{backend}, {unit}" for backend in dense]
    if query.short:
        return markdown([*head, f"{DELTA}, {unit}", "speed-up", "tokens attended"], lines)
    head += [f"{DELTA}, {unit} (range)", "speed-up (range of rounds)", "attended, all layers"]
    return markdown([*head, "in sparse layers", "peak memory"], lines) + provenance(rows, query.name)


def _of(rows: Sequence[Measurement], shape: str) -> list[Measurement]:
    return [row for row in rows if row.shape == shape]


def _short_cells(several: Sequence[Summary]) -> list[str]:
    delta = several[-1]
    gain = delta.speedup or several[0].ms_per_step / delta.ms_per_step
    return [*(f"{s.ms_per_step:.2f}" for s in several), ratio(gain), percent(delta.attended_share, 0)]


def _long_cells(several: Sequence[Summary], rows: Sequence[Measurement]) -> list[str]:
    delta = several[-1]
    samples = [
        float(text)
        for row in rows
        if (row.case, row.arm) == (delta.case, delta.arm)
        for text in row.samples_ms.split()
    ]
    *milliseconds, gain, _ = _short_cells(several)
    milliseconds[-1] += f" ({span(min(samples), max(samples))})"
    if delta.rounds > 1:
        gain += f" ({min(delta.speedups):.2f} to {max(delta.speedups):.2f})"
    memory = [s.peak_memory_bytes / 2**30 for s in several if s.peak_memory_bytes is not None]
    return [
        *(*milliseconds, gain, percent(delta.attended_share), percent(delta.sparse_share)),
        span(min(memory), max(memory), "{:.1f}") + " GiB" if memory else "-",
    ]


def generate(query: Query) -> list[str]:
    """A whole generation, the first token of a long prompt, steps after a real prefill."""
    rows = query.rows(Generation)
    parts: dict[str, dict[str, Generation]] = {}
    for row in rows:
        parts.setdefault(row.part, {})[row.backend] = row
    dense = rows[0].backend
    lines = []
    for part, cells in (("generate", _whole), ("ttft", _first), ("prefill", _step)):
        if part in parts:
            both = parts[part][dense], parts[part][DELTA]
            lines += cells(*both)
    return markdown(["", dense, DELTA, ""], lines) + provenance(rows, query.name)


def _whole(dense: Generation, delta: Generation) -> list[list[str]]:
    def both(name: str, cell: Callable[[Generation], str], gain: float) -> list[str]:
        return [name, cell(dense), cell(delta), ratio(gain)]

    width = dense.bin_tokens or 1
    lines = [
        both(
            f"all outputs, {dense.requests} of {dense.output:,} tokens",
            lambda row: f"{row.milliseconds / 1000:.1f} s, {row.tokens_per_second:,.0f} tokens/s",
            dense.milliseconds / delta.milliseconds,
        )
    ]
    last = len(dense.samples) - 1
    for index in dict.fromkeys((0, min(3, last), last // 2, last)):
        name = f"a step, tokens {index * width + 1:,} to {min((index + 1) * width, dense.output):,}"
        gain = dense.samples[index] / delta.samples[index]
        lines.append(both(name, lambda row, i=index: f"{row.samples[i]:.2f} ms", gain))  # type: ignore[misc]
    return lines


def _first(dense: Generation, delta: Generation) -> list[list[str]]:
    name = f"first token of a prompt of {dense.prompt // KIBI}k"
    cells = [f"{row.milliseconds:.0f} ms" for row in (dense, delta)]
    return [[name, *cells, ratio(dense.milliseconds / delta.milliseconds)]]


def _step(dense: Generation, delta: Generation) -> list[list[str]]:
    name = f"a step of {times(Case(dense.requests, dense.prompt))}, after a real prefill (range)"
    cells = [
        f"{row.milliseconds:.2f} ms ({span(min(row.samples), max(row.samples))})" for row in (dense, delta)
    ]
    return [[name, *cells, ratio(dense.milliseconds / delta.milliseconds)]]


def serve(query: Query) -> list[str]:
    """Throughput and latency of a server, by request rate."""
    rows = query.rows(Serving)
    by_arm = {(row.request_rate, row.backend): row for row in rows}
    dense = rows[0].backend
    lines = []
    for rate in sorted({row.request_rate for row in rows}, reverse=True):
        both = by_arm[rate, dense], by_arm[rate, DELTA]
        name = "all at once" if math.isinf(rate) else f"{rate:g} a second"
        throughput = [row.output_throughput for row in both]
        lines += [
            _line(name, "generated tokens/s", [f"{rate:.0f}" for rate in throughput], throughput[::-1]),
            _latencies("time per output token, median and 99th percentile, ms", both, "tpot", "{:.1f}"),
            _latencies("between tokens, median and 99th percentile, ms", both, "itl", "{:.1f}"),
            _latencies("time to first token, median and 99th percentile, ms", both, "ttft", "{:.0f}"),
        ]
    return markdown(["requests", "", dense, DELTA, "of medians"], lines) + provenance(rows, query.name)


def _line(rate: str, name: str, cells: Sequence[str], compared: Sequence[float]) -> list[str]:
    """The cells of one metric; the ratio of what is compared is DELTA's gain if it is above 1."""
    dense, delta = compared
    return [rate, name, *cells, ratio(dense / delta)]


def _latencies(name: str, both: Sequence[Serving], metric: str, text: str) -> list[str]:
    medians = [getattr(row, f"median_{metric}_ms") for row in both]
    last = [getattr(row, f"p99_{metric}_ms") for row in both]
    cells = [f"{text.format(a)}, {text.format(b)}" for a, b in zip(medians, last, strict=True)]
    return _line("", name, cells, medians)
