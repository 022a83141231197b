"""Decode speed of DELTA against a dense backend, inside vLLM.

    python benchmarks/decode.py                         # the platform's dense backend and DELTA
    python benchmarks/decode.py --shape tiny4 --cases 1x1k,1x4k --rounds 1
    python benchmarks/decode.py --backends CPU_ATTN,CPU_ATTN      # the noise of the method itself
    python benchmarks/decode.py --shape qwen3-8b --cases 32x32k --kv-cache-dtype fp8       # on a GPU

What is measured: the time of one decode step of the whole engine (scheduler, model, sampler), for
`batch` sequences of `context` tokens each. How, and why so:

- The model has a real architecture and random weights. Its KV cache is filled with noise when the
  engine starts (vLLM's DecodeBenchConnector), so that long contexts cost no prefill. What a sparse
  layer selects is then arbitrary and scattered over the sequence: right for time, meaningless for
  quality.
- Requests are queued while the scheduler is paused, and start together: every timed step has the
  full batch.
- A step's time is the slope between two lengths of the same output. It leaves out whatever a request costs
  once, such as admission and the first step, which on a GPU varies by more than a step takes.
- A process is fresh, times all cases of one backend one after another, and the backends alternate,
  `--rounds` times: a compiled graph, a warm cache or a slow minute of the machine favours nobody. It
  takes the slope `--samples` times per case after a warm-up and reports the median.
- A case that the KV cache cannot hold at once is left out, with the reason: its sequences would wait for
  one another. Where a model has positions for a context but not for the output behind it, the prompts
  are that much shorter.
- Speed-up is baseline time / DELTA time within a round; the table shows the median of the rounds
  and their range.
- DELTA has to prove that it was at work: its counters are read around the timed part. If sparse
  layers attended to nothing, or to everything although the context exceeds the budget, the
  benchmark stops with an error.

Rows are appended to a CSV, which `plot_decode.py` turns into a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.lib.activity import check_activity
from benchmarks.lib.base import BenchmarkError, Json, arm_names
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import append_csv
from benchmarks.lib.models import (
    NOISE_IN_CACHE,
    POSITIONS,
    engine_arguments,
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
from benchmarks.lib.rows import Measurement
from benchmarks.lib.text import align
from benchmarks.lib.worker import (
    delta_counts,
    engine_facts,
    lack_of_cache,
    random_prompts,
    serve_results,
    timed_generate,
)
from benchmarks.speed.summary import Summary, summarise

MODULE = "benchmarks.speed.decode"
TABLE_HEAD = (
    *("case", "backend", "ms/step", "spread", "tok/s", "speed-up"),
    *("attended", "in sparse", "memory", "KV capacity", "note"),
)
LEFT_ALIGNED = ("case", "backend", "note")
#: part of a context that prompts may lack where the model's positions end
LARGEST_CUT = 0.01

DEFAULTS = {  # by platform
    "cpu": {
        "backends": "CPU_ATTN,DELTA",
        "shape": "tiny28",
        "lengths": "8,72",
        "rounds": "3",
    },
    "cuda": {  # where an engine takes a minute or two to start, and a step a few milliseconds
        "backends": "FLASH_ATTN,TRITON_ATTN,DELTA",
        "shape": "qwen2.5-7b",
        "lengths": "8,136",
        "rounds": "1",
    },
}
DEFAULT_CASES = {  # by shape
    "qwen2.5-7b": "32x32k,4x128k,32x2k,1x1k,8x32k",
    "qwen2.5-1.5b": "64x16k,64x4k",
    "qwen3-8b": "24x32k",
}
OTHER_CASES = "1x1k,1x16k,4x16k,4x32k"


# --- the worker: one process, one engine, one backend, all cases ---------------------------------


class NotTogetherError(RuntimeError):
    """Sequences waited for one another, so that a step's time is not that of the whole batch."""


