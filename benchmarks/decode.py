"""Decode speed of DELTA against a dense backend, inside vLLM.

    python benchmarks/decode.py                         # the platform's dense backend and DELTA
    python benchmarks/decode.py --shape tiny4 --cases 1x1k,1x4k --rounds 1
    python benchmarks/decode.py --backends CPU_ATTN,CPU_ATTN      # the noise of the method itself

What is measured: the time of one decode step of the whole engine (scheduler, model, sampler), for
`batch` sequences of `context` tokens each. How, and why so:

- The model has a real architecture and random weights. Its KV cache is filled with noise when the
  engine starts (vLLM's DecodeBenchConnector), so that long contexts cost no prefill. What a sparse
  layer selects is then arbitrary and scattered over the sequence: right for time, meaningless for
  quality.
- Requests are queued while the scheduler is paused, and start together: every timed step has the
  full batch.
- A step's time is the slope between two output lengths. It cancels whatever a request costs once:
  admission, the first step, the last transfer.
- Every measurement is a fresh process, and the backends alternate, `--rounds` times: a compiled
  graph, a warm cache or a slow minute of the machine favours nobody. A process takes the slope
  `--samples` times per case after a warm-up and reports the median.
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
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil  # type: ignore[import-untyped]
from common import Case, Measurement, Summary, append_csv, check_header, summarise
from environment import ROOT, describe_environment, find_machine, git_commit
from tqdm import tqdm  # type: ignore[import-untyped]

from vllm_delta.config import DeltaConfig

DELTA = "DELTA"
TOKEN_COUNTS = (
    "attended_tokens",
    "context_tokens",
    "sparse_attended_tokens",
    "sparse_context_tokens",
)
LOG_TAIL_LINES = 60
TABLE_HEAD = (
    *("case", "backend", "ms/step", "spread", "tok/s", "speed-up"),
    *("attended", "in sparse", "memory", "note"),
)
LEFT_ALIGNED = ("case", "backend", "note")

Json = dict[str, Any]


def _shape(
    *, layers: int, hidden: int, mlp: int, heads: tuple[int, int, int], vocab: int, kind: str = "qwen2"
) -> Json:
    query_heads, kv_heads, head_dim = heads
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": hidden <= 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


SHAPES: dict[str, Json] = {  # heads: query heads, KV heads, size of a head
    "tiny4": _shape(layers=4, hidden=512, mlp=1024, heads=(8, 2, 64), vocab=4096),
    "tiny28": _shape(layers=28, hidden=512, mlp=1024, heads=(8, 2, 64), vocab=4096),
    "qwen2.5-1.5b": _shape(layers=28, hidden=1536, mlp=8960, heads=(12, 2, 128), vocab=151936),
    "qwen2.5-7b": _shape(layers=28, hidden=3584, mlp=18944, heads=(28, 4, 128), vocab=152064),
    "qwen3-8b": _shape(layers=36, hidden=4096, mlp=12288, heads=(32, 8, 128), vocab=151936, kind="qwen3"),
}

DEFAULTS = {  # by platform
    "cpu": {"backends": "CPU_ATTN,DELTA", "shape": "tiny28", "cases": "1x1k,1x16k,4x16k,4x32k"},
    "cuda": {
        "backends": "FLASH_ATTN,DELTA",
        "shape": "qwen2.5-7b",
        "cases": "1x2k,1x32k,8x32k,16x32k",
    },
}


class BenchmarkError(Exception):
    """Stops the benchmark; the message is for the person who started it."""


# --- the worker: one process, one engine, one backend, all cases ---------------------------------


def worker(job: Json) -> None:
    """Time all cases of `job` with one engine; one line of JSON on stdout per case.

    vLLM also writes to stdout, from several processes: keep the original for the results and
    point file descriptor 1 at stderr, which is the log file.
    """
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from vllm import LLM, SamplingParams  # takes seconds, and writes to stdout

    llm = LLM(**job["engine"])
    short, long = (
        SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
        for length in job["lengths"]
    )
    for case in map(Case.parse, job["cases"]):
        print(json.dumps(measure(llm, case, job, short, long)), file=results, flush=True)


def measure(llm: Any, case: Case, job: Json, short: Any, long: Any) -> Json:
    """Slopes in ms per step, DELTA's counts over the timed part (empty for others), memory."""
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(2, job["vocab"]) for _ in range(case.context)]}
        for _ in range(case.batch)
    ]
    timed_generate(llm, prompts, long)  # warm-up: compilation, threads, caches
    before = delta_counts(llm, job)
    slopes = []
    for _ in range(job["samples"]):
        short_s = timed_generate(llm, prompts, short)
        long_s = timed_generate(llm, prompts, long)
        slopes.append((long_s - short_s) / (long.max_tokens - short.max_tokens) * 1000)
    return {
        "samples_ms": slopes,
        "counts": delta_counts(llm, job, since=before),
        "peak_memory_bytes": device_memory() if job["cuda"] else peak_rss(),
    }


