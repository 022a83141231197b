"""How many drafts are accepted of what a model writes: by DELTA's own drafts, or by n-grams.

    python benchmarks/acceptance.py MODEL --texts novel.txt,manual.txt
    python benchmarks/acceptance.py MODEL --texts novel.txt --delta '{"draft_pages": "own"}' --delta '{}'
    python benchmarks/acceptance.py tools/reasoner/trained --families chase,trace --ngram 4

Prompts are documents of real texts, as `real_text.py` makes them, up to what is scored there, or the
reasoner's problems. The model goes on by itself. Each setting has an engine of its own. With `--ngram` vLLM
drafts, and the dense backend is measured, too. Reported are the drafts that were accepted at each position,
of those made, and the *acceptance*: of the drafts behind accepted ones only, the share that was accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.accuracy.documents import LEAST_CONTEXT, Source, make_document
from benchmarks.accuracy.options import DENSE
from benchmarks.lib.base import DELTA, BenchmarkError, Json
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import append_csv, check_header
from benchmarks.lib.drafts import accepted_share, tokens_per_step
from benchmarks.lib.models import kv_cache_bytes, ngram_drafts, read_config
from benchmarks.lib.options import describe_run
from benchmarks.lib.processes import run_benchmark, run_worker
from benchmarks.lib.provenance import find_machine
from benchmarks.lib.rows import Acceptance
from benchmarks.lib.text import align
from benchmarks.lib.worker import serve_results
from vllm_delta.cli.options import json_object
from vllm_delta.method.config import DeltaConfig

MODULE = "benchmarks.accuracy.acceptance"
TABLE_HEAD = ("text", "setting", "acceptance", "tokens/step", "accepted, by position")
#: vLLM's counters: of steps that verified drafts of a request, and of those that were accepted, by position
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"
#: tokens beyond prompt and output that a sequence may have
SPARE = 64


# --- the worker ----------------------------------------------------------------------------------


def measure(llm: Any, job: Json) -> Generator[Json, None, None]:
    """One result per text: its drafts, and those accepted by position."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=job["output"], temperature=job["temperature"], ignore_eos=True, detokenize=False
    )
    for prompts in json.loads(Path(job["prompts"]).read_text()):
        before = counts(llm)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        after = counts(llm)
        yield {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}


def counts(llm: Any) -> dict[str, list[int]]:
    """What vLLM has counted of drafts."""
    found: dict[str, list[int]] = {}
    for metric in llm.get_metrics():
        if metric.name in (DRAFTS, ACCEPTED):
            found[metric.name] = list(metric.values) if metric.name == ACCEPTED else [int(metric.value)]
    return found


# --- the parent ----------------------------------------------------------------------------------


def benchmark(args: argparse.Namespace, folder: Path, rows: list[Acceptance]) -> None:
    """Every row is in the CSV as soon as it is there.

    Raises:
        BenchmarkError: texts that are too short, or an engine that fails.
    """
    shared = describe_run(args, "benchmarks/acceptance.py")
    try:
        prompts, file = make_prompts(args), folder / "prompts.json"
    except ValueError as error:
        raise BenchmarkError(str(error)) from error
    file.write_text(json.dumps(list(prompts.values())))
    for backend, delta in args.arms:
        job = {
            "engine": engine_arguments(args, backend, delta),
            "prompts": str(file),
            "output": args.output,
            "temperature": args.temperature,
        }
        with contextlib.closing(run_worker(MODULE, job, folder / "worker.log")) as results:
            for text, result in zip(prompts, results, strict=True):
                where = {"backend": backend, "settings": json.dumps(delta, sort_keys=True)}
                row = to_row(text, result, args, shared | where)
                append_csv(args.csv, row)
                rows.append(row)


