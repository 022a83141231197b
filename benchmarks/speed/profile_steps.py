"""What the host does in a decode step: the time of the engine's parts, with any backend, on a CPU or a GPU.

    python -m benchmarks.speed.profile_steps
    python -m benchmarks.speed.profile_steps --backends FLASH_ATTN,DELTA --cases 64x512,64x4k --steps 250
    python -m benchmarks.speed.profile_steps --shape tiny4 --cases 2x64 --steps 16

One process per backend holds the engine, its scheduler and its worker, and takes the time of a few of their
functions, twice: by the clock, and by the main thread's use of a processor. Prompts are computed; what counts
are the last steps, in which all requests decode. A part holds what it calls:

- step: a whole step, as a client in the same process sees it; on a GPU it may wait for an earlier one
- schedule: the scheduler's choice of requests and blocks
- execute_model: inputs, metadata, the model; on a GPU the launch alone
- attention_metadata: the backend's part of the inputs, inside execute_model; absent where graphs replace it
- sample_tokens: the sampler; on a GPU its launch
- update_from_output: the scheduler's reading of the new tokens
- process_outputs: the client's part, without a tokenizer here

DELTA's counters have to show that its layers were at work, or the script stops with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.activity import check_activity
from benchmarks.lib.base import Json, arm_names
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
from benchmarks.lib.rows import StepProfile
from benchmarks.lib.text import align
from benchmarks.lib.worker import delta_counts, engine_facts, random_prompts, serve_results, timed_generate

MODULE = "benchmarks.speed.profile_steps"
PARTS = (
    *("step", "schedule", "execute_model", "attention_metadata"),
    *("sample_tokens", "update_from_output", "process_outputs"),
)
TABLE_HEAD = ("case", "backend", "part", "calls per step", "ms", "ms on a processor")
LEFT_ALIGNED = ("case", "backend", "part")
DEFAULTS = {  # by platform
    "cpu": {"backends": "CPU_ATTN,DELTA", "shape": "tiny28", "cases": "8x64"},
    "cuda": {"backends": "FLASH_ATTN,DELTA", "shape": "qwen2.5-1.5b", "cases": "64x512,64x4k"},
}


class StepClock:
    """The calls in each step, by part: (seconds, seconds on a processor) of every one."""

    def __init__(self, llm: Any) -> None:
        from vllm.v1.worker.utils import AttentionGroup

        self.steps: list[dict[str, list[tuple[float, float]]]] = [{}]
        core = llm.llm_engine.engine_core.engine_core
        self._wrap("step", llm.llm_engine, "step")
        self._wrap("schedule", core.scheduler, "schedule")
        self._wrap("execute_model", core.model_executor, "execute_model")
        self._wrap("attention_metadata", AttentionGroup, "build_metadata")
        self._wrap("sample_tokens", core.model_executor, "sample_tokens")
        self._wrap("update_from_output", core.scheduler, "update_from_output")
        self._wrap("process_outputs", llm.llm_engine.output_processor, "process_outputs")

    def _wrap(self, part: str, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start, used = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                spent = (time.perf_counter() - start, time.thread_time() - used)
                self.steps[-1].setdefault(part, []).append(spent)
                if part == "step":
                    self.steps.append({})

        setattr(owner, name, timed)


def means(steps: Sequence[dict[str, list[tuple[float, float]]]]) -> dict[str, dict[str, float]]:
    """The columns of each part, over all `steps`."""
    calls = {part: [call for step in steps for call in step.get(part, ())] for part in PARTS}
    return {
        part: {
            "calls_per_step": round(len(times) / len(steps), 3),
            "ms_per_step": round(sum(wall for wall, _ in times) / len(steps) * 1000, 4),
            "cpu_ms_per_step": round(sum(used for _, used in times) / len(steps) * 1000, 4),
        }
        for part, times in calls.items()
    }


# --- the worker: one process with everything in it -----------------------------------------------


def measure(llm: Any, job: Json) -> Generator[Json, None, None]:
    """One result per case."""
    clock = StepClock(llm)
    for case in map(Case.parse, job["cases"]):
        prompts = random_prompts(case, job["vocab"])
        timed_generate(llm, prompts, 4)  # warm-up
        before = delta_counts(llm, job)
        clock.steps = [{}]
        output = output_of(case, job["steps"])
        # The first request ends `output` steps after its first token; by then the last has begun.
        if len(timed_generate(llm, prompts, output)) - output > output - job["steps"]:
            raise RuntimeError(f"{case}: requests began too far apart to decode together")
        counts = delta_counts(llm, job, since=before)
        parts = means(clock.steps[:output][-job["steps"] :])
        yield {"parts": parts, "counts": counts, "facts": engine_facts(llm, job)}


def output_of(case: Case, steps: int) -> int:
    """Tokens of an answer, so that all requests decode in `steps` steps; prompts take 2048 tokens a step."""
    return steps + case.batch * case.context // 2048 + 8


# --- the parent: rows, table ---------------------------------------------------------------------


def benchmark(args: argparse.Namespace, folder: Path, rows: list[StepProfile]) -> None:
    """One process per backend; every case's rows are in the CSV, and in `rows`, as soon as they are there."""
    lengths = [case.context + output_of(case, args.steps) for case in args.cases]
    needs = [Case(case.batch, length) for case, length in zip(args.cases, lengths, strict=True)]
    engine = engine_arguments(args, folder, needs)
    own = {"cases": [str(case) for case in args.cases], "steps": args.steps}
    shared = describe_run(args, f"-m {MODULE}") | {"kv_cache_dtype": args.kv_cache_dtype}
    for arm in arm_names(args.backends):
        job = worker_job(args, engine, arm) | own
        with contextlib.closing(run_worker(MODULE, job, folder / f"{arm}.log")) as results:
            for case, longest, result in zip(args.cases, lengths, results, strict=True):
                tokens = check_activity(f"Case {case}", result["counts"], longest, args.budget_tokens)
                where = {"requests": case.batch, "prompt": case.context, "steps": args.steps}
                where |= shared | describe_arm(args, arm) | tokens | result["facts"]
                for part, columns in result["parts"].items():
                    rows.append(StepProfile(part=part, **columns, **where))
                    append_csv(args.csv, rows[-1])


