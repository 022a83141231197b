"""The reasoner's problems as tasks of lm-evaluation-harness: to test the way there, and to compare both ways.

    python -m benchmarks.accuracy.lm_eval_reasoner build/tasks --lengths 4096 --problems 50
    python benchmarks/accuracy.py lm-eval --model build/reasoner --include-path build/tasks \
        --tasks reasoner_chase_4096,reasoner_trace_4096

Writes one task per family and length, ``reasoner_FAMILY_LENGTH``: a YAML and, beside it, the problems that
`accuracy.py` asks with the same seed. The metric is exact_match, white space aside. Every answer gets the
tokens that the longest of its task needs, for which the model needs positions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from reasoner import vocabulary
from reasoner.problems import FAMILIES

from benchmarks.accuracy.problems import SLACK, problem_of


def write_task(folder: Path, family: str, length: int, problems: int, seed: int) -> str:
    """Write one task; returns its name. Raises ValueError as `make_problem` does."""
    name = f"reasoner_{family}_{length}"
    made = [problem_of(family, length, seed, index) for index in range(problems)]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    with data.open("w") as file:
        for problem in made:
            line = {"prompt": vocabulary.decode(problem.prompt), "answer": vocabulary.decode(problem.answer)}
            file.write(json.dumps(line) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [],
            "temperature": 0.0,
            "max_gen_toks": max(len(problem.answer) for problem in made) + SLACK,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [r"\s+"],
            }
        ],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1) + "\n")  # which is YAML
    return name


def main(argv: Sequence[str]) -> int:
    """Write the tasks, and print their names; returns the exit status."""
    parser = argparse.ArgumentParser(description="The reasoner's problems as tasks of lm-evaluation-harness.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"({','.join(FAMILIES)})")
    parser.add_argument("--lengths", default="4096", help="tokens of a problem with its answer (4096)")
    parser.add_argument("--problems", type=int, default=50, help="of each family and length (50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for family, length in product(args.families.split(","), map(int, args.lengths.split(","))):
            print(write_task(args.folder, family, length, args.problems, args.seed))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