def make_prompts(args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token prompts, by what they are made of."""
    if args.texts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)

        def encode(text: str) -> list[int]:
            tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return tokens

        def document(source: Source, part: int) -> list[int]:
            made = make_document(source, args.context, part, args.seed, encode, tokenizer.encode(""))
            return made.text.tokens[: made.text.first_row + 1]

        sources = [Source.read(path.stem, path.read_text(), encode) for path in args.texts]
        return {source.name: [document(source, part) for part in range(args.parts)] for source in sources}
    from benchmarks.accuracy.problems import problem_of

    return {
        family: [
            problem_of(family, args.context, args.seed, index).prompt.tolist() for index in range(args.parts)
        ]
        for family in args.families
    }


def engine_arguments(args: argparse.Namespace, backend: str, delta: Json) -> Json:
    """Arguments of vllm.LLM."""
    arguments: Json = {
        "model": args.model,
        "dtype": args.dtype,
        "attention_backend": backend,
        "max_model_len": args.context + args.output + SPARE,
        "max_num_seqs": args.parts,
        "disable_log_stats": False,
    }
    if args.platform == "cpu":
        needs = Case(args.parts, arguments["max_model_len"])
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(read_config(args.model), [needs], args.dtype)
    if backend == DELTA:
        arguments["additional_config"] = {"delta": delta}
    if args.ngram:
        arguments["speculative_config"] = ngram_drafts(args.ngram)
    arguments |= args.engine
    return arguments


def to_row(text: str, result: Json, args: argparse.Namespace, shared: Json) -> Acceptance:
    """The CSV row of a worker's result."""
    (drafts,), accepted = result[DRAFTS], result[ACCEPTED]
    counts = [[drafts, *accepted]]
    return Acceptance(
        text=text,
        prompts=args.parts,
        context=args.context,
        output=args.output,
        temperature=args.temperature,
        ngram_tokens=args.ngram,
        drafts=drafts,
        accepted=" ".join(map(str, accepted)),
        acceptance=round(accepted_share(counts), 4),
        tokens_per_step=round(tokens_per_step(counts), 4),
        **shared,
    )


def table(rows: Sequence[Acceptance]) -> str:
    """All rows as aligned text."""
    lines = [TABLE_HEAD]
    for row in rows:
        numbers = (f"{row.acceptance:.4f}", f"{row.tokens_per_step:.2f}", f"{row.accepted} of {row.drafts}")
        lines.append((row.text, row.arm, *numbers))
    return align(lines, ("text", "setting", "accepted, by position"))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="How many drafts are accepted of what a model writes.",
        epilog="The module's docstring says what is measured.",
    )
    add = parser.add_argument
    add("model", help="folder of a model")
    add("--texts", default="", metavar="A,B", help="files of plain text")
    add("--families", default="chase,trace,needles", metavar="A,B", help="without texts: of problems")
    add("--context", type=int, default=4096, help="tokens of prompts, about (4096)")
    add("--parts", type=int, default=2, help="prompts of each text or family, a batch (2)")
    add("--output", type=int, default=128, help="tokens of each answer (128)")
    add("--temperature", type=float, default=0.0)
    add("--delta", metavar="JSON", type=json_object, action="append", help="a setting; may be repeated")
    add("--ngram", type=int, default=0, metavar="N", help="let vLLM draft N tokens by n-grams")
    add("--engine", metavar="JSON", type=json_object, default={}, help="more arguments of vllm.LLM")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--seed", type=int, default=0)
    add("--csv", type=Path, help="default: benchmarks/results/acceptance_PLATFORM.csv")
    add("--commit", help="what to record where the tree is not a git checkout")
    args = parser.parse_args(argv)
    try:
        args.platform, args.machine = find_machine()
        args.csv = args.csv or RESULTS / f"acceptance_{args.platform}.csv"
        check_header(args.csv, Acceptance)
        args.texts = [Path(name) for name in args.texts.split(",") if name]
        args.families = args.families.split(",")
        own = {} if args.ngram else {"lossless": True, "draft_when": "always"}
        deltas = [own | delta for delta in args.delta or [{}]]
        for delta in deltas:
            DeltaConfig.from_additional_config({"delta": delta})
    except (ValueError, RuntimeError) as error:  # DeltaConfigError is one
        parser.error(str(error))
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"{args.model} is no folder with a config.json")
    if missing := [str(path) for path in args.texts if not path.is_file()]:
        parser.error(f"there is no file {', '.join(missing)}")
    if min(args.parts, args.output) < 1 or min(args.ngram, args.temperature, args.seed) < 0:
        parser.error("needs prompts and output; no number may be below 0")
    if args.texts and args.context < LEAST_CONTEXT:
        parser.error(f"contexts have at least {LEAST_CONTEXT} tokens")
    args.arms = [(DELTA, delta) for delta in deltas]
    if args.ngram:
        args.arms.insert(0, (DENSE[args.platform], {}))
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table, or be its worker; returns the exit status."""
    if argv[:1] == ["--worker"]:
        serve_results(measure, json.loads(argv[1]))
        return 0
    args = parse_arguments(argv)
    rows: list[Acceptance] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows), "acceptance")
    if rows:
        print(f"\n{rows[0].shape}, {rows[0].dtype}, vLLM {rows[0].vllm}, {rows[0].machine}")
        print(table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
