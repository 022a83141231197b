"""The command line of the speed benchmarks, and the columns of a row that come from it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.lib.base import DELTA, Json
from benchmarks.lib.csv_rows import check_header
from benchmarks.lib.models import SHAPES
from benchmarks.lib.provenance import describe_environment, find_machine, git_commit
from benchmarks.lib.rows import Run
from vllm_delta.method.config import DeltaConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that runs vLLM."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, help="the default depends on the platform")
    model.add_argument("--model", metavar="PATH", help="a model folder, instead of a shape")
    parser.add_argument("--backends", metavar="A,B", help="the first is the baseline")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--delta", metavar="JSON", type=json.loads, default={}, help="settings")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/SCRIPT_PLATFORM.csv")
    parser.add_argument("--commit", help="what to record where the tree is not a git checkout")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks whose workers hold an engine."""
    parser.add_argument("--kv-cache-dtype", default="auto", help="as in vLLM, such as fp8 (auto)")
    parser.add_argument(
        "--engine", metavar="JSON", type=json.loads, default={}, help="more arguments of vllm.LLM"
    )


def complete_arguments(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    kind: type[Run],
    script: str,
    defaults: Mapping[str, Mapping[str, str]],
) -> None:
    """Check what `add_arguments` and `add_engine_arguments` added, and fill in the platform's defaults.

    Adds `platform`, `machine` and `budget_tokens`; exits with a message if something is wrong.
    """
    try:
        args.platform, args.machine = find_machine()
    except RuntimeError as error:
        parser.error(str(error))
    for name, value in defaults[args.platform].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.csv = args.csv or RESULTS / f"{script}_{args.platform}.csv"
    try:
        args.budget_tokens = DeltaConfig.from_additional_config({"delta": args.delta}).budget_tokens
        check_header(args.csv, kind)
    except ValueError as error:  # DeltaConfigError is one
        parser.error(str(error))
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"{args.model} is no folder with a config.json")
    if not isinstance(getattr(args, "engine", {}), dict):
        parser.error("--engine takes a JSON object")


def describe_run(args: argparse.Namespace, script: str) -> Json:
    """The columns of `Run` that all rows of this run share; `script` as `describe_environment` takes it."""
    return describe_environment(script) | {
        "commit": args.commit or git_commit(),
        "machine": args.machine,
        "shape": Path(args.model).name if args.model else args.shape,
        "dtype": args.dtype,
    }


def describe_arm(args: argparse.Namespace, arm: str) -> Json:
    """The columns of `Run` that distinguish an arm from others."""
    settings = args.delta if arm.partition("#")[0] == DELTA else {}
    return {"backend": arm, "settings": json.dumps(settings, sort_keys=True)}
