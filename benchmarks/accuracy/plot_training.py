"""Picture of a reasoner's training, made from its logs and from nothing else.

    python -m benchmarks.accuracy.plot_training benchmarks/results/train_12_layers_seed_0.csv training.svg
    python -m benchmarks.accuracy.plot_training first.csv second.csv training.svg   # in two parts

How long each family's problems are by then, the share of wrong tokens, and the loss, over the tokens seen.
Where the second log's training started from the first one's model, they are one after another. The same logs
give the same SVG, byte for byte.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.lib.picture import COLOURS, STYLE, parse, save

Log = dict[str, list[float]]
#: least share of wrong tokens, and loss, that is drawn; a batch has some 20,000 answer tokens
FLOOR = 1e-5


def read_logs(paths: Sequence[Path]) -> Log:
    """All columns, one log after another; raises ValueError if one is none of a training."""
    columns: Log = {}
    seen = 0.0
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"tokens", "loss"} <= rows[0].keys():
            raise ValueError(f"{path} is no log of a training")
        for row in rows:
            for name, value in row.items():
                columns.setdefault(name, []).append(float(value) + (seen if name == "tokens" else 0))
        seen = columns["tokens"][-1]
    return columns


def draw(log: Log, path: Path) -> None:
    """Write the picture to `path`; its suffix names the format."""
    families = [name.removeprefix("length_") for name in log if name.startswith("length_")]
    millions = [tokens / 1e6 for tokens in log["tokens"]]
    with plt.rc_context(STYLE):
        figure, (lengths, wrong, loss) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
        for family, colour in zip(families, COLOURS[1:], strict=False):
            shares = [max(FLOOR, 1 - right) for right in log[f"right_{family}"]]
            lengths.plot(millions, log[f"length_{family}"], color=colour, linewidth=2, label=family)
            wrong.plot(millions, shares, color=colour, linewidth=0.8, label=family)
        loss.plot(millions, [max(FLOOR, value) for value in log["loss"]], color=COLOURS[1], linewidth=0.8)
        for axes, title in (
            (lengths, "tokens of the longest problems"),
            (wrong, "wrong tokens"),
            (loss, "loss, nats"),
        ):
            axes.set_yscale("log")
            axes.set_title(title, loc="left")
            axes.set_xlim(0, millions[-1])
        lengths.set_yscale("log", base=2)
        lengths.legend(frameon=False)
        figure.supxlabel("tokens seen, millions", fontsize=10)
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Draw the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description="Picture of a reasoner's training, from its logs.")
    parser.add_argument("logs", type=Path, nargs="+", help="CSV files, in the order of the training's parts")
    arguments = parse(parser, argv)
    try:
        log = read_logs(arguments.logs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    draw(log, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
