"""Picture of the serving benchmark, made from its CSV and from nothing else.

    python -m benchmarks.speed.plot_serve benchmarks/results/serve_cuda.csv docs/serve_cuda.svg

Left: generated tokens per second over the request rate, one bar per backend. Right: the median time per
output token, with a line up to the 99th percentile. The rows are those that agree with the latest in
commit, shape, machine and sizes; `--commit` and `--shape` choose others. The same rows give the same SVG,
byte for byte.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.lib.base import DELTA
from benchmarks.lib.picture import COLOURS, STYLE, TIMES, bar_width, grouped_bars, run, save, versions
from benchmarks.lib.rows import Serving


def choose(rows: Sequence[Serving], commit: str | None, shape: str | None) -> list[Serving]:
    """The latest row of each arm and rate, out of those that may stand in one picture; DELTA last."""
    wanted = [row for row in rows if commit in (None, row.commit) and shape in (None, row.shape)]

    def kind(row: Serving) -> tuple[str | int, ...]:
        sizes = (row.prompts, row.input, row.output)
        return (row.commit, row.shape, row.dtype, row.machine, row.cores, *sizes)

    latest = {(row.arm, row.request_rate): row for row in wanted if kind(row) == kind(wanted[-1])}
    return sorted(latest.values(), key=lambda row: (row.backend.startswith(DELTA), row.request_rate))


def caption(row: Serving) -> str:
    """What was measured, on what, with which versions."""
    what = f"{row.shape} shape, {row.dtype}, random weights"
    return f"{what} · {row.machine}, {row.cores} cores\n{versions(row)}"


def draw_bars(
    axes: Axes, rows: Sequence[Serving], colours: dict[str, str], value: Callable[[Serving], float]
) -> dict[tuple[float, str], float]:
    """One bar of `value` per row; returns where those of each rate and arm stand."""
    rates = sorted({row.request_rate for row in rows})
    labels = {rate: "all at once" if math.isinf(rate) else f"{rate:g} a second" for rate in rates}
    places = grouped_bars(axes, labels, colours)
    for row in rows:
        place = places[row.request_rate, row.arm]
        axes.bar(place, value(row), bar_width(colours), color=colours[row.arm])
    return places


def draw_throughput(axes: Axes, rows: Sequence[Serving], colours: dict[str, str]) -> None:
    """Tokens per second, with their ratio to the baseline's, and the legend of the whole picture."""
    first = rows[0]
    places = draw_bars(axes, rows, colours, lambda row: row.output_throughput)
    for row, dense in compared(rows):
        gain = row.output_throughput / dense.output_throughput
        write_gain(axes, places[row.request_rate, row.arm], row.output_throughput, gain)
    axes.set_title("generated tokens per second", loc="left")
    axes.set_xlabel(f"{first.prompts} requests, {first.input} tokens in, {first.output} out")
    axes.legend(frameon=False, loc="upper left")


def draw_latency(axes: Axes, rows: Sequence[Serving], colours: dict[str, str]) -> None:
    """Time per output token, with the ratio of the baseline's median to it."""
    places = draw_bars(axes, rows, colours, lambda row: row.median_tpot_ms)
    for row in rows:
        place = places[row.request_rate, row.arm]
        axes.vlines(place, row.median_tpot_ms, row.p99_tpot_ms, color="#57606a", linewidth=1.5)
    for row, dense in compared(rows):
        gain = dense.median_tpot_ms / row.median_tpot_ms
        write_gain(axes, places[row.request_rate, row.arm], row.p99_tpot_ms, gain)
    axes.set_title("time per output token, ms", loc="left")
    axes.set_xlabel("bars: median; lines: up to the 99th percentile")


def compared(rows: Sequence[Serving]) -> list[tuple[Serving, Serving]]:
    """Rows with the baseline's of the same rate, which is the first arm."""
    baseline = {row.request_rate: row for row in rows if row.arm == rows[0].arm}
    others = [row for row in rows if row.arm != rows[0].arm and row.request_rate in baseline]
    return [(row, baseline[row.request_rate]) for row in others]


def write_gain(axes: Axes, place: float, top: float, gain: float) -> None:
    """Write a ratio above a bar."""
    axes.text(place, top, f"{gain:.2f}{TIMES}", ha="center", va="bottom", fontsize=9)


def draw(rows: Sequence[Serving], path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix names the format."""
    arms = dict.fromkeys(row.arm for row in rows)
    colours = dict(zip(arms, itertools.cycle(COLOURS), strict=False))
    with plt.rc_context(STYLE):
        figure, (throughput, latency) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
        draw_throughput(throughput, rows, colours)
        draw_latency(latency, rows, colours)
        figure.supxlabel(caption(rows[0]), fontsize=7.5, color="#57606a")
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    return run(argv, "serving", Serving, choose, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
