"""The command line that both accuracy benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.accuracy.servers import RunningServer
from benchmarks.accuracy.settings import expand, parse_layers, parse_numbers, parse_words
from benchmarks.lib.csv_rows import check_header
from benchmarks.lib.provenance import find_machine
from benchmarks.lib.rows import Run
from vllm_delta.cli.options import json_object

#: the dense backend, by platform
DENSE = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both accuracy benchmarks."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="that the servers load")
    model.add_argument("--url", help="of a server that runs already; asked as it is")
    parser.add_argument("--name", help="of the setting that --url has")
    parser.add_argument("--backends", metavar="A,B", type=parse_words, help="the dense one and DELTA")
    parser.add_argument("--concurrency", type=int, default=16, help="questions at a time per server (16)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="servers at a time, by Ray (1)")
    parser.add_argument("--timeout", type=float, default=14400, help="seconds to wait for an answer (14400)")
    add_sweep(parser)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The options of whatever compares DELTA's settings."""
    parser.add_argument("--settings", type=Path, metavar="FILE", help="JSON, or a calibration")
    parser.add_argument("--delta", metavar="JSON", type=json_object, default={}, help="settings of the sweep")
    parser.add_argument("--policies", metavar="A,B", type=parse_words, help="sweep of delta.policy")
    parser.add_argument("--budgets", metavar="N,N", type=parse_numbers, help="sweep of delta.budget_tokens")
    parser.add_argument("--page-sizes", metavar="N,N", type=parse_numbers, help="sweep of delta.page_size")
    parser.add_argument("--recent-tokens", metavar="N,N", type=parse_numbers, help="likewise")
    parser.add_argument("--sink-tokens", metavar="N,N", type=parse_numbers, help="likewise")
    parser.add_argument(
        "--selection-layers", metavar="I,J;K", type=parse_layers, help="sweep of delta.selection_layers"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/SCRIPT_PLATFORM.csv")
    parser.add_argument("--commit", help="what to record where the tree is not a git checkout")


def complete_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, kind: type[Run], script: str
) -> None:
    """Check what `add_arguments` added and fill in defaults; exits with a message if something is wrong.

    Adds `platform`, `machine`, `shape` (the model's name with `--url`) and `expanded` (the settings).
    """
    if min(args.concurrency, args.parallel, args.timeout) < 1 or args.seed < 0:
        parser.error("needs at least one question, server and second, and a seed of at least zero")
    try:
        args.platform, args.machine = find_machine()
        args.csv = args.csv or RESULTS / f"{script}_{args.platform}.csv"
        check_header(args.csv, kind)
        args.expanded = expand(args, DENSE[args.platform])
        args.shape = None
        if args.url:
            with RunningServer(args.url) as server:
                args.shape = Path(server.model).name
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
