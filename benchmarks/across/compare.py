"""Two commits beside each other: their time in a benchmark, after their kernel tests.

    python benchmarks/compare.py main HEAD
    python benchmarks/compare.py v0.1.0 HEAD --rounds 3 -- --shapes tiny28 --cases 1x1k,4x16k
    python benchmarks/compare.py HEAD~1 HEAD --bench decode -- --shape tiny4 --cases 1x4k

Each commit gets a worktree of its own, where its extension is built and its kernel tests run; if one fails,
nothing is timed. Then both are measured in turn, A B A B ..., by their own scripts, with the options behind
``--``. What is not committed is not measured. A ratio is B's time / A's in the same round: below 1, B is
faster.

A row per case and round is appended to a CSV.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import RESULTS, ROOT
from benchmarks.across.commits import Values, checkout, resolve
from benchmarks.lib.base import BenchmarkError, Json
from benchmarks.lib.csv_rows import append_csv, check_header
from benchmarks.lib.processes import run_benchmark
from benchmarks.lib.provenance import describe_environment, find_machine
from benchmarks.lib.rows import Comparison
from benchmarks.lib.text import align

#: benchmarks, and the options that they get if none are given
BENCHES = {
    "kernels": ["--rounds", "1"],
    "decode": ["--rounds", "1"],
    "generate": [],
    "serve": [],
}
#: whose commits they are
REPOSITORY = ROOT
TABLE_HEAD = ("case", "metric", "A", "B", "B / A", "range")
LEFT_ALIGNED = ("case", "metric")


def compare(args: argparse.Namespace, folder: Path, rows: list[Comparison]) -> None:
    """Build, test and measure both commits; a round's rows are in the CSV, and in `rows`, at its end."""
    shared = describe_environment("benchmarks/compare.py") | {"machine": args.machine, "bench": args.bench}
    with contextlib.ExitStack() as stack, tqdm(total=4 + 2 * args.rounds, dynamic_ncols=True) as progress:
        both = []
        for side, name in zip("ab", (args.a, args.b), strict=True):
            both.append(stack.enter_context(checkout(REPOSITORY, name, folder / side)))
            progress.set_description(f"build {name}")
            both[-1].build()
            progress.update()
        for tree in both:
            progress.set_description(f"test {tree.name}")
            tree.test(gpu=args.platform == "cuda")
            progress.update()
        shared |= {"commit_a": both[0].commit, "commit_b": both[1].commit}
        for round_ in range(1, args.rounds + 1):
            values = []
            for tree in both:
                progress.set_description(f"round {round_}, {tree.name}")
                values.append(tree.measure(args.bench, args.options, args.csv_option, round_))
                progress.update()
            for row in to_rows(values, shared | {"round": round_}):
                rows.append(row)
                append_csv(args.csv, row)


def to_rows(values: Sequence[Values], shared: Json) -> list[Comparison]:
    """The cases that both commits have; raises BenchmarkError if there are none."""
    a, b = values
    both = [key for key in a if key in b]
    if not both:
        raise BenchmarkError(
            f"no case is the same at both commits; A has: {'; '.join(case for case, _ in a)}."
        )
    return [
        Comparison(case=case, metric=metric, value_a=a[case, metric], value_b=b[case, metric], **shared)
        for case, metric in both
    ]


def table(rows: Sequence[Comparison]) -> str:
    """Medians over the rounds, and the range of the ratios, as aligned text."""
    lines: list[tuple[str, ...]] = [TABLE_HEAD]
    for case, metric in dict.fromkeys((row.case, row.metric) for row in rows):
        own = [row for row in rows if (row.case, row.metric) == (case, metric)]
        ratios = [row.ratio for row in own]
        values = (median(row.value_a for row in own), median(row.value_b for row in own))
        numbers = (*(f"{value:.2f}" for value in values), f"{median(ratios):.3f}")
        lines.append((case, metric, *numbers, f"{min(ratios):.3f}-{max(ratios):.3f}"))
    return f"{align(lines, LEFT_ALIGNED)}\nMedians over rounds; B / A: below 1, B is faster."


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    own, options = list(argv), []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description="Time of two commits in a benchmark, after their kernel tests.",
        usage="%(prog)s [-h] [--bench NAME] [--rounds N] [--csv CSV] A B [-- OPTIONS]",
        epilog="OPTIONS go to the benchmark's script, as they are.",
    )
    parser.add_argument("a", metavar="A", help="a commit, such as main")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--bench", choices=BENCHES, default="kernels", help="(kernels)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each commit (5)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/compare_PLATFORM.csv")
    args = parser.parse_args(own)
    args.options = options or BENCHES[args.bench]
    args.platform, args.machine = find_machine()
    args.csv = args.csv or RESULTS / f"compare_{args.platform}.csv"
    # The GPU's kernel script of older commits has another name for it.
    args.csv_option = "--out" if (args.bench, args.platform) == ("kernels", "cuda") else "--csv"
    if args.rounds < 1:
        parser.error("needs at least one round")
    try:
        for name in (args.a, args.b):
            resolve(REPOSITORY, name)
        check_header(args.csv, Comparison)
    except (BenchmarkError, ValueError) as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str]) -> int:
    """Compare, and print the table; returns the exit status."""
    args = parse_arguments(argv)
    rows: list[Comparison] = []
    status = run_benchmark(lambda folder: compare(args, folder, rows), "compare")
    if rows:
        print(f"\n{args.bench} on {args.machine}; A: {rows[0].commit_a}, B: {rows[0].commit_b}")
        print(table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
