"""Long answers, as the paper measures them: real generation, from the prompt to the last token.

    python benchmarks/generate.py
    python benchmarks/generate.py --prefill 64x16k          # and decode steps after a real prefill
    python benchmarks/generate.py --shape tiny4 --requests 2 --output 96 --bin 16 --ttft-prompt 256

The setting is that of the paper's end-to-end figure (arXiv 2510.09883: 64 requests to a model of the
qwen2.5-1.5b shape, 18,000 tokens of output each). One fresh process per backend measures, with random
weights, real prefill and no prefix caching:

- generate: the time from the start to the last token of all requests. The time of a step grows with the
  position in the output; it is recorded as the mean over every `--bin` tokens.
- ttft: the time to the first token of one long prompt. Prefill is full attention with every backend.
- prefill, where asked for: the mean decode step of a batch whose prompts were really computed, over the
  steps in which all of it decodes. `decode.py` fills the cache with noise instead.

Random weights write random text. That is right for time, and says nothing about quality. DELTA's counters
have to show that its sparse layers were at work, or the benchmark stops with an error.

Rows are appended to a CSV as soon as they are there; `plot_generate.py` turns it into a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.lib.activity import check_activity
from benchmarks.lib.base import BenchmarkError, Json, arm_names
from benchmarks.lib.cases import Case
from benchmarks.lib.csv_rows import append_csv
from benchmarks.lib.models import engine_arguments, worker_job
from benchmarks.lib.options import (
    add_arguments,
    add_engine_arguments,
    complete_arguments,
    describe_arm,
    describe_run,
)
from benchmarks.lib.processes import run_benchmark, run_worker
from benchmarks.lib.rows import Generation
from benchmarks.lib.text import align
from benchmarks.lib.worker import (
    delta_counts,
    engine_facts,
    lack_of_cache,
    random_prompts,
    serve_results,
    timed_generate,
)

MODULE = "benchmarks.speed.generate"
TABLE_HEAD = ("part", "backend", "time, ms", "tok/s", "speed-up", "memory", "KV capacity", "samples, ms")
LEFT_ALIGNED = ("part", "backend", "samples, ms")
#: output tokens of a warm-up
WARM_UP = 16

DEFAULTS = {  # by platform
    "cpu": {"backends": "CPU_ATTN,DELTA", "shape": "tiny28"},
    "cuda": {"backends": "FLASH_ATTN,DELTA", "shape": "qwen2.5-1.5b"},
}


# --- the worker: one process, one engine, one backend --------------------------------------------


def measure(llm: Any, job: Json) -> Generator[Json, None, None]:
    """The parts in order; each with the columns of `Generation` that are its own."""
    yield measure_first_token(llm, job) | {"facts": engine_facts(llm, job)}
    yield measure_generation(llm, job) | {"facts": engine_facts(llm, job)}
    if job["prefill"]:
        yield measure_prefilled(llm, job) | {"facts": engine_facts(llm, job)}


def measure_first_token(llm: Any, job: Json) -> Json:
    """Time to first token of one prompt, after one that is not timed."""
    case = Case(1, job["ttft_prompt"])
    prompts = random_prompts(case, job["vocab"])
    timed_generate(llm, prompts, 1)
    samples = [timed_generate(llm, prompts, 1)[-1] * 1000 for _ in range(job["ttft_rounds"])]
    return columns("ttft", case, 1) | {"milliseconds": median(samples), "samples": samples, "counts": {}}


def measure_generation(llm: Any, job: Json) -> Json:
    """Time of all outputs, and the mean step per `bin` tokens of output."""
    case, output, width = Case(job["requests"], job["prompt"]), job["output"], job["bin"]
    check_cache(llm, Case(case.batch, case.context + output))
    prompts = random_prompts(case, job["vocab"])
    timed_generate(llm, prompts, min(WARM_UP, output))
    before = delta_counts(llm, job)
    times = timed_generate(llm, prompts, output)
    counts = delta_counts(llm, job, since=before)
    steps = decode_steps(times, output)
    bins = [fmean(steps[i : i + width]) * 1000 for i in range(0, len(steps), width)]
    return columns("generate", case, output) | {
        "milliseconds": times[-1] * 1000,
        "tokens_per_second": round(case.batch * output / times[-1], 1),
        "bin_tokens": width,
        "samples": bins,
        "counts": counts,
    }


def measure_prefilled(llm: Any, job: Json) -> Json:
    """Mean decode step of a batch with computed prompts, while all of it decodes."""
    case, output = Case.parse(job["prefill"]), job["prefill_output"]
    check_cache(llm, Case(case.batch, case.context + output))
    prompts = random_prompts(case, job["vocab"])
    before = delta_counts(llm, job)
    samples = []
    for _ in range(job["prefill_rounds"]):
        times = timed_generate(llm, prompts, output)
        # The first request ends `output` steps after its first token; by then the last has begun.
        steps = decode_steps(times[:output], output - (len(times) - output))
        samples.append(fmean(steps) * 1000)
    step = median(samples)
    return columns("prefill", case, output) | {
        "milliseconds": step,
        "tokens_per_second": round(case.batch * 1000 / step, 1),
        "samples": samples,
        "counts": delta_counts(llm, job, since=before),
    }


def columns(part: str, case: Case, output: int) -> Json:
    """What was run, and the columns that not all parts fill."""
    return {
        "part": part,
        "requests": case.batch,
        "prompt": case.context,
        "output": output,
        "tokens_per_second": None,
        "bin_tokens": None,
    }


def check_cache(llm: Any, case: Case) -> None:
    """Raise RuntimeError if sequences would wait for one another."""
    if reason := lack_of_cache(llm, case):
        raise RuntimeError(reason)


def decode_steps(times: Sequence[float], output: int) -> list[float]:
    """Seconds of each of the last `output` - 1 steps, in which the requests that began last decode.

    Raises RuntimeError if so few steps have all requests that they began too far apart.
    """
    if output < len(times) / 2 or output < 2:
        raise RuntimeError(f"{len(times)} steps for {output} tokens: requests did not run together")
    last = times[-output:]
    return [after - before for before, after in pairwise(last)]


# --- the parent: rows, table ---------------------------------------------------------------------


def benchmark(args: argparse.Namespace, folder: Path, rows: list[Generation]) -> None:
    """One process per backend; every part is in the CSV, and in `rows`, as soon as it is there."""
    needs = [Case(args.requests, args.prompt + args.output), Case(1, args.ttft_prompt + 1)]
    if args.prefill:
        needs.append(Case(args.prefill.batch, args.prefill.context + args.prefill_output))
    engine = engine_arguments(args, folder, needs)
    names = ("requests", "prompt", "output", "bin", "ttft_prompt", "ttft_rounds")
    own = {name: getattr(args, name) for name in (*names, "prefill_output", "prefill_rounds")}
    own["prefill"] = str(args.prefill) if args.prefill else None
    shared = describe_run(args, "benchmarks/generate.py")
    arms = arm_names(args.backends)
    with tqdm(total=len(arms) * (3 if args.prefill else 2), unit="part", dynamic_ncols=True) as progress:
        for arm in arms:
            progress.set_description(arm)
            job = worker_job(args, engine, arm) | own
            with contextlib.closing(run_worker(MODULE, job, folder / f"{arm}.log")) as results:
                for result in results:
                    row = to_row(result, args, shared | describe_arm(args, arm))
                    append_csv(args.csv, row)
                    rows.append(row)
                    progress.update()
                    progress.set_postfix_str(f"{row.part}: {row.milliseconds:.1f} ms")


def to_row(result: Json, args: argparse.Namespace, shared: Json) -> Generation:
    """The CSV row of a worker's result; raises BenchmarkError if DELTA was not at work."""
    samples, counts, facts = (result.pop(name) for name in ("samples", "counts", "facts"))
    if result["milliseconds"] <= 0:
        raise BenchmarkError(f"{result['part']}: {result['milliseconds']} ms cannot be right")
    result["milliseconds"] = round(result["milliseconds"], 3)
    longest = result["prompt"] + result["output"]
    return Generation(
        samples_ms=" ".join(f"{sample:.4f}" for sample in samples),
        kv_cache_dtype=args.kv_cache_dtype,
        **result,
        **facts,
        **check_activity(result["part"], counts, longest, args.budget_tokens),
        **shared,
    )