def measure(llm: Any, job: Json) -> Generator[Json, None, None]:
    """One result per case, of which those that do not fit hold the reason alone."""
    for prompt in map(Case.parse, job["prompts"]):
        if reason := lack_of_cache(llm, Case(prompt.batch, prompt.context + job["lengths"][1])):
            yield {"skipped": reason}
            continue
        try:
            yield measure_case(llm, prompt, job)
        except NotTogetherError as error:
            yield {"skipped": str(error)}


def measure_case(llm: Any, prompt: Case, job: Json) -> Json:
    """Slopes in ms per step, DELTA's counts over the timed part (empty for others), the engine's facts."""
    short, long = job["lengths"]
    prompts = random_prompts(prompt, job["vocab"])
    together(llm, prompts, long)  # warm-up: compilation, threads, caches
    before = delta_counts(llm, job)
    slopes = []
    for _ in range(job["samples"]):
        times = together(llm, prompts, long)
        slopes.append((times[-1] - times[short - long - 1]) / (long - short) * 1000)
    counts = delta_counts(llm, job, since=before)
    return {"samples_ms": slopes, "counts": counts, "facts": engine_facts(llm, job)}


def together(llm: Any, prompts: Sequence[Json], output: int) -> list[float]:
    """Seconds to each step's tokens; the last `output` of them are those of every prompt's tokens."""
    times = timed_generate(llm, prompts, output)
    if len(times) > output + 4:  # a few, for steps that only admit requests
        raise NotTogetherError(f"{len(times)} steps for {output} tokens: some sequences waited for others")
    return times


# --- the parent: rows, table ---------------------------------------------------------------------


def benchmark(args: argparse.Namespace, folder: Path, rows: list[Measurement], skipped: list[str]) -> None:
    """Run all rounds; every measurement is in the CSV, and in `rows`, as soon as it is there."""
    arms = arm_names(args.backends)
    last = args.lengths[1]
    engine = engine_arguments(args, folder, [Case(case.batch, case.context + last) for case in args.cases])
    engine["kv_transfer_config"] = NOISE_IN_CACHE
    own = {
        "prompts": [str(prompt_case(case, args)) for case in args.cases],
        "lengths": args.lengths,
        "samples": args.samples,
    }
    shared = describe_run(args, "benchmarks/decode.py") | {"baseline": arms[0]}
    total = args.rounds * len(arms) * len(args.cases)
    with tqdm(total=total, unit="case", dynamic_ncols=True) as progress:
        for round_, arm in ((r, arm) for r in range(1, args.rounds + 1) for arm in arms):
            progress.set_description(f"round {round_}/{args.rounds}, {arm}")
            job = worker_job(args, engine, arm) | own
            log = folder / f"{round_}-{arm}.log"
            with contextlib.closing(run_worker(MODULE, job, log)) as results:
                for case, result in zip(args.cases, results, strict=True):
                    progress.update()
                    if "skipped" in result:
                        skipped.append(f"{case}, {arm}: skipped, {result['skipped']}")
                        continue
                    row = to_row(case, result, args, shared | describe_arm(args, arm) | {"round": round_})
                    append_csv(args.csv, row)
                    rows.append(row)
                    progress.set_postfix_str(f"{case}: {row.ms_per_step:.2f} ms/step")


def to_row(case: Case, result: Json, args: argparse.Namespace, shared: Json) -> Measurement:
    """The CSV row of a worker's result; raises BenchmarkError if it cannot be right."""
    ms = median(result["samples_ms"])
    if ms <= 0:
        raise BenchmarkError(f"case {case}: a step of {ms} ms is noise; use longer outputs")
    prompt = prompt_case(case, args).context
    return Measurement(
        batch=case.batch,
        context=case.context,
        prompt_tokens=prompt,
        output_short=args.lengths[0],
        output_long=args.lengths[1],
        ms_per_step=round(ms, 4),
        tokens_per_second=round(case.batch * 1000 / ms, 2),
        samples_ms=" ".join(f"{sample:.4f}" for sample in result["samples_ms"]),
        kv_cache_dtype=args.kv_cache_dtype,
        **check_activity(f"Case {case}", result["counts"], prompt, args.budget_tokens),
        **result["facts"],
        **shared,
    )


