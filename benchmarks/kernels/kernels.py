"""Time of one attention layer, DELTA's kernels beside vLLM's: `kernels_gpu` on a GPU, else `kernels_cpu`.

    python benchmarks/kernels.py                   # appends to benchmarks/results/kernels_{cpu,gpu}.csv
    python benchmarks/kernels.py --query-tokens 8  # on a GPU: rows of several query tokens, writes nothing
    python benchmarks/kernels.py --tune            # on a GPU: tries settings of the kernel, writes nothing

The docstrings of these two say how a time is taken, and name the kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import RESULTS
from benchmarks.kernels.timing import Platform, Timing
from benchmarks.lib.base import Json
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import append_csv, check_header
from benchmarks.lib.provenance import describe_environment, find_machine
from benchmarks.lib.rows import KernelTime
from benchmarks.lib.text import align

TABLE_HEAD = ("shape", "case", "kernel", "us", "ratio", "GB/s", "of memory")
LEFT_ALIGNED = ("shape", "case", "kernel")


def platform_of(name: str) -> Platform:
    """The kernels of "cuda" or "cpu", which import vLLM."""
    if name == "cuda":
        from benchmarks.kernels import kernels_gpu

        return kernels_gpu
    from benchmarks.kernels import kernels_cpu

    return kernels_cpu


def to_row(timing: Timing, bandwidth: float, shared: Json) -> KernelTime:
    """The CSV row; `bandwidth` is the memory's, in bytes per second."""
    rate = timing.read_bytes / timing.microseconds / 1000
    return KernelTime(
        kernel=timing.kernel,
        microseconds=round(timing.microseconds, 2),
        ratio=round(timing.ratio, 4),
        gb_per_second=round(rate, 1),
        memory_gb_per_second=round(bandwidth / 1e9, 1),
        **shared,
    )


def table(rows: Sequence[KernelTime]) -> str:
    """The run as aligned text."""
    lines = [TABLE_HEAD]
    for row in rows:
        share = row.gb_per_second / row.memory_gb_per_second
        numbers = (f"{row.microseconds:.1f}", f"{row.ratio:.3f}", f"{row.gb_per_second:.1f}", f"{share:.0%}")
        lines.append((row.shape, str(row.case), row.kernel, *numbers))
    return align(lines, LEFT_ALIGNED)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Time of one attention layer, DELTA's kernels beside vLLM's.",
        epilog="The docstrings of kernels_cpu and kernels_gpu say what is measured and why so.",
    )
    parser.add_argument("--shapes", metavar="A,B", help="default: all of the platform's")
    parser.add_argument("--cases", metavar="BxC,...", help="batch x context, such as 1x1k,4x16384")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, help="(CPU: 7, GPU: 9)")
    parser.add_argument("--csv", "--out", type=Path, help="default: benchmarks/results/kernels_{cpu,gpu}.csv")
    parser.add_argument("--commit", help="what to record where the tree is not a git checkout")
    parser.add_argument("--query-tokens", type=int, default=1, metavar="N", help="of each row, on a GPU")
    parser.add_argument("--tune", action="store_true", help="on a GPU: try settings, write nothing")
    args = parser.parse_args(argv)
    name, args.machine = find_machine()
    args.platform = platform_of(name)
    args.csv = args.csv or RESULTS / f"kernels_{'gpu' if name == 'cuda' else name}.csv"
    args.rounds = args.rounds or args.platform.ROUNDS
    shapes, cases = args.shapes or ",".join(args.platform.SHAPES), args.cases or args.platform.CASES
    try:
        args.shapes = {shape: args.platform.SHAPES[shape] for shape in shapes.split(",")}
        args.cases = [Case.parse(text) for text in cases.split(",")]
        check_header(args.csv, KernelTime)
    except KeyError as error:
        parser.error(f"no shape {error}; there are {', '.join(args.platform.SHAPES)}")
    except ValueError as error:
        parser.error(str(error))
    if args.rounds < 1:
        parser.error("needs at least one round")
    if name != "cuda" and (args.tune or args.query_tokens != 1):
        parser.error("--tune and --query-tokens are about the GPU's kernels")
    if args.query_tokens < 1:
        parser.error("rows have at least one query token")
    if name == "cuda" and args.dtype != "bfloat16":
        parser.error("on a GPU, bfloat16 is measured")
    return args


def main(argv: Sequence[str]) -> int:
    """Measure all cases; every row is in the CSV as soon as it is there. Returns the exit status."""
    args = parse_arguments(argv)
    if args.tune:
        from benchmarks.kernels.tune import tune

        for heads in args.shapes.values():
            tune(heads, args.cases, args.query_tokens)
        return 0
    measure = args.platform.measure
    if args.query_tokens > 1:
        measure = partial(measure, query_len=args.query_tokens)
    shared = describe_environment("benchmarks/kernels.py") | {"machine": args.machine, "dtype": args.dtype}
    if args.commit:
        shared["commit"] = args.commit
    bandwidth = args.platform.prepare()
    rows = []
    for shape, case in tqdm([(s, c) for s in args.shapes for c in args.cases], unit="case"):
        where = shared | {"shape": shape, "batch": case.batch, "context": case.context}
        for timing in measure(case, args.shapes[shape], args.dtype, args.rounds):
            rows.append(to_row(timing, bandwidth, where))
            if args.query_tokens == 1:
                append_csv(args.csv, rows[-1])
    print(f"\n{args.machine}, {shared['cores']} cores, {args.dtype}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