def table(rows: Sequence[Generation]) -> str:
    """The run as aligned text; speed-ups refer to the first backend."""
    baseline = {row.part: row.milliseconds for row in rows if row.arm == rows[0].arm}
    lines = [TABLE_HEAD]
    for row in sorted(rows, key=lambda row: list(baseline).index(row.part)):
        samples = [f"{sample:.2f}" for sample in row.samples]
        lines.append(
            (
                row.part,
                row.arm,
                f"{row.milliseconds:.2f}",
                "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}",
                "-" if row.arm == rows[0].arm else f"{baseline[row.part] / row.milliseconds:.2f}x",
                "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f} GiB",
                str(row.kv_capacity_tokens),
                " ".join(samples if len(samples) <= 8 else [*samples[:3], "...", *samples[-3:]]),
            )
        )
    return align(lines, LEFT_ALIGNED)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Time of long answers, with DELTA and a dense backend, inside vLLM.",
        epilog="The module's docstring says what is measured and why so.",
    )
    add_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--requests", type=int, default=64, help="that generate together (64)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--output", type=int, default=18000, help="tokens of each answer (18000)")
    parser.add_argument("--bin", type=int, default=1000, help="output tokens per mean step time (1000)")
    parser.add_argument("--ttft-prompt", type=int, default=32768, help="tokens of the long prompt (32768)")
    parser.add_argument("--ttft-rounds", type=int, default=3, help="timed first tokens (3)")
    parser.add_argument("--prefill", metavar="BxC", type=Case.parse, help="a decode case to prefill (none)")
    parser.add_argument("--prefill-output", type=int, default=256, help="tokens of its answers (256)")
    parser.add_argument("--prefill-rounds", type=int, default=2, help="how often (2)")
    args = parser.parse_args(argv)
    complete_arguments(parser, args, Generation, "generate", DEFAULTS)
    sizes = (args.requests, args.prompt, args.bin, args.ttft_prompt, args.ttft_rounds, args.prefill_rounds)
    if min(sizes) < 1 or min(args.output, args.prefill_output) < 2:
        parser.error("needs outputs of at least two tokens, and at least one of everything else")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table, or be its worker; returns the exit status."""
    if argv[:1] == ["--worker"]:
        serve_results(measure, json.loads(argv[1]))
        return 0
    args = parse_arguments(argv)
    rows: list[Generation] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows), "generate")
    if rows:
        run = rows[0]
        print(f"\n{run.shape}, {run.dtype}, vLLM {run.vllm}, {run.machine}, {run.cores} cores")
        print(table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
