"""Entry point of ``vllm-delta``: which command, and how it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_delta.cli import calibrate

#: A command is a module with `add_parser`, which sets two defaults: `complete` checks the arguments, and
#: `run` returns the exit status.
_COMMANDS = (calibrate,)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="vllm-delta", description="Tools for DELTA, sparse decoding in vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    arguments.complete(arguments)
    return arguments


def main() -> None:
    """Entry point; ends the process."""
    arguments = parse_arguments(sys.argv[1:])
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"\nvllm-delta {arguments.command}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
