"""Picture of the benchmark on real texts, made from its CSV and from nothing else.

    python -m benchmarks.accuracy.plot_real_text benchmarks/results/real_text_cpu.csv docs/real_text.svg

Over the share of tokens attended to, all layers counted: how many of the quoted and of the asked-for tokens
that full attention gets right are kept, and by how much the cross-entropy of prose rises; a row of panels per
context. Settings whose names differ in what follows their last comma alone, such as "calibrated, 512", are
one line. It shows the latest row of each document and setting that agrees with the latest row of all in
commit, model, weights, machine and seed. The same rows give the same SVG, byte for byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from benchmarks.lib.picture import COLOURS, STYLE, run, save, versions
from benchmarks.lib.rows import TextLoss
from benchmarks.lib.text_losses import FACTS, PROSE, QUOTES, Statistic, attended_share, kept, rise

LINE_COLOURS = (*COLOURS[1:], "#56b4e9", "#e69f00", "#30363d", "#8c564b")
PANELS = {
    QUOTES: ("quoted tokens kept", kept),
    FACTS: ("facts kept", kept),
    PROSE: ("rise on prose, nats a token", rise),
}


def choose(rows: Sequence[TextLoss], commit: str | None, shape: str | None) -> list[TextLoss]:
    """The latest row of each document, setting, family and place, out of those that may stand together."""
    wanted = [row for row in rows if commit in (None, row.commit) and shape in (None, row.shape)]

    def kind(row: TextLoss) -> tuple[str | int, ...]:
        return (row.commit, row.shape, row.weights, row.dtype, row.machine, row.seed)

    latest = [row for row in wanted if kind(row) == kind(wanted[-1])]
    return list(
        {
            (row.text, row.context, row.part, row.setting, row.family, row.place): row for row in latest
        }.values()
    )


def line_of(setting: str) -> str:
    """The line that a setting belongs to."""
    return setting.rpartition(", ")[0] or setting


def draw(rows: Sequence[TextLoss], path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix names the format."""
    contexts = sorted({row.context for row in rows})
    lines = list(dict.fromkeys(line_of(row.setting) for row in rows))
    colours = {line: LINE_COLOURS[index % len(LINE_COLOURS)] for index, line in enumerate(lines)}
    size = (4 * len(PANELS), 2.8 * len(contexts) + 1)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(contexts), len(PANELS), figsize=size, squeeze=False, sharex=True, layout="constrained"
        )
        for i, context in enumerate(contexts):
            for j, (family, (label, statistic)) in enumerate(PANELS.items()):
                axes = panels[i, j]
                for line, colour in colours.items():
                    points = _points(rows, context, family, line, statistic)
                    if points:
                        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4)
                axes.set_title(f"{label}, {context} tokens", loc="left")
                axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
                if family != PROSE:
                    axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        for axes in panels[-1]:
            axes.set_xlabel("tokens attended to, of all layers' context")
        entries = [Line2D([], [], color=colour, marker="o", label=line) for line, colour in colours.items()]
        figure.legend(handles=entries, loc="outside upper left", ncols=4, frameon=False)
        row = rows[-1]
        documents = len({(row.text, row.part) for row in rows})
        caption = f"{row.shape} ({row.weights}), {row.dtype}, {documents} documents of each context"
        figure.supxlabel(f"{caption} · {row.machine} · {versions(row)}", fontsize=7.5, color="#57606a")
        save(figure, path)


def _points(
    rows: Sequence[TextLoss], context: int, family: str, line: str, statistic: Statistic
) -> list[tuple[float, float]]:
    settings: dict[str, list[TextLoss]] = {}
    for row in rows:
        if (row.context, row.family) == (context, family) and line_of(row.setting) == line:
            settings.setdefault(row.setting, []).append(row)
    return sorted((attended_share(found), statistic(found)) for found in settings.values())


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    return run(argv, "real-text", TextLoss, choose, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
