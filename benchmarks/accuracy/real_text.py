"""What settings lose on real texts: any checkpoint, any text, one engine.

    python benchmarks/real_text.py MODEL --texts novel.txt,manual.txt
    python benchmarks/real_text.py MODEL --texts novel.txt --settings delta_calibration.json --shares 0.25,0.4
    python benchmarks/real_text.py MODEL --texts novel.txt --policies delta,quest --contexts 2048,4096,8000

Documents are made of the texts (`documents.py`): they go on, are quoted and are asked about. Nothing is
sampled; the right tokens are given. A document runs once under full attention, and its keys and values are
kept. Then its end is computed again under every setting, as decode rows. Reported are:

- *quotes* and *facts*: of the tokens that full attention gets right, the share that a setting gets, too;
- *rise*: how much more a token of prose costs, in nats (cross-entropy, less that of full attention);
- *divergence*: from full attention's distributions, in nats, and *agreement* of the likeliest tokens;
- *attended*: tokens attended to over tokens of context, of all layers, as DELTA counts them.

Settings come from a file, which may be a calibration, or from options that multiply out, as for
`accuracy.py`. With `--shares` every setting gets, for each context, the budget with which it attends to that
share. Intervals are of the bootstrap over documents, 95%. A CSV row per document, setting, family and place
is written as soon as it is there; a later run measures what is missing. `plot_real_text.py` draws the rows.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import RESULTS
from benchmarks.accuracy.documents import FAMILIES, LEAST_CONTEXT, Document, Source, make_document
from benchmarks.accuracy.engines import complete, engine_options, start_engine, to_json
from benchmarks.accuracy.options import add_sweep
from benchmarks.accuracy.problems import fingerprint
from benchmarks.accuracy.settings import Setting, expand, parse_numbers
from benchmarks.lib import text_losses
from benchmarks.lib.base import DELTA, BenchmarkError, Json
from benchmarks.lib.csv_rows import append_csv, check_header, read_csv
from benchmarks.lib.options import describe_run
from benchmarks.lib.processes import run_benchmark
from benchmarks.lib.provenance import find_machine
from benchmarks.lib.rows import TextLoss
from benchmarks.lib.text import align
from benchmarks.lib.text_losses import FACTS, PROSE, QUOTES, Statistic
from vllm_delta.cli.options import json_object
from vllm_delta.method.config import DeltaConfigError
from vllm_delta.method.counters import difference
from vllm_delta.method.plan import Role, make_plan

if TYPE_CHECKING:
    from vllm_delta.calibration.engine import Engine, Model
    from vllm_delta.calibration.evidence import Found

TABLE_HEAD = (
    *("context", "setting", "attended", "quotes kept", "95%", "facts kept", "95%"),
    *("rise, nats", "95%", "divergence", "agreement"),
)
LEFT_ALIGNED = ("setting",)
#: tokens that are computed at a time
ROWS = 512
#: tokens of the largest page
MOST_PAGE = 128
#: policies that read minima and maxima of keys, one token's worth a page, to choose
READ_PAGES = ("quest",)


@dataclass(frozen=True)
class Arm:
    """A setting at one context."""

    setting: Setting
    context: int


class Texts:
    """One run: its documents, settings, and rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.shared = describe_run(args, "benchmarks/real_text.py")
        self.weights = fingerprint(Path(args.model)) if Path(args.model).is_dir() else args.model
        self.rows: list[TextLoss] = read_csv(args.csv, TextLoss) if args.csv.exists() else []
        self.arms: list[Arm] = []

    def run(self, _folder: Path) -> None:
        """Measure what is not in the CSV.

        Raises:
            BenchmarkError: texts that are too short, wrong settings, or an engine that does not start.
        """
        from vllm_delta.calibration.engine import Model  # imports vLLM
        from vllm_delta.calibration.prompts import CalibrationError

        args = self.args
        try:
            options = {"dtype": args.dtype} | args.engine
            deltas = [setting.delta for setting in args.expanded]
            deltas += [{"budget_tokens": -(-max(args.contexts) // MOST_PAGE) * MOST_PAGE}]  # for shares
            needs = engine_options(deltas, max(args.contexts), options)
            model = Model(args.model, needs["options"])
            if max(args.contexts) >= model.max_model_len:
                raise BenchmarkError(f"{args.model} takes fewer than {max(args.contexts) + 1} tokens")
            documents = list(self._documents(model))
            engine = start_engine(model, needs, ROWS)
        except (CalibrationError, DeltaConfigError, ValueError) as error:
            raise BenchmarkError(str(error)) from error
        try:
            self._measure(engine, model.num_layers, documents)
        except (CalibrationError, DeltaConfigError) as error:
            raise BenchmarkError(str(error)) from error
        finally:
            engine.close()

    def _documents(self, model: Model) -> Iterator[tuple[Json, Document]]:
        """The columns that tell a document from others, and the document."""
        tokenizer = model.tokenizer()

        def encode(text: str) -> list[int]:
            tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return tokens

        start = tokenizer.encode("")
        for path in self.args.texts:
            source = Source.read(path.stem, path.read_text(), encode)
            for context, part in product(self.args.contexts, range(self.args.parts)):
                columns = {"text": source.name, "digest": source.digest, "context": context, "part": part}
                yield columns, make_document(source, context, part, self.args.seed, encode, start)

    def _measure(self, engine: Engine, num_layers: int, documents: list[tuple[Json, Document]]) -> None:
        lengths = {
            columns["context"]: range(document.text.first_row + 1, columns["context"] + 1)
            for columns, document in documents
        }
        model, shares = self.args.model, self.args.shares
        by_context = {
            context: [
                Arm(setting, context)
                for given in self.args.expanded
                for setting in with_shares(given, shares, model, engine, num_layers, lengths[context])
            ]
            for context in self.args.contexts
        }
        self.arms = [arm for arms in by_context.values() for arm in arms]
        there = {_identity(row) for row in self.rows}
        with tqdm(
            total=sum(len(by_context[c["context"]]) for c, _ in documents), unit="run", dynamic_ncols=True
        ) as bar:
            for columns, document in documents:
                keys = columns | {"weights": self.weights, "seed": self.args.seed, "dtype": self.args.dtype}
                missing = []
                for arm in by_context[columns["context"]]:
                    own = keys | arm.setting.columns
                    if tuple(own[name] for name in IDENTITY) in there:
                        bar.update()
                    else:
                        missing.append((own, arm))
                if not missing:
                    continue
                engine.keep(0, document.text, 0)
                engine.use({"full_layers": num_layers, "selection_layers": []})
                full = engine.score_in_use(0)
                for own, arm in missing:
                    bar.set_postfix_str(f"{columns['text']} {columns['context']}, {arm.setting.name}")
                    engine.use(to_json(complete(arm.setting, self.args.model, num_layers)))
                    before = engine.counters()
                    found = engine.score_in_use(0)
                    counts = difference(engine.counters(), before)
                    self._write(own, document, full, found, counts)
                    bar.update()

    def _write(self, own: Json, document: Document, full: Found, found: Found, counts: Json) -> None:
        for (family, place), sums in sums_of(document, full, found).items():
            row = TextLoss(
                **self.shared | own,
                family=family,
                place=place,
                **sums,
                attended_tokens=counts["attended_tokens"],
                context_tokens=counts["context_tokens"],
            )
            append_csv(self.args.csv, row)
            self.rows.append(row)

    def table(self) -> str:
        """What the CSV has of this run's settings, as aligned text."""
        lines: list[tuple[str, ...]] = [TABLE_HEAD]
        for arm in self.arms:
            settings = arm.setting.columns["settings"]
            rows = [
                row
                for row in self.rows
                if (row.weights, row.seed, row.dtype) == (self.weights, self.args.seed, self.args.dtype)
                and (row.context, row.settings) == (arm.context, settings)
                and row.text in {path.stem for path in self.args.texts}
            ]
            if rows:
                lines.append((str(arm.context), arm.setting.name, *cells(rows)))
        return align(lines, LEFT_ALIGNED)


#: columns that tell one document under one setting from others
IDENTITY = ("weights", "dtype", "text", "digest", "seed", "context", "part", "settings")


def _identity(row: TextLoss) -> tuple[str | int, ...]:
    return tuple(getattr(row, name) for name in IDENTITY)


def sums_of(document: Document, full: Found, found: Found) -> dict[tuple[str, int], Json]:
    """Sums over the scored tokens of each family and place; see `TextLoss`."""
    names = ("tokens", "right", "kept", "divergence", "full_loss", "loss")
    sums: dict[tuple[str, int], list[float]] = {}
    text = document.text
    for index, position in enumerate(text.positions):
        family, expected = text.scored[position], full.likeliest[index]
        right = family == PROSE or expected == text.tokens[position]
        values = (
            1,
            int(right),
            int(right and found.likeliest[index] == expected),
            found.divergences[index],
            -full.log_probabilities[index],
            -found.log_probabilities[index],
        )
        before = sums.get((family, document.places[position]), [0] * len(names))
        sums[family, document.places[position]] = [x + y for x, y in zip(before, values, strict=True)]
    return {
        key: {name: round(value, 6) for name, value in zip(names, values, strict=True)}
        for key, values in sums.items()
    }


def with_shares(
    setting: Setting,
    shares: Sequence[float],
    model: str,
    engine: Engine,
    num_layers: int,
    lengths: Sequence[int],
) -> list[Setting]:
    """The setting with the largest budgets at which it attends to at most these shares, where there are some.

    Without shares the setting as it is; `lengths` are the rows' contexts.
    """
    if not shares:
        return [setting]
    config = complete(setting, model, num_layers)
    plan = make_plan(config, engine.eligible, num_layers)
    sparse = len(plan.layers(Role.SPARSE)) / len(plan.roles)
    size = config.page_size

    def attended(pages: int) -> float:
        budget, read = pages * size, 1 / size if config.policy in READ_PAGES else 0
        tokens = sum(length if length <= budget else budget + read * length for length in lengths)
        return 1 - sparse + sparse * tokens / sum(lengths)

    least = config.recent_pages + config.sink_pages + 1
    budgets = range(least, -(-max(lengths) // size) + 1)
    settings = []
    for share in shares:
        if fitting := bisect_right(budgets, share, key=attended):
            delta = setting.delta | {"budget_tokens": budgets[fitting - 1] * size}
            settings.append(replace(setting, name=f"{setting.name}, {share:.0%}", delta=delta))
    return settings


def cells(rows: Sequence[TextLoss]) -> tuple[str, ...]:
    """The table's columns behind the setting, of rows of one setting and context."""
    parts = {family: [row for row in rows if row.family == family] for family in FAMILIES}

    def bounds(family: str, statistic: Statistic) -> str:
        found = text_losses.interval(text_losses.by_document(parts[family]), statistic)
        return "-" if found is None else f"{found[0]:.4g} to {found[1]:.4g}"

    looked_up = [
        cell
        for family in (QUOTES, FACTS)
        for cell in (f"{text_losses.kept(parts[family]):.1f}", bounds(family, text_losses.kept))
    ]
    prose = parts[PROSE]
    return (
        f"{text_losses.attended_share(rows):.1%}",
        *looked_up,
        f"{text_losses.rise(prose):.4f}",
        bounds(PROSE, text_losses.rise),
        f"{text_losses.divergence(prose):.4f}",
        f"{text_losses.kept(prose):.1f}",
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="What settings lose on real texts.",
        epilog="The module's docstring says what is measured.",
    )
    add = parser.add_argument
    add("model", help="folder or name, as vLLM takes it")
    add("--texts", required=True, metavar="A,B", help="files of plain text")
    add("--contexts", default="4096", metavar="N,N", help="tokens of documents (4096)")
    add("--parts", type=int, default=2, help="documents of each text and context (2)")
    add("--shares", default="", metavar="S,S", help="budgets at which settings attend to these shares")
    add("--engine", metavar="JSON", type=json_object, default={}, help="arguments of vllm.LLM")
    add_sweep(parser)
    args = parser.parse_args(argv)
    try:
        args.platform, args.machine = find_machine()
        args.csv = args.csv or RESULTS / f"real_text_{args.platform}.csv"
        check_header(args.csv, TextLoss)
        args.texts = [Path(name) for name in args.texts.split(",")]
        args.contexts = parse_numbers(args.contexts)
        args.shares = [float(word) for word in args.shares.split(",") if word]
        args.url, args.backends = None, [DELTA] if args.settings is None else None
        args.expanded = [setting for setting in expand(args, "") if setting.is_delta]
        if missing := [str(path) for path in args.texts if not path.is_file()]:
            parser.error(f"there is no file {', '.join(missing)}")
        if min(args.contexts) < LEAST_CONTEXT or args.parts < 1 or args.seed < 0:
            parser.error(
                f"contexts have at least {LEAST_CONTEXT} tokens; --parts is 1 or more, --seed 0 or more"
            )
        if not all(0 < share <= 1 for share in args.shares):
            parser.error("--shares are above 0 and at most 1")
        if args.shares and args.budgets:
            parser.error("--shares choose the budgets: leave --budgets out")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table; returns the exit status."""
    texts = Texts(parse_arguments(argv))
    status = run_benchmark(texts.run, "real-text")
    if texts.arms and texts.rows:
        run = texts.rows[-1]
        print(f"\n{run.shape}, {run.dtype}, vLLM {run.vllm}, {run.machine}, {run.cores} cores")
        print(texts.table())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