def table(summaries: Sequence[Summary], longest_output: int, budget: int, baseline: str) -> str:
    """The summary as aligned text."""
    lines = [TABLE_HEAD] + [table_line(s, longest_output, budget) for s in summaries]
    legend = (
        "Medians over rounds. spread: (largest - smallest sample) / median in a process; speed-up: "
        f"{baseline} time / this time\nand its range over rounds; attended: share of the context's "
        "tokens that was read, in all layers and in sparse layers;\nmemory: peak RSS of the engine, "
        "or used device memory; KV capacity: tokens that its cache has room for."
    )
    return f"{align(lines, LEFT_ALIGNED)}\n{legend}"


def table_line(s: Summary, longest_output: int, budget: int) -> tuple[str, ...]:
    """The cells under `TABLE_HEAD`."""
    ratio = "-"
    if s.speedup is not None:
        ratio = f"{s.speedup:.2f}x ({min(s.speedups):.2f}-{max(s.speedups):.2f})"
    fits = s.attended_share is not None and s.case.context + longest_output <= budget
    return (
        str(s.case),
        s.arm,
        f"{s.ms_per_step:.2f}",
        f"{s.spread:.1%}",
        f"{s.tokens_per_second:.1f}",
        ratio,
        "-" if s.attended_share is None else f"{s.attended_share:.1%}",
        "-" if s.sparse_share is None else f"{s.sparse_share:.1%}",
        "-" if s.peak_memory_bytes is None else f"{s.peak_memory_bytes / 2**30:.2f} GiB",
        "-" if s.kv_capacity_tokens is None else str(s.kv_capacity_tokens),
        "dense by design: fits the budget" if fits else "",
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Decode speed of DELTA against a dense backend, inside vLLM.",
        epilog="The module's docstring says what is measured and why so.",
    )
    add_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--cases", metavar="BxC,...", help="batch x context, such as 1x1k,4x16384")
    parser.add_argument("--rounds", help="processes per backend (CPU: 3, GPU: 1)")
    parser.add_argument("--samples", type=int, default=5, help="slopes per process and case (5)")
    parser.add_argument("--lengths", metavar="SHORT,LONG", help="of the output (CPU: 8,72, GPU: 8,136)")
    args = parser.parse_args(argv)

    complete_arguments(parser, args, Measurement, "decode", DEFAULTS)
    args.cases = args.cases or DEFAULT_CASES.get("" if args.model else args.shape, OTHER_CASES)
    try:
        args.rounds = int(args.rounds)
        args.lengths = [int(text) for text in args.lengths.split(",")]
        short, long = args.lengths
        args.cases = list(dict.fromkeys(Case.parse(text) for text in args.cases.split(",")))
    except ValueError as error:
        parser.error(str(error))
    if not 1 <= short < long or args.rounds < 1 or args.samples < 1:
        parser.error("needs 1 <= SHORT < LONG, and at least one round and one sample")
    model = read_config(args.model) if args.model else {}
    args.positions = model.get("max_position_embeddings", POSITIONS)
    for case in args.cases:
        if prompt_case(case, args).context < case.context * (1 - LARGEST_CUT):
            parser.error(f"{case} is too long for a model of {args.positions} positions")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table, or be its worker; returns the exit status."""
    if argv[:1] == ["--worker"]:
        serve_results(measure, json.loads(argv[1]))
        return 0
    args = parse_arguments(argv)
    rows: list[Measurement] = []
    skipped: list[str] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows, skipped), "decode")
    if rows:
        run = rows[0]
        print(f"\n{run.shape}, {run.dtype}, KV cache {run.kv_cache_dtype}, vLLM {run.vllm}")
        print(f"{run.machine}, {run.cores} cores")
        print(table(summarise(rows), args.lengths[1], args.budget_tokens, run.baseline))
    for line in dict.fromkeys(skipped):
        print(line)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
