"""What the pictures of all benchmarks share: their look, how they are saved, and the command line.

Importing it chooses matplotlib's backend without a display.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.csv_rows import Row, read_csv
from benchmarks.lib.rows import Run

TIMES = "\u00d7"
COLOURS = ("#8c96a3", "#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinct to colour-blind eyes
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "decode",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e3e6ea",
}

Group = TypeVar("Group", bound=Hashable)
Choose = Callable[[Sequence[Row], str | None, str | None], list[Row]]


def versions(row: Run) -> str:
    """With which versions something was measured, for a caption."""
    return (
        f"vLLM {row.vllm}, torch {row.torch}, vllm-delta {row.vllm_delta} · "
        f"commit {row.commit}, {row.date[:10]}"
    )


def grouped_bars(
    axes: Axes, groups: Mapping[Group, str], colours: Mapping[str, str]
) -> dict[tuple[Group, str], float]:
    """Label the groups on the x axis, and the arms in the legend; returns where each bar stands.

    Args:
        axes: that are for these bars alone.
        groups: their labels, in order.
        colours: of the arms, in order.
    """
    width = bar_width(colours)
    axes.set_xticks(range(len(groups)), list(groups.values()))
    axes.grid(False, axis="x")
    axes.tick_params(length=0)
    for arm, colour in colours.items():
        axes.bar([0], [0], color=colour, label=arm)  # the legend's entry
    return {
        (group, arm): i + (j - (len(colours) - 1) / 2) * width
        for i, group in enumerate(groups)
        for j, arm in enumerate(colours)
    }


def bar_width(arms: Collection[str]) -> float:
    """Leaves a gap between groups."""
    return 0.8 / max(2, len(arms))


def save(figure: Figure, path: Path) -> None:
    """Write the picture without a date, so that the same rows give the same bytes, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
    plt.close(figure)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `parser`, whose last file is the picture: `out`, an SVG or PNG."""
    parser.add_argument("out", type=Path, help="an .svg or .png file")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".svg", ".png"):
        parser.error("the picture's name must end in .svg or .png")
    return args


def run(
    argv: Sequence[str],
    benchmark: str,
    kind: type[Row],
    choose: Choose[Row],
    draw: Callable[[list[Row], Path], None],
) -> int:
    """Draw the picture that the command line asks for; returns the exit status.

    Args:
        argv: the command line.
        benchmark: its name, for the help.
        kind: of the CSV's rows.
        choose: from rows, a commit and a shape (None: any) to those that stand in one picture.
        draw: writes the picture of such rows.
    """
    parser = argparse.ArgumentParser(description=f"Picture of the {benchmark} benchmark, from its CSV.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--commit", help="as in the CSV; default: the latest row's")
    parser.add_argument("--shape", help="as in the CSV; default: the latest row's")
    args = parse(parser, argv)
    try:
        rows = choose(read_csv(args.csv, kind), args.commit, args.shape)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"no such rows in {args.csv}")
    draw(rows, args.out)
    return 0