def timed_generate(llm: Any, prompts: Sequence[Json], params: Any) -> float:
    """Seconds from releasing the scheduler until every prompt has all its output tokens."""
    llm.sleep(level=0)  # pauses the scheduler only
    llm.enqueue(prompts, params, use_tqdm=False)
    start = time.perf_counter()
    llm.wake_up(tags=["scheduling"])
    outputs = llm.wait_for_completion(use_tqdm=False)
    elapsed = time.perf_counter() - start
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    if lengths != [params.max_tokens] * len(prompts):
        raise RuntimeError(f"{len(prompts)} prompts, but outputs of {lengths} tokens")
    return elapsed


def delta_counts(llm: Any, job: Json, since: Json | None = None) -> Json:
    """DELTA's counters, summed over the workers, less `since`; empty for another backend."""
    if job["engine"]["attention_backend"] != DELTA:
        return {}
    from vllm_delta.counters import difference, total  # imports torch

    counts = total(llm.collective_rpc("delta_counters"))
    return difference(counts, since) if since else counts


def peak_rss() -> int | None:
    """Peak resident bytes, since its start, of the largest process below this one."""
    peaks = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peaks.append(int(line.split()[1]) * 1024)
    return max(peaks, default=None)


def device_memory() -> int | None:
    """Bytes in use on the fullest visible GPU: about the peak, since torch keeps what it had."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return max(int(line) for line in text.split()) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


# --- the parent: processes, checks, table --------------------------------------------------------


def run_worker(job: Json, log: Path) -> Generator[Json, None, None]:
    """The results of a worker as they come; raises BenchmarkError with the log's tail on failure.

    The worker leads a process group of its own, which never outlives this generator.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        received = 0
        for line in process.stdout:
            received += 1
            yield json.loads(line)
        if process.wait() != 0 or received != len(job["cases"]):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise BenchmarkError(
                f"{tail}\n\nthe engine with {job['engine']['attention_backend']} failed "
                f"(exit status {process.returncode}, {received} of {len(job['cases'])} cases "
                f"measured); above is the end of {log}"
            )
    finally:
        process.stdout.close()
        end_group(process)


def end_group(process: subprocess.Popen[str], grace_s: float = 10) -> None:
    """End the process and everything that it started: politely, then not."""
    deadline = time.monotonic() + grace_s
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_activity(case: Case, counts: Json, budget: int) -> Json:
    """The CSV's token counts; raises BenchmarkError if DELTA was not at work.

    A context that fits the budget is dense by design: then DELTA only has to have seen the rows.
    """
    sparse = counts["layers"]["sparse"]
    shown = f"Case {case}, counters of the timed part: {json.dumps(counts)}"
    if sum(layers["rows"] for layers in counts["layers"].values()) <= 0:
        raise BenchmarkError(f"DELTA handled no decode row. {shown}")
    if case.context > budget:
        if sparse["attended_tokens"] <= 0:
            raise BenchmarkError(f"DELTA's sparse layers attended to no token. {shown}")
        if sparse["attended_tokens"] >= sparse["context_tokens"]:
            raise BenchmarkError(
                f"DELTA's sparse layers attended to every token, although the context exceeds the "
                f"budget of {budget} tokens. {shown}"
            )
    return {
        "attended_tokens": counts["attended_tokens"],
        "context_tokens": counts["context_tokens"],
        "sparse_attended_tokens": sparse["attended_tokens"],
        "sparse_context_tokens": sparse["context_tokens"],
    }


def write_model(shape: str, folder: Path, positions: int) -> Path:
    """A model folder that holds only the config of `shape`, long enough for `positions` tokens."""
    model = folder / shape
    model.mkdir()
    config = SHAPES[shape] | {"max_position_embeddings": positions}
    (model / "config.json").write_text(json.dumps(config, indent=1))
    return model


