"""Picture of the decode benchmark, made from its CSV and from nothing else.

    python -m benchmarks.speed.plot_decode benchmarks/results/decode_cpu.csv docs/decode_cpu.svg

Left: ms per decode step, per case and backend. Right: speed-up over the baseline, with its range
over the rounds. By default the rows are those of the latest row's commit, shape, dtype and machine;
`--commit` and `--shape` choose others. The same rows give the same SVG, byte for byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.lib.cases import Case
from benchmarks.lib.picture import COLOURS, STYLE, TIMES, bar_width, grouped_bars, run, save, versions
from benchmarks.lib.rows import Measurement
from benchmarks.speed.summary import Summary, summarise


def choose(rows: Sequence[Measurement], commit: str | None, shape: str | None) -> list[Measurement]:
    """Rows that may stand in one picture: one commit, shape, dtype (and cache), machine and baseline."""
    wanted = [r for r in rows if commit in (None, r.commit) and shape in (None, r.shape)]
    if not wanted:
        return []

    def kind(row: Measurement) -> tuple[str | int, ...]:
        return (row.commit, row.shape, row.dtype, row.kv_cache_dtype, row.machine, row.cores, row.baseline)

    return [row for row in wanted if kind(row) == kind(wanted[-1])]


def places_of(
    axes: Axes, summaries: Sequence[Summary], arms: Sequence[str], colours: dict[str, str]
) -> dict[tuple[Case, str], float]:
    """Where the bar of each case and arm stands."""
    labels = {summary.case: str(summary.case).replace("x", f" {TIMES} ") for summary in summaries}
    axes.set_xlabel(f"sequences {TIMES} context tokens")
    return grouped_bars(axes, labels, {arm: colours[arm] for arm in arms})


def draw_times(axes: Axes, summaries: Sequence[Summary], colours: dict[str, str]) -> None:
    """Bars of ms per step, and the legend of the whole picture."""
    arms = list(dict.fromkeys(summary.arm for summary in summaries))
    places = places_of(axes, summaries, arms, colours)
    for s in summaries:
        bar = axes.bar(places[s.case, s.arm], s.ms_per_step, bar_width(arms) * 0.94, color=colours[s.arm])
        axes.bar_label(bar, [f"{s.ms_per_step:.{0 if s.ms_per_step >= 100 else 1}f}"], padding=2, fontsize=8)
    axes.set_title("time of a decode step, ms", loc="left")
    axes.legend(frameon=False, loc="upper left")
    axes.margins(y=0.1)


def draw_speedups(axes: Axes, summaries: Sequence[Summary], colours: dict[str, str]) -> None:
    """Bars of the speed-up over the baseline, and a line at 1."""
    compared = [summary for summary in summaries if summary.speedups]
    arms = list(dict.fromkeys(summary.arm for summary in compared))
    places = places_of(axes, compared, arms, colours)
    for s in compared:
        value = s.speedup
        assert value is not None
        place = places[s.case, s.arm]
        axes.bar(place, value, bar_width(arms) * 0.94, color=colours[s.arm])
        low, high = min(s.speedups), max(s.speedups)
        axes.errorbar(place, value, [[value - low], [high - value]], color="#30363d", capsize=3)
        axes.annotate(f"{value:.2f}{TIMES}", (place, high), (0, 5), textcoords="offset points", ha="center")
    axes.axhline(1, color="#30363d", linewidth=1, linestyle="--")
    axes.set_title("speed-up (line: range over rounds)", loc="left")
    axes.margins(y=0.12)


def caption(rows: Sequence[Measurement]) -> str:
    """What was measured, on what, with which versions."""
    last = rows[-1]
    rounds = len({(row.date, row.round) for row in rows})
    return (
        f"{last.shape} shape, {last.dtype}, random weights, median of {rounds} round{'s' * (rounds > 1)} · "
        f"{last.machine}, {last.cores} cores · {versions(last)}"
    )


def draw(rows: Sequence[Measurement], path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix names the format."""
    summaries = summarise(rows)
    arms = list(dict.fromkeys(summary.arm for summary in summaries))
    arms.sort(key=lambda arm: arm != rows[-1].baseline)
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}
    compared = any(summary.speedups for summary in summaries)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 1 + compared, figsize=(5.5 * (1 + compared), 4), squeeze=False, layout="constrained"
        )
        draw_times(panels[0, 0], summaries, colours)
        if compared:
            draw_speedups(panels[0, 1], summaries, colours)
        figure.supxlabel(caption(rows), fontsize=7.5, color="#57606a")
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    return run(argv, "decode", Measurement, choose, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
