"""Picture of the accuracy benchmark, made from its CSV and from nothing else.

    python -m benchmarks.accuracy.plot_accuracy benchmarks/results/accuracy_cuda.csv docs/accuracy.svg

Accuracy over the share of the context that was attended to, all layers counted, with 95% confidence
intervals: a panel per family, in a row per length. Settings of DELTA that differ in their budget alone are
one line, and the marks on it show the budget; a dense backend is a dashed line with its interval. Of every
setting it shows the latest row that agrees with the latest row of all in commit, model, weights, machine,
way, seed and number of problems; `--commit` and `--shape` choose others. The same rows give the same SVG,
byte for byte.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from benchmarks.accuracy.settings import label
from benchmarks.lib.picture import COLOURS, STYLE, run, save, versions
from benchmarks.lib.rows import Accuracy
from vllm_delta.method.config import DeltaConfig

LINE_COLOURS = (
    *COLOURS[1:],
    *("#56b4e9", "#e69f00", "#30363d", "#8c564b", "#bcbd22", "#7b5ea7", "#8b949e"),
)
MARKERS = "osD^vP"


def choose(rows: Sequence[Accuracy], commit: str | None, shape: str | None) -> list[Accuracy]:
    """The latest row of each setting, family and length, out of those that may stand in one picture."""
    wanted = [row for row in rows if commit in (None, row.commit) and shape in (None, row.shape)]

    def kind(row: Accuracy) -> tuple[str | int, ...]:
        return (row.commit, row.shape, row.weights, row.dtype, row.machine, row.seed, row.problems, row.way)

    kept = [row for row in wanted if kind(row) == kind(wanted[-1])]
    return list({(row.arm, row.setting, row.family, row.length): row for row in kept}.values())


def series_names(rows: Sequence[Accuracy]) -> dict[str, str]:
    """The line that settings, as JSON, belong to: what differs between them, the budget aside."""
    parsed = {row.settings: json.loads(row.settings) for row in rows if row.attended_share is not None}

    def varies(key: str) -> bool:
        return len({json.dumps(settings.get(key)) for settings in parsed.values()}) > 1

    names = {}
    for text, settings in parsed.items():
        shown = {key: value for key, value in settings.items() if key != "budget_tokens" and varies(key)}
        names[text] = label({"policy": settings.get("policy", "delta"), **shown})
    return names


def budget_of(row: Accuracy) -> int:
    """Of DELTA, in tokens."""
    budget: int = json.loads(row.settings).get("budget_tokens", DeltaConfig.budget_tokens)
    return budget


def share(row: Accuracy) -> float:
    """What a setting attended to; all of the context without counters."""
    return 1.0 if row.attended_share is None else row.attended_share


def draw_panel(
    axes: Axes,
    rows: Sequence[Accuracy],
    names: Mapping[str, str],
    colours: Mapping[str, str],
    marks: Mapping[int, str],
) -> None:
    """Accuracy over attended share of one family and length."""
    lines: dict[str, list[Accuracy]] = {}
    for row in rows:
        if row.attended_share is None:
            colour = colours[row.setting]
            axes.axhspan(row.accuracy_low, row.accuracy_high, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(row.accuracy, color=colour, linestyle="--")
        else:
            lines.setdefault(names[row.settings], []).append(row)
    for name, line in lines.items():
        points = sorted(line, key=share)
        x = [share(row) for row in points]
        y = [row.accuracy for row in points]
        below = [max(0.0, row.accuracy - row.accuracy_low) for row in points]
        above = [max(0.0, row.accuracy_high - row.accuracy) for row in points]
        axes.errorbar(x, y, [below, above], color=colours[name], capsize=3, linewidth=1.5)
        for row in points:
            axes.plot(share(row), row.accuracy, color=colours[name], marker=marks[budget_of(row)])
    axes.set_title(f"{rows[0].family}, {rows[0].length} tokens", loc="left")


def legend(
    figure: Figure, colours: Mapping[str, str], marks: Mapping[int, str], dense: Collection[str]
) -> None:
    """Lines by colour, budgets by mark, above the panels."""
    entries = [
        Line2D([], [], color=colour, linestyle="--" if name in dense else "-", label=name)
        for name, colour in colours.items()
    ]
    entries += [
        Line2D([], [], color="#30363d", marker=mark, linestyle="", label=f"budget {budget}")
        for budget, mark in marks.items()
    ]
    figure.legend(handles=entries, loc="outside upper left", ncols=5, frameon=False)


def caption(row: Accuracy) -> str:
    """What was measured, on what, with which versions."""
    return (
        f"{row.shape} ({row.weights}), {row.dtype}, {row.problems} problems each, seed {row.seed}, greedy; "
        f"intervals: 95% · {row.machine} · {versions(row)}"
    )


def draw(rows: Sequence[Accuracy], path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix names the format."""
    families = list(dict.fromkeys(row.family for row in rows))
    lengths = sorted({row.length for row in rows})
    names = series_names(rows)
    dense = list(dict.fromkeys(row.setting for row in rows if row.attended_share is None))
    lines = list(dict.fromkeys(names.values()))
    colours = {name: COLOURS[0] for name in dense}
    colours |= {name: LINE_COLOURS[i % len(LINE_COLOURS)] for i, name in enumerate(lines)}
    budgets = sorted({budget_of(row) for row in rows if row.attended_share is not None})
    marks = {budget: MARKERS[i % len(MARKERS)] for i, budget in enumerate(budgets)}
    size = (4 * len(families), 3 * len(lengths) + 1)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(lengths),
            len(families),
            figsize=size,
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        for i, length in enumerate(lengths):
            for j, family in enumerate(families):
                if here := [row for row in rows if (row.family, row.length) == (family, length)]:
                    draw_panel(panels[i, j], here, names, colours, marks)
        panels[0, 0].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panels[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panels[0, 0].set_ylim(-0.04, 1.04)
        for axes in panels[-1]:
            axes.set_xlabel("tokens attended to, of all layers' context")
        for axes in panels[:, 0]:
            axes.set_ylabel("exact answers")
        legend(figure, colours, marks, dense)
        figure.supxlabel(caption(rows[-1]), fontsize=7.5, color="#57606a")
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    return run(argv, "accuracy", Accuracy, choose, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