def read_config(model: str | Path) -> Json:
    """The language model's part of the folder's config.json."""
    config: Json = json.loads((Path(model) / "config.json").read_text())
    text: Json = config.get("text_config", config)
    return text


def kv_cache_bytes(config: Json, cases: Sequence[Case], output: int, dtype: str) -> int:
    """What the largest case needs, with two spare blocks of 128 tokens per sequence."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads", heads)
    head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
    layers: int = config["num_hidden_layers"]
    per_token = layers * 2 * kv_heads * head_dim * (4 if dtype == "float32" else 2)
    tokens = max(c.batch * (math.ceil((c.context + output) / 128) + 2) * 128 for c in cases)
    return (tokens + 4 * 128) * per_token


def engine_arguments(args: argparse.Namespace, folder: Path) -> Json:
    """Arguments of vllm.LLM that all backends share."""
    positions = max(case.context for case in args.cases) + args.lengths[1] + 64
    model = args.model or write_model(args.shape, folder, positions)
    config = read_config(model)
    arguments: Json = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "max_model_len": positions,
        "max_num_seqs": max(case.batch for case in args.cases),
        "kv_cache_memory_bytes": kv_cache_bytes(config, args.cases, args.lengths[1], args.dtype),
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0, "startup_fill": True},
        },
    }
    arguments.update(args.engine)
    return arguments


def arm_names(backends: str) -> list[str]:
    """Backends in order; a repeated one gets a number, so that it is an arm of its own."""
    names = [name.strip().upper() for name in backends.split(",")]
    return [
        name if names[:i].count(name) == 0 else f"{name}#{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


def benchmark(args: argparse.Namespace, folder: Path) -> list[Measurement]:
    """Run all rounds; every measurement is in the CSV as soon as it is there."""
    arms = arm_names(args.backends)
    engine = engine_arguments(args, folder)
    shared = describe_run(args) | {"baseline": arms[0]}
    job = {
        "cases": [str(case) for case in args.cases],
        "lengths": args.lengths,
        "samples": args.samples,
        "vocab": read_config(engine["model"])["vocab_size"],
        "cuda": args.platform == "cuda",
    }
    rows = []
    total = args.rounds * len(arms) * len(args.cases)
    with tqdm(total=total, unit="case", dynamic_ncols=True) as progress:
        for round_, arm in ((r, arm) for r in range(1, args.rounds + 1) for arm in arms):
            progress.set_description(f"round {round_}/{args.rounds}, {arm}")
            job["engine"] = engine | backend_arguments(arm, args.delta)
            log = folder / f"{round_}-{arm}.log"
            with contextlib.closing(run_worker(job, log)) as results:
                for case, result in zip(args.cases, results, strict=True):
                    row = to_row(case, arm, result, args, shared | {"round": round_})
                    append_csv(args.csv, row)
                    rows.append(row)
                    progress.set_postfix_str(f"{case}: {row.ms_per_step:.2f} ms/step")
                    progress.update()
    return rows


def backend_arguments(arm: str, settings: Json) -> Json:
    """Arguments of vllm.LLM that make the arm."""
    backend = arm.partition("#")[0]
    arguments: Json = {"attention_backend": backend}
    if backend == DELTA and settings:
        arguments["additional_config"] = {"delta": settings}
    return arguments


def to_row(case: Case, arm: str, result: Json, args: argparse.Namespace, shared: Json) -> Measurement:
    """The CSV row of a worker's result; raises BenchmarkError if it cannot be right."""
    ms = median(result["samples_ms"])
    if ms <= 0:
        raise BenchmarkError(f"case {case}: a step of {ms} ms is noise; use longer outputs")
    is_delta = arm.partition("#")[0] == DELTA
    counts: Json = dict.fromkeys(TOKEN_COUNTS)
    if is_delta:
        counts = check_activity(case, result["counts"], args.budget_tokens)
    return Measurement(
        backend=arm,
        batch=case.batch,
        context=case.context,
        settings=json.dumps(args.delta if is_delta else {}, sort_keys=True),
        ms_per_step=round(ms, 4),
        tokens_per_second=round(case.batch * 1000 / ms, 2),
        samples_ms=" ".join(f"{sample:.4f}" for sample in result["samples_ms"]),
        peak_memory_bytes=result["peak_memory_bytes"],
        **counts,
        **shared,
    )


