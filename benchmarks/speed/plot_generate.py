"""Picture of the generation benchmark, made from its CSV and from nothing else.

    python -m benchmarks.speed.plot_generate benchmarks/results/generate_cuda.csv docs/generate_cuda.svg

The time of a step over the position in the output, one line per backend, with the total time in the
legend. Of every backend it shows the latest row that agrees with the latest row of all in commit, shape,
machine and sizes; `--commit` and `--shape` choose others. The same rows give the same SVG, byte for byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.lib.base import DELTA
from benchmarks.lib.picture import COLOURS, STYLE, TIMES, run, save, versions
from benchmarks.lib.rows import Generation


def choose(rows: Sequence[Generation], commit: str | None, shape: str | None) -> list[Generation]:
    """The latest row of each arm, out of those that may stand in one picture; DELTA last."""
    wanted = [
        row
        for row in rows
        if row.part == "generate" and commit in (None, row.commit) and shape in (None, row.shape)
    ]

    def kind(row: Generation) -> tuple[str | int | None, ...]:
        sizes = (row.requests, row.prompt, row.output, row.bin_tokens)
        return (row.commit, row.shape, row.dtype, row.kv_cache_dtype, row.machine, row.cores, *sizes)

    latest = {row.arm: row for row in wanted if kind(row) == kind(wanted[-1])}
    return sorted(latest.values(), key=lambda row: row.backend.startswith(DELTA))


def caption(row: Generation) -> str:
    """What was measured, on what, with which versions."""
    return (
        f"{row.shape} shape, {row.dtype}, random weights, prompts of {row.prompt} tokens · "
        f"{row.machine}, {row.cores} cores\n{versions(row)}"
    )


def draw(rows: Sequence[Generation], path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix names the format."""
    first = rows[0]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for row, colour in zip(rows, COLOURS, strict=False):
            width = row.bin_tokens
            assert width is not None
            ends = [min((i + 1) * width, row.output) for i in range(len(row.samples))]
            middles = [(i * width + end) / 2 for i, end in enumerate(ends)]
            seconds = row.milliseconds / 1000
            gain = "" if row is first else f", {first.milliseconds / row.milliseconds:.2f}{TIMES}"
            axes.plot(
                middles, row.samples, color=colour, linewidth=2, label=f"{row.arm}: {seconds:.0f} s{gain}"
            )
        axes.set_title(f"time of a decode step, ms, {first.requests} requests", loc="left")
        axes.set_xlabel("position in the output, tokens")
        axes.set_xlim(0, first.output)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="best", title="all outputs")
        figure.supxlabel(caption(first), fontsize=7.5, color="#57606a")
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    return run(argv, "generation", Generation, choose, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
