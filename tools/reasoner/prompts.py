"""Write problems as prompts for ``vllm-delta calibrate``, one JSON object a line, all families in turn.

PYTHONPATH=tools python -m reasoner.prompts --length 8192 --problems 4 > prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from reasoner.problems import FAMILIES, make_problem


def make_prompts(length: int, problems: int, seed: int) -> Iterator[dict[str, list[int]]]:
    """So many prompts of every family, of problems of at most `length` tokens with their answers.

    Raises:
        ValueError: as `make_problem` does.
    """
    generators = {
        family: np.random.default_rng([seed, length, *b"prompts", *family.encode()]) for family in FAMILIES
    }
    for _ in range(problems):
        for family, generator in generators.items():
            yield {"prompt_token_ids": make_problem(family, length, generator).prompt.tolist()}


def main(argv: Sequence[str]) -> int:
    """Print the lines; returns the exit status."""
    parser = argparse.ArgumentParser(description="Problems as prompts for vllm-delta calibrate.")
    parser.add_argument("--length", type=int, default=8192, help="tokens of prompt and answer (8192)")
    parser.add_argument("--problems", type=int, default=4, help="of each family (4)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        for prompt in make_prompts(arguments.length, arguments.problems, arguments.seed):
            print(json.dumps(prompt))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
