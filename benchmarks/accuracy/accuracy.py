"""Accuracy of long answers under dense attention and under DELTA's settings, by the reasoner's problems.

    python benchmarks/accuracy.py --model build/reasoner --lengths 4096,8192 --budgets 256,512,1024
    python benchmarks/accuracy.py --model build/reasoner --settings settings.json --parallel 8
    python benchmarks/accuracy.py --url http://localhost:8000 --name tuned --backends DELTA
    python benchmarks/accuracy.py lm-eval --help         # real checkpoints, by lm-evaluation-harness

Every setting answers the same problems of `tools/reasoner`, greedily, through the OpenAI completions API of a
server of its own; with `--forced`, one engine judges right answers under all settings (`forced.py`).
An answer is a chain of steps, each of which needs something from far back; it is exact if all of it is right.
Settings come from a file, from options that multiply out, or both; DELTA's keys go to the server as they are.
Options that are not known here go to `vllm serve`, of all settings.

Each answer's outcome is written to a JSONL file as soon as it is there, and is not asked for again by a later
run of the same setting, model and problem. A CSV row per setting, family and length is written when its last
answer is there; `plot_accuracy.py` turns the rows into a picture. DELTA's counters have to show that its
sparse layers were at work, or there is no row. A setting that fails does not stop the others; the benchmark
then ends with an error.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean, median

from reasoner.problems import FAMILIES
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.accuracy.jobs import raise_errors, run_jobs
from benchmarks.accuracy.options import add_arguments, complete_arguments
from benchmarks.accuracy.problems import (
    Outcomes,
    ask_all,
    fingerprint,
    longest_decode,
    problem_of,
    question_of,
    wilson,
)
from benchmarks.accuracy.servers import activity, server_jobs
from benchmarks.accuracy.settings import Setting
from benchmarks.lib.base import BenchmarkError, Json
from benchmarks.lib.csv_rows import append_csv, read_csv
from benchmarks.lib.models import POSITIONS, SPARE_POSITIONS, read_config
from benchmarks.lib.options import describe_run
from benchmarks.lib.processes import run_benchmark
from benchmarks.lib.rows import Accuracy
from benchmarks.lib.text import align
from vllm_delta.cli.options import json_object

TABLE_HEAD = (
    *("setting", "family", "length", "problems", "accuracy", "95%", "right steps", "first wrong"),
    *("attended", "lost", "won", "tokens", "s"),
)
LEFT_ALIGNED = ("setting", "family")
#: columns that outcomes bring along, since an earlier run may have asked
PROVENANCE = ("commit", "machine", "vllm", "torch", "vllm_delta")
#: columns in which a row may differ from one that is made of the same outcomes
UNMEASURED = ("date", "command")


class Sweep:
    """One run: its questions, what it knows of their outcomes, and the rows that it has written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings: list[Setting] = args.expanded
        self.shared = describe_run(args, "benchmarks/accuracy.py")
        self.weights = args.shape if args.url else fingerprint(Path(args.model))
        self.outcomes = Outcomes(args.outcomes)
        self.run_id = uuid.uuid4().hex[:12]
        self.written = [_measured(row) for row in read_csv(args.csv, Accuracy)] if args.csv.exists() else []
        self.rows: dict[tuple[int, str, int], Accuracy] = {}
        self.questions = {
            (family, length): [question_of(family, length, args.seed, i) for i in range(args.problems)]
            for family, length in product(args.families, args.lengths)
        }

    def answerer(self, setting: Setting) -> Json:
        """What distinguishes this setting's outcomes from others in the file."""
        options = [*self.args.server, *["--forced"][: self.args.forced]]
        return setting.columns | {"weights": self.weights, "dtype": self.args.dtype, "options": options}

    def found(self, setting: Setting, family: str, length: int) -> list[Json]:
        """The outcomes that are there, in the order of problems."""
        answerer = self.answerer(setting)
        outcomes = (self.outcomes.find(answerer, question) for question in self.questions[family, length])
        return [outcome for outcome in outcomes if outcome is not None]

    def unanswered(self, setting: Setting) -> list[list[Json]]:
        """What is left to ask, by family and length."""
        answerer = self.answerer(setting)
        groups = [
            [question for question in questions if self.outcomes.find(answerer, question) is None]
            for questions in self.questions.values()
        ]
        return [group for group in groups if group]

    def run(self, folder: Path) -> None:
        """Ask what is left to ask; every row is in the CSV as soon as its last answer is there."""
        longest, options = None, []
        if not self.args.url:
            longest = min(positions(self.args.model), max(self.args.lengths) + SPARE_POSITIONS)
            options = ["--dtype", self.args.dtype, "--max-model-len", str(longest)]
        jobs = [
            job | {"groups": self.unanswered(setting), "max_model_len": longest}
            for setting, job in zip(self.settings, server_jobs(self.args, folder, options), strict=True)
        ]
        total = len(self.settings) * len(self.questions) * self.args.problems
        left = sum(len(group) for job in jobs for group in job["groups"])
        if left < total:
            print(f"note: {total - left} of {total} outcomes are in {self.args.outcomes}", file=sys.stderr)
        errors = []
        for number, (family, length) in product(range(len(jobs)), self.questions):
            try:
                self._write_row(number, family, length)
            except BenchmarkError as error:
                errors.append(str(error))
        numbers = [number for number, job in enumerate(jobs) if job["groups"]]
        with tqdm(total=total, initial=total - left, unit="answer", dynamic_ncols=True) as progress:

            def take(place: int, outcome: Json) -> None:
                number = numbers[place]
                setting = self.settings[number]
                where = {name: self.shared[name] for name in ("date", *PROVENANCE)}
                self.outcomes.add(self.answerer(setting) | outcome | where | {"run": self.run_id})
                self._write_row(number, outcome["family"], outcome["length"])
                progress.update()
                progress.set_postfix_str(f"{setting.name}, {outcome['family']}")

            waiting = [jobs[number] for number in numbers]
            if self.args.forced:
                errors += self._run_forced(waiting, take)
            else:
                errors += run_jobs(self.args, ask_all, waiting, take)
        raise_errors(errors)

    def _run_forced(self, jobs: list[Json], take: Callable[[int, Json], None]) -> list[str]:
        from benchmarks.accuracy import engines, forced  # import vLLM

        arguments = {"dtype": self.args.dtype} | self.args.engine
        needs = engines.engine_options(
            [job["setting"]["delta"] for job in jobs], max(self.args.lengths), arguments
        )
        try:
            return run_jobs(self.args, forced.force_all, [job | {"engine": needs} for job in jobs], take)
        finally:
            forced.close()

    def _write_row(self, number: int, family: str, length: int) -> None:
        """The row of a group, if all its outcomes are there; in the CSV if it is not there already.

        Raises:
            BenchmarkError: DELTA was not at work.
        """
        setting = self.settings[number]
        outcomes = self.found(setting, family, length)
        if len(outcomes) < self.args.problems:
            return
        counts, seconds = self.outcomes.segments(self.answerer(setting), family, length, self.args.seed)
        exact = sum(outcome["exact"] for outcome in outcomes)
        low, high = wilson(exact, len(outcomes))
        wrong = [outcome["right_steps"] + 1 for outcome in outcomes if not outcome["exact"]]
        shares = [outcome["right_steps"] / outcome["num_steps"] for outcome in outcomes]
        where = {name: "/".join(dict.fromkeys(o[name] for o in outcomes)) for name in PROVENANCE}
        row = Accuracy(
            weights=self.weights,
            way="forced" if self.args.forced else "asked",
            family=family,
            length=length,
            seed=self.args.seed,
            problems=len(outcomes),
            exact=exact,
            accuracy=round(exact / len(outcomes), 6),
            accuracy_low=round(low, 6),
            accuracy_high=round(high, 6),
            right_share=round(fmean(shares), 6),
            first_wrong_step=float(median(wrong)) if wrong else None,
            generated_tokens=sum(outcome["generated_tokens"] for outcome in outcomes),
            seconds=round(seconds, 1),
            **activity(f"{family} {length}", setting, counts, longest_decode(outcomes)),
            **(self.shared | where | setting.columns),
        )
        self.rows[number, family, length] = row
        if _measured(row) not in self.written:
            append_csv(self.args.csv, row)
            self.written.append(_measured(row))

    def lost_and_won(self, number: int, family: str, length: int) -> tuple[int, int]:
        """Problems that only the first setting has right, and that only this one has."""
        pairs = zip(
            self.found(self.settings[0], family, length),
            self.found(self.settings[number], family, length),
            strict=True,
        )
        rights = [(first["exact"], this["exact"]) for first, this in pairs]
        return rights.count((True, False)), rights.count((False, True))

    def table(self) -> str:
        """All rows of this run's settings and problems as aligned text."""
        lines: list[tuple[str, ...]] = [TABLE_HEAD]
        for family, length in self.questions:
            for number in range(len(self.settings)):
                if row := self.rows.get((number, family, length)):
                    compared = number > 0 and (0, family, length) in self.rows
                    lost, won = self.lost_and_won(number, family, length) if compared else ("-", "-")
                    lines.append((*_cells(row), str(lost), str(won), *_effort(row)))
        return (
            f"{align(lines, LEFT_ALIGNED)}\nright steps: before the first wrong one; first wrong: median of "
            "the answers that are not exact.\nlost, won: problems that only the first setting, or only this "
            "one, has right."
        )