def table(rows: Sequence[StepProfile]) -> str:
    """The run as aligned text."""
    lines = [TABLE_HEAD]
    for row in rows:
        numbers = (f"{row.calls_per_step:g}", f"{row.ms_per_step:.3f}", f"{row.cpu_ms_per_step:.3f}")
        lines.append((str(Case(row.requests, row.prompt)), row.arm, row.part, *numbers))
    return align(lines, LEFT_ALIGNED)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Time of the host's parts of a decode step, inside vLLM.",
        epilog="The module's docstring names the parts.",
    )
    add_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--cases", metavar="BxC,...", help="requests x tokens of each prompt")
    parser.add_argument("--steps", type=int, default=100, help="timed, all requests decoding (100)")
    args = parser.parse_args(argv)
    complete_arguments(parser, args, StepProfile, "profile_steps", DEFAULTS)
    try:
        args.cases = [Case.parse(text) for text in args.cases.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if args.steps < 1:
        parser.error("needs at least one step")
    return args


def main(argv: Sequence[str]) -> int:
    """Take the profile and print it, or be the worker; returns the exit status."""
    if argv[:1] == ["--worker"]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
        serve_results(measure, json.loads(argv[1]))
        return 0
    args = parse_arguments(argv)
    rows: list[StepProfile] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows), "profile")
    if rows:
        print(f"\n{rows[0].shape}, {rows[0].dtype}, vLLM {rows[0].vllm}, {rows[0].machine}")
        print(table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