def describe_run(args: argparse.Namespace) -> Json:
    """The columns that all rows of this run share."""
    return describe_environment("benchmarks/decode.py") | {
        "commit": args.commit or git_commit(),
        "machine": args.machine,
        "shape": Path(args.model).name if args.model else args.shape,
        "dtype": args.dtype,
        "output_short": args.lengths[0],
        "output_long": args.lengths[1],
    }


def table(summaries: Sequence[Summary], longest_output: int, budget: int, baseline: str) -> str:
    """The summary as aligned text."""
    lines = [TABLE_HEAD] + [table_line(s, longest_output, budget) for s in summaries]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rendered = [
        "  ".join(
            cell.ljust(width) if column in LEFT_ALIGNED else cell.rjust(width)
            for column, cell, width in zip(TABLE_HEAD, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    legend = (
        "Medians over rounds. spread: (largest - smallest sample) / median in a process; speed-up: "
        f"{baseline} time / this time\nand its range over rounds; attended: share of the context's "
        "tokens that was read, in all layers and in sparse layers;\nmemory: peak RSS of the engine, "
        "or used device memory."
    )
    return "\n".join([*rendered, legend])


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
        "dense by design: fits the budget" if fits else "",
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Decode speed of DELTA against a dense backend, inside vLLM.",
        epilog="The module's docstring says what is measured and why so.",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, help="default: tiny28 (CPU), qwen2.5-7b (CUDA)")
    model.add_argument("--model", metavar="PATH", help="a model folder, instead of a shape")
    parser.add_argument("--backends", metavar="A,B", help="the first is the baseline")
    parser.add_argument("--cases", metavar="BxC,...", help="batch x context, such as 1x1k,4x16k")
    parser.add_argument("--rounds", type=int, default=3, help="processes per backend (3)")
    parser.add_argument("--samples", type=int, default=3, help="slopes per process and case (3)")
    parser.add_argument("--lengths", metavar="SHORT,LONG", default="8,72", help="outputs (8,72)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--delta", metavar="JSON", type=json.loads, default={}, help="settings")
    parser.add_argument(
        "--engine", metavar="JSON", type=json.loads, default={}, help="more arguments of vllm.LLM"
    )
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/decode_PLATFORM.csv")
    parser.add_argument("--commit", help="what to record where the tree is not a git checkout")
    args = parser.parse_args(argv)

    try:
        args.platform, args.machine = find_machine()
    except RuntimeError as error:
        parser.error(str(error))
    for name, value in DEFAULTS[args.platform].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.csv = args.csv or ROOT / "benchmarks" / "results" / f"decode_{args.platform}.csv"
    try:
        args.lengths = [int(text) for text in args.lengths.split(",")]
        short, long = args.lengths
        args.cases = list(dict.fromkeys(Case.parse(text) for text in args.cases.split(",")))
        args.budget_tokens = DeltaConfig.from_additional_config({"delta": args.delta}).budget_tokens
        check_header(args.csv)
    except ValueError as error:  # DeltaConfigError is one
        parser.error(str(error))
    if not 1 <= short < long or args.rounds < 1 or args.samples < 1:
        parser.error("needs 1 <= SHORT < LONG, and at least one round and one sample")
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"{args.model} is no folder with a config.json")
    if not isinstance(args.engine, dict):
        parser.error("--engine takes a JSON object")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table; returns the exit status."""
    args = parse_arguments(argv)
    cores = len(os.sched_getaffinity(0))
    if os.getloadavg()[0] > cores / 2:
        print("note: this machine is busy with other work; times will be noisy", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children end with us
    folder = Path(tempfile.mkdtemp(prefix="decode-benchmark-"))
    keep_logs = False
    try:
        rows = benchmark(args, folder)
    except BenchmarkError as error:
        keep_logs = True
        print(f"\n{error}\nlogs are kept in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is in the CSV", file=sys.stderr)
        return 130
    finally:
        if not keep_logs:
            shutil.rmtree(folder)
    run = rows[0]
    print(f"\n{run.shape}, {run.dtype}, vLLM {run.vllm}, {run.machine}, {run.cores} cores")
    print(table(summarise(rows), args.lengths[1], args.budget_tokens, run.baseline))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