def positions(model: str) -> int:
    """How many tokens a model can take."""
    limit: int = read_config(model).get("max_position_embeddings", POSITIONS)
    return limit


def _measured(row: Accuracy) -> Json:
    return {name: value for name, value in asdict(row).items() if name not in UNMEASURED}


def _cells(row: Accuracy) -> tuple[str, ...]:
    return (
        row.setting,
        row.family,
        str(row.length),
        str(row.problems),
        f"{row.accuracy:.1%}",
        f"{row.accuracy_low:.1%}-{row.accuracy_high:.1%}",
        f"{row.right_share:.1%}",
        "-" if row.first_wrong_step is None else f"{row.first_wrong_step:g}",
        "-" if row.attended_share is None else f"{row.attended_share:.1%}",
    )


def _effort(row: Accuracy) -> tuple[str, str]:
    return str(row.generated_tokens), f"{row.seconds:.0f}"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Accuracy on the reasoner's problems, dense and under DELTA's settings.",
        epilog="The module's docstring says what is measured and why so. Other options go to vllm serve. "
        "Real checkpoints: accuracy.py lm-eval --help",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"({','.join(FAMILIES)})")
    parser.add_argument("--lengths", default="4096", help="tokens of a problem with its answer (4096)")
    parser.add_argument("--problems", type=int, default=50, help="of each family and length (50)")
    parser.add_argument("--outcomes", type=Path, metavar="JSONL", help="default: the CSV's name with .jsonl")
    parser.add_argument("--forced", action="store_true", help="judge right answers, in one engine")
    parser.add_argument(
        "--engine", metavar="JSON", type=json_object, default={}, help="arguments of vllm.LLM, if forced"
    )
    args, server = parser.parse_known_args(argv)
    args.server = server
    complete_arguments(parser, args, Accuracy, "accuracy")
    args.outcomes = args.outcomes or args.csv.with_suffix(".jsonl")
    args.families = args.families.split(",")
    if args.problems < 1:
        parser.error("needs at least one problem")
    if args.forced and (args.url or args.parallel > 1 or server):
        parser.error("--forced runs one engine here: without --url, --parallel and options of a server")
    try:
        args.lengths = [int(text) for text in args.lengths.split(",")]
        for family, length in product(args.families, args.lengths):
            problem_of(family, length, args.seed, 0)
    except ValueError as error:
        parser.error(str(error))
    if args.model:
        if not (Path(args.model) / "config.json").is_file():
            parser.error(f"{args.model} is no folder with a config.json")
        if max(args.lengths) > positions(args.model):
            parser.error(f"{args.model} has no positions for problems of {max(args.lengths)} tokens")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table; returns the exit status."""
    if argv[:1] == ["lm-eval"]:
        from benchmarks.accuracy import lm_eval

        return lm_eval.main(argv[1:])
    sweep = Sweep(parse_arguments(argv))
    status = run_benchmark(sweep.run, "accuracy")
    if sweep.rows:
        run = next(iter(sweep.rows.values()))
        print(f"\n{run.shape}, {run.dtype}, vLLM {run.vllm}, {run.machine}, {run.cores} cores")
        print(sweep.table())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
