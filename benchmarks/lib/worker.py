"""The worker of a speed benchmark: a process that holds one engine, and sends one line of JSON per result."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.lib.base import DELTA, Json
from benchmarks.lib.cases import Case


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
    return timed_ends(llm, prompts, output)[0]


def timed_ends(llm: Any, prompts: Sequence[Json], output: int) -> tuple[list[float], list[float]]:
    """The same, and the seconds to each sequence's end: not the same where drafts are accepted."""
    llm.sleep(level=0)  # pauses the scheduler only
    llm.enqueue(prompts, sampling(output), use_tqdm=False)
    lengths: list[int] = []
    times: list[float] = []
    ends: list[float] = []
    start = time.perf_counter()
    llm.wake_up(tags=["scheduling"])
    while llm.llm_engine.has_unfinished_requests():
        finished = llm.llm_engine.step()
        times.append(time.perf_counter() - start)
        lengths += [len(request.outputs[0].token_ids) for request in finished]
        ends += [times[-1]] * len(finished)
    if lengths != [output] * len(prompts):
        raise RuntimeError(f"{len(prompts)} prompts, but outputs of {lengths} tokens")
    return times, ends


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
