"""What the benchmarks share: model shapes, options, and one engine in a process of its own.

A benchmark's script runs twice: as the parent, which reads the command line, writes the CSV and prints,
and as the worker, one process per backend, which holds the engine and sends one line of JSON per result.
Workers run one after another, so that an engine always has the machine to itself.
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
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from common import Case, Run, check_header
from environment import ROOT, describe_environment, find_machine, git_commit

from vllm_delta.method.config import DeltaConfig

DELTA = "DELTA"
LOG_TAIL_LINES = 60
#: positions of every shape
POSITIONS = 131072
#: positions that an engine has beyond the longest sequence
SPARE_POSITIONS = 64
#: bytes of a cached number, by vLLM's name; names that are not here have one byte
CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

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
        "max_position_embeddings": POSITIONS,
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


class BenchmarkError(Exception):
    """Stops the benchmark; the message is for the person who started it."""


# --- the worker ----------------------------------------------------------------------------------


def serve_results(measure: Callable[[Any, Json], Generator[Json, None, None]], job: Json) -> None:
    """Start the engine of `job` and print what `measure` yields, one line of JSON per result.

    vLLM also writes to stdout, from several processes: keep the original for the results and
    point file descriptor 1 at stderr, which is the log file.
    """
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from vllm import LLM  # takes seconds, and writes to stdout

    llm = LLM(**job["engine"])
    for result in measure(llm, job):
        print(json.dumps(result), file=results, flush=True)


def sampling(output: int) -> Any:
    """Greedy parameters for exactly `output` tokens, which nobody reads."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=output, temperature=0, ignore_eos=True, detokenize=False)


def random_prompts(case: Case, vocab: int) -> list[Json]:
    """`case.batch` prompts of `case.context` random tokens, the same in every process."""
    rng = random.Random(0)
    return [
        {"prompt_token_ids": [rng.randrange(2, vocab) for _ in range(case.context)]}
        for _ in range(case.batch)
    ]


def timed_generate(llm: Any, prompts: Sequence[Json], output: int) -> list[float]:
    """Seconds from the start to each engine step's result; the last is when every prompt has its output.

    Requests are queued while the scheduler is paused, and start together.
    """
    llm.sleep(level=0)  # pauses the scheduler only
    llm.enqueue(prompts, sampling(output), use_tqdm=False)
    lengths, times = [], []
    start = time.perf_counter()
    llm.wake_up(tags=["scheduling"])
    while llm.llm_engine.has_unfinished_requests():
        finished = llm.llm_engine.step()
        times.append(time.perf_counter() - start)
        lengths += [len(request.outputs[0].token_ids) for request in finished]
    if lengths != [output] * len(prompts):
        raise RuntimeError(f"{len(prompts)} prompts, but outputs of {lengths} tokens")
    return times


def delta_counts(llm: Any, job: Json, since: Json | None = None) -> Json:
    """DELTA's counters, summed over the workers, less `since`; empty for another backend."""
    if job["engine"]["attention_backend"] != DELTA:
        return {}
    from vllm_delta.method.counters import difference, total  # imports torch

    counts = total(llm.collective_rpc("delta_counters"))
    return difference(counts, since) if since else counts


def engine_facts(llm: Any, job: Json) -> Json:
    """What the engine holds, for the CSV."""
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "kv_capacity_tokens": cache.num_gpu_blocks * cache.block_size,
        "peak_memory_bytes": device_memory() if job["cuda"] else peak_rss(),
    }


def lack_of_cache(llm: Any, case: Case) -> str | None:
    """Why the KV cache cannot hold `case` (context: a sequence's last length) at once; None if it can."""
    cache = llm.llm_engine.vllm_config.cache_config
    needed = case.batch * math.ceil(case.context / cache.block_size)
    available = cache.num_gpu_blocks - 1  # vLLM keeps one that is always empty
    if needed <= available:
        return None
    return (
        f"{case.batch} sequences of {case.context} tokens need {needed * cache.block_size} tokens "
        f"of KV cache, and the engine has {available * cache.block_size}"
    )


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


# --- the parent: processes, checks ---------------------------------------------------------------


def run_worker(script: str, job: Json, log: Path) -> Generator[Json, None, None]:
    """The results of a worker as they come; raises BenchmarkError with the log's tail on failure.

    The worker leads a process group of its own, which never outlives this generator.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise BenchmarkError(
                f"{tail}\n\nthe engine with {job['engine']['attention_backend']} failed "
                f"(exit status {process.returncode}); above is the end of {log}"
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


def check_activity(what: str, counts: Json, longest: int, budget: int) -> Json:
    """The CSV's token counts; raises BenchmarkError if DELTA was not at work.

    Sequences of `longest` tokens that fit the budget are dense by design: then DELTA only has to have seen
    the rows. Without `counts`, of a backend that does not count, the columns are None.
    """
    if not counts:
        names = ("attended_tokens", "context_tokens")
        return dict.fromkeys([*names, *(f"sparse_{name}" for name in names)])
    sparse = counts["layers"]["sparse"]
    shown = f"{what}, counters of the timed part: {json.dumps(counts)}"
    if sum(layers["rows"] for layers in counts["layers"].values()) <= 0:
        raise BenchmarkError(f"DELTA handled no decode row. {shown}")
    if longest > budget:
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


# --- the parent: models and engine arguments -----------------------------------------------------


def write_model(shape: str, folder: Path) -> Path:
    """A model folder that holds only the config of `shape`."""
    model = folder / shape
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    return model


def read_config(model: str | Path) -> Json:
    """The language model's part of the folder's config.json."""
    config: Json = json.loads((Path(model) / "config.json").read_text())
    text: Json = config.get("text_config", config)
    return text


def kv_cache_bytes(config: Json, needs: Sequence[Case], dtype: str) -> int:
    """What the largest of `needs` takes, with two spare blocks of 128 tokens per sequence."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads", heads)
    head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
    layers: int = config["num_hidden_layers"]
    per_token = layers * 2 * kv_heads * head_dim * CACHE_BYTES.get(dtype, 1)
    tokens = max(need.batch * (math.ceil(need.context / 128) + 2) * 128 for need in needs)
    return (tokens + 4 * 128) * per_token


