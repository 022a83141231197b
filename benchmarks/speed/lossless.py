"""Decode speed under speculation against a dense backend, inside vLLM: lossless, or with n-gram drafts.

    python benchmarks/lossless.py                               # the platform's dense backend and DELTA
    python benchmarks/lossless.py --acceptance 0.94,0.98,1 --cases 24x32k,32x2k,1x1k
    python benchmarks/lossless.py --delta '{"lossless": true, "draft_pages": "fresh"}'
    python benchmarks/lossless.py --ngram 4 --cases 16x32k      # vLLM's n-gram drafts, for both backends

What is measured is a token's time: that of all passes that draft and verify, divided by the tokens that they
give each sequence. Models, caches and cases are those of `benchmarks.speed.decode`. How many drafts are
accepted depends on the model and its text, so it is given: vLLM's rejection sampler accepts each draft with
that probability, if it accepted the ones before (its method "synthetic"). A token's time is the slope between
two lengths of the output: SHORT and LONG tokens, each taken until a sequence ends, on average over the batch.

One engine measures all rates of acceptance, one after another. vLLM has no such sampler on CPUs: there, what
random weights accept is measured, which is the worst case. Rows are appended to a CSV.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.lib.activity import check_activity
from benchmarks.lib.base import DELTA, Json, arm_names
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import append_csv
from benchmarks.lib.models import (
    NOISE_IN_CACHE,
    POSITIONS,
    engine_arguments,
    ngram_drafts,
    prompt_case,
    read_config,
    worker_job,
)
from benchmarks.lib.options import (
    add_arguments,
    add_engine_arguments,
    complete_arguments,
    describe_arm,
    describe_run,
)
from benchmarks.lib.processes import run_benchmark, run_worker
from benchmarks.lib.rows import Drafted
from benchmarks.lib.text import align
from benchmarks.lib.worker import (
    delta_counts,
    engine_facts,
    lack_of_cache,
    random_prompts,
    serve_results,
    timed_ends,
)

MODULE = "benchmarks.speed.lossless"
TABLE_HEAD = ("case", "backend", "accepted", "ms/token", "tok/s", "speed-up", "tokens/step", "memory")

DEFAULTS = {  # by platform
    "cpu": {"backends": "CPU_ATTN,DELTA", "shape": "tiny28", "lengths": "16,144", "cases": "4x16k"},
    "cuda": {
        "backends": "FLASH_ATTN,DELTA",
        "shape": "qwen2.5-7b",
        "lengths": "16,272",
        "cases": "24x32k,32x2k,1x1k",
    },
}


# --- the worker ----------------------------------------------------------------------------------


def measure(llm: Any, job: Json) -> Generator[Json, None, None]:
    """One result per case and rate of acceptance, of which those that do not fit hold the reason alone."""
    for prompt in map(Case.parse, job["prompts"]):
        reason = lack_of_cache(llm, Case(prompt.batch, prompt.context + job["lengths"][1]))
        for index, rate in enumerate(job["rates"]):
            if reason:
                yield {"skipped": reason}
                continue
            if rate is not None:
                llm.collective_rpc(accept, args=(rate,))
            yield measure_case(llm, prompt, job, warm_up=index == 0)


def accept(worker: Any, rate: float) -> None:
    """Let the rejection sampler accept each draft with this probability."""
    worker.model_runner.rejection_sampler.synthetic_conditional_rates.fill_(rate)


def measure_case(llm: Any, prompt: Case, job: Json, *, warm_up: bool) -> Json:
    """Milliseconds per token, tokens per step, and what `benchmarks.speed.decode` reports beside."""
    short, long = job["lengths"]
    prompts = random_prompts(prompt, job["vocab"])
    if warm_up:
        timed_ends(llm, prompts, long)  # compilation, threads, caches
    before = delta_counts(llm, job)
    slopes = [slope(llm, prompts, short, long) for _ in range(job["samples"])]
    return {
        "samples_ms": [1000 * seconds for seconds, _ in slopes],
        "tokens_per_step": fmean(per_step for _, per_step in slopes),
        "counts": delta_counts(llm, job, since=before),
        "facts": engine_facts(llm, job),
    }


def slope(llm: Any, prompts: Sequence[Json], short: int, long: int) -> tuple[float, float]:
    """Seconds per token of a sequence, and tokens of a sequence per step."""
    first_steps, first_ends = timed_ends(llm, prompts, short)
    steps, ends = timed_ends(llm, prompts, long)
    tokens = long - short
    return (fmean(ends) - fmean(first_ends)) / tokens, tokens / max(1, len(steps) - len(first_steps))


# --- the parent ----------------------------------------------------------------------------------


def benchmark(args: argparse.Namespace, folder: Path, rows: list[Drafted], skipped: list[str]) -> None:
    """Every measurement is in the CSV, and in `rows`, as soon as it is there."""
    arms, last = arm_names(args.backends), args.lengths[1]
    engine = engine_arguments(args, folder, [Case(case.batch, case.context + last) for case in args.cases])
    engine["kv_transfer_config"] = NOISE_IN_CACHE
    shared = describe_run(args, "benchmarks/lossless.py") | {"baseline": arms[0]}
    for arm in arms:
        drafts = args.ngram or arm.partition("#")[0] == DELTA
        rates = args.acceptance if drafts and args.platform == "cuda" else [None]
        job = worker_job(args, engine, arm) | {
            "prompts": [str(prompt_case(case, args)) for case in args.cases],
            "lengths": args.lengths,
            "samples": args.samples,
            "rates": rates,
        }
        if args.ngram or rates != [None]:
            job["engine"] |= {"speculative_config": speculation(args, engine["model"])}
        measured = [(case, rate) for case in args.cases for rate in rates]
        with contextlib.closing(run_worker(MODULE, job, folder / f"{arm}.log")) as results:
            progress = tqdm(zip(measured, results, strict=True), arm, len(measured), dynamic_ncols=True)
            for (case, rate), result in progress:
                if "skipped" in result:
                    skipped.append(f"{case}, {arm}: skipped, {result['skipped']}")
                    continue
                row = to_row(case, rate, result, args, shared | describe_arm(args, arm))
                append_csv(args.csv, row)
                rows.append(row)


def speculation(args: argparse.Namespace, model: str) -> Json:
    """N-gram drafts, or the model as its own draft model, as DELTA has it.

    On a GPU with rates of acceptance, which are set later.
    """
    drafts = args.ngram or args.delta.get("draft_tokens", 7)
    speculative = ngram_drafts(drafts)
    if not args.ngram:
        sampling = args.delta.get("draft_sampling", "probabilistic")
        speculative = {
            "method": "draft_model",
            "model": model,
            "draft_sample_method": sampling,
            "num_speculative_tokens": drafts,
        }
    if args.platform == "cuda":
        speculative |= {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [1.0] * drafts,
        }
    return speculative


def to_row(case: Case, rate: float | None, result: Json, args: argparse.Namespace, shared: Json) -> Drafted:
    """The CSV row of a worker's result; raises BenchmarkError if it cannot be right."""
    ms, prompt = median(result["samples_ms"]), prompt_case(case, args).context
    return Drafted(
        batch=case.batch,
        context=case.context,
        prompt_tokens=prompt,
        output_short=args.lengths[0],
        output_long=args.lengths[1],
        ngram_tokens=args.ngram,
        acceptance=rate,
        tokens_per_step=round(result["tokens_per_step"], 4),
        ms_per_token=round(ms, 4),
        tokens_per_second=round(case.batch * 1000 / ms, 2),
        samples_ms=" ".join(f"{sample:.4f}" for sample in result["samples_ms"]),
        kv_cache_dtype=args.kv_cache_dtype,
        **token_counts(f"Case {case}", result["counts"], args.budget_tokens),
        **result["facts"],
        **shared,
    )


