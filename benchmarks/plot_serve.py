"""Picture of the serving benchmark, made from its CSV and from nothing else.

    python benchmarks/plot_serve.py benchmarks/results/serve_cuda.csv docs/serve_cuda.svg

Left: generated tokens per second over the request rate, one bar per backend. Right: the median time per
output token, with a line up to the 99th percentile. The rows are those that agree with the latest in
commit, shape, machine and sizes; `--commit` and `--shape` choose others. The same rows give the same SVG,
byte for byte.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from common import Serving
from engine import DELTA
from picture import COLOURS, STYLE, TIMES, run, save, versions

#: of the distance between rates, what its bars take together
GROUP_WIDTH = 0.8


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


def draw(rows: Sequence[Serving], path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix names the format."""
    first = rows[0]
    rates = sorted({row.request_rate for row in rows})
    arms = list(dict.fromkeys(row.arm for row in rows))
    width = GROUP_WIDTH / len(arms)
    places = {
        (arm, rate): group + (index - (len(arms) - 1) / 2) * width
        for group, rate in enumerate(rates)
        for index, arm in enumerate(arms)
    }
    baseline = {row.request_rate: row for row in rows if row.arm == arms[0]}
    with plt.rc_context(STYLE):
        figure, (throughput, latency) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
        for arm, colour in zip(arms, COLOURS, strict=False):
            own = [row for row in rows if row.arm == arm]
            x = [places[arm, row.request_rate] for row in own]
            throughput.bar(x, [row.output_throughput for row in own], width, color=colour, label=arm)
            medians = [row.median_tpot_ms for row in own]
            latency.bar(x, medians, width, color=colour, label=arm)
            latency.vlines(x, medians, [row.p99_tpot_ms for row in own], color="#57606a", linewidth=1.5)
            for place, row in zip(x, own, strict=True):
                dense = baseline.get(row.request_rate)
                if dense is not None and arm != arms[0]:
                    for axes, value, gain in (
                        (throughput, row.output_throughput, row.output_throughput / dense.output_throughput),
                        (latency, row.p99_tpot_ms, dense.median_tpot_ms / row.median_tpot_ms),
                    ):
                        axes.text(place, value, f"{gain:.2f}{TIMES}", ha="center", va="bottom", fontsize=9)
        names = ["all at once" if math.isinf(rate) else f"{rate:g} a second" for rate in rates]
        for axes, title in (
            (throughput, "generated tokens per second"),
            (latency, "time per output token, ms"),
        ):
            axes.set_title(title, loc="left")
            axes.set_xticks(range(len(rates)), names)
            axes.grid(visible=False, axis="x")
        throughput.set_xlabel(f"{first.prompts} requests, {first.input} tokens in, {first.output} out")
        latency.set_xlabel("bars: median; lines: up to the 99th percentile")
        throughput.legend(frameon=False, loc="upper left")
        figure.supxlabel(caption(first), fontsize=7.5, color="#57606a")
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    return run(argv, "serving", Serving, choose, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