def engine_arguments(args: argparse.Namespace, folder: Path, needs: Sequence[Case]) -> Json:
    """Arguments of vllm.LLM that all backends share; `needs` has the sequences' last lengths as context.

    On a GPU the cache takes what vLLM finds free, so that its size shows what a backend holds itself.
    """
    model = args.model or write_model(args.shape, folder)
    config = read_config(model)
    limit = config.get("max_position_embeddings", POSITIONS)
    arguments: Json = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "max_model_len": min(limit, max(need.context for need in needs) + SPARE_POSITIONS),
        "max_num_seqs": max(need.batch for need in needs),
        "enable_prefix_caching": False,
    }
    if args.platform == "cpu":
        dtype = args.dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(config, needs, dtype)
    arguments.update(args.engine)
    return arguments


def worker_job(args: argparse.Namespace, engine: Json, arm: str) -> Json:
    """What every worker is told; a benchmark adds its own."""
    backend = arm.partition("#")[0]
    own: Json = {"attention_backend": backend}
    if backend == DELTA and args.delta:
        own["additional_config"] = {"delta": args.delta}
    return {
        "engine": engine | own,
        "vocab": read_config(engine["model"])["vocab_size"],
        "cuda": args.platform == "cuda",
    }


def arm_names(backends: str) -> list[str]:
    """Backends in order; a repeated one gets a number, so that it is an arm of its own."""
    names = [name.strip().upper() for name in backends.split(",")]
    return [
        name if names[:i].count(name) == 0 else f"{name}#{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


# --- the parent: command line --------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that runs vLLM."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, help="the default depends on the platform")
    model.add_argument("--model", metavar="PATH", help="a model folder, instead of a shape")
    parser.add_argument("--backends", metavar="A,B", help="the first is the baseline")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--delta", metavar="JSON", type=json.loads, default={}, help="settings")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/SCRIPT_PLATFORM.csv")
    parser.add_argument("--commit", help="what to record where the tree is not a git checkout")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks whose workers hold an engine."""
    parser.add_argument("--kv-cache-dtype", default="auto", help="as in vLLM, such as fp8 (auto)")
    parser.add_argument(
        "--engine", metavar="JSON", type=json.loads, default={}, help="more arguments of vllm.LLM"
    )


def complete_arguments(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    kind: type[Run],
    script: str,
    defaults: Mapping[str, Mapping[str, str]],
) -> None:
    """Check what `add_arguments` and `add_engine_arguments` added, and fill in the platform's defaults.

    Adds `platform`, `machine` and `budget_tokens`; exits with a message if something is wrong.
    """
    try:
        args.platform, args.machine = find_machine()
    except RuntimeError as error:
        parser.error(str(error))
    for name, value in defaults[args.platform].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.csv = args.csv or ROOT / "benchmarks" / "results" / f"{script}_{args.platform}.csv"
    try:
        args.budget_tokens = DeltaConfig.from_additional_config({"delta": args.delta}).budget_tokens
        check_header(args.csv, kind)
    except ValueError as error:  # DeltaConfigError is one
        parser.error(str(error))
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"{args.model} is no folder with a config.json")
    if not isinstance(getattr(args, "engine", {}), dict):
        parser.error("--engine takes a JSON object")


def describe_run(args: argparse.Namespace, script: str) -> Json:
    """The columns of `common.Run` that all rows of this run share."""
    return describe_environment(f"benchmarks/{script}.py") | {
        "commit": args.commit or git_commit(),
        "machine": args.machine,
        "shape": Path(args.model).name if args.model else args.shape,
        "dtype": args.dtype,
    }


def describe_arm(args: argparse.Namespace, arm: str) -> Json:
    """The columns of `common.Run` that tell an arm from others."""
    settings = args.delta if arm.partition("#")[0] == DELTA else {}
    return {"backend": arm, "settings": json.dumps(settings, sort_keys=True)}


def run_benchmark(benchmark: Callable[[Path], None], name: str) -> int:
    """Run `benchmark` in a folder of its own, which is kept if it fails; returns the exit status."""
    cores = len(os.sched_getaffinity(0))
    if os.getloadavg()[0] > cores / 2:
        print("note: this machine is busy with other work; times will be noisy", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children end with us
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-benchmark-"))
    keep_logs = False
    try:
        benchmark(folder)
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
    return 0