def token_counts(what: str, counts: Json, budget: int) -> Json:
    """The CSV's token counts; zeros where nothing was drafted, since it would not have saved time."""
    if counts and not any(layers["rows"] for layers in counts["layers"].values()):
        names = ("attended_tokens", "context_tokens")
        return dict.fromkeys([*names, *(f"sparse_{name}" for name in names)], 0)
    return check_activity(what, counts, 0, budget)


def table(rows: Sequence[Drafted]) -> str:
    """All rows as aligned text, with speed-ups over the baseline of the same case and, if it drafts, rate."""
    baseline = {(row.case, row.acceptance): row.ms_per_token for row in rows if row.backend == row.baseline}
    lines = [TABLE_HEAD]
    for row in sorted(rows, key=lambda row: (row.case.context, row.case.batch)):
        is_baseline = row.backend == row.baseline
        dense = baseline.get((row.case, row.acceptance), baseline.get((row.case, None)))
        speedup = None if dense is None else dense / row.ms_per_token
        memory = row.peak_memory_bytes
        lines.append(
            (
                str(row.case),
                row.arm,
                "-" if row.acceptance is None else f"{row.acceptance:.0%}",
                f"{row.ms_per_token:.2f}",
                f"{row.tokens_per_second:.0f}",
                "-" if is_baseline or speedup is None else f"{speedup:.2f}x",
                f"{row.tokens_per_step:.2f}",
                "-" if memory is None else f"{memory / 2**30:.2f} GiB",
            )
        )
    return align(lines, ("case", "backend"))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Decode speed under speculation against a dense backend, inside vLLM.",
        epilog="The module's docstring says what is measured and why so.",
    )
    add_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--cases", metavar="BxC,...", help="batch x context, such as 1x1k,4x16384")
    parser.add_argument("--samples", type=int, default=3, help="slopes per case and rate (3)")
    parser.add_argument("--lengths", metavar="SHORT,LONG", help="of the output (CPU: 16,144, GPU: 16,272)")
    parser.add_argument("--acceptance", default="0.94,0.98,1", help="of a draft behind accepted ones")
    parser.add_argument(
        "--ngram",
        type=int,
        default=0,
        metavar="N",
        help="let vLLM draft N tokens by n-grams, for all backends",
    )
    args = parser.parse_args(argv)
    complete_arguments(parser, args, Drafted, "lossless", DEFAULTS)
    if not args.ngram:
        args.delta = {"lossless": True} | args.delta
    try:
        args.lengths = [int(text) for text in args.lengths.split(",")]
        args.acceptance = [float(text) for text in args.acceptance.split(",")]
        short, long = args.lengths
        args.cases = list(dict.fromkeys(Case.parse(text) for text in args.cases.split(",")))
    except ValueError as error:
        parser.error(str(error))
    rates_are_right = all(0 <= rate <= 1 for rate in args.acceptance)
    if not 1 <= short < long or args.samples < 1 or args.ngram < 0 or not rates_are_right:
        parser.error("needs 1 <= SHORT < LONG, a sample, rates from 0 to 1, and N not below 0")
    model = read_config(args.model) if args.model else {}
    args.positions = model.get("max_position_embeddings", POSITIONS)
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table, or be its worker; returns the exit status."""
    if argv[:1] == ["--worker"]:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for the function that sets the rates
        serve_results(measure, json.loads(argv[1]))
        return 0
    args = parse_arguments(argv)
    rows: list[Drafted] = []
    skipped: list[str] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows, skipped), "lossless")
    if rows:
        run = rows[0]
        print(f"\n{run.shape}, {run.dtype}, KV cache {run.kv_cache_dtype}, vLLM {run.vllm}")
        print(f"{run.machine}, {run.cores} cores")
        print(table(rows))
    for line in dict.fromkeys(skipped):
        print(line)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
