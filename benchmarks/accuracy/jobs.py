"""Jobs of an accuracy benchmark: one after another, or several at a time by Ray.

A benchmark's work on one setting is a function of a *job*, which is plain JSON, and yields *records*, which
are plain JSON too: it runs in this process or in a Ray task.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from benchmarks import ROOT
from benchmarks.lib.base import BenchmarkError, Json

Records = Generator[Json, None, None]
Work = Callable[[Json], Records]

#: seconds that Ray's tasks get to stop their servers
STOPPING = 60.0


def run_jobs(
    args: argparse.Namespace, work: Work, jobs: Sequence[Json], take: Callable[[int, Json], None]
) -> list[str]:
    """Do all jobs, and give every record to `take`, with the number of its job, as soon as it is there.

    Returns what went wrong: records with "error", and BenchmarkErrors of `take`; neither stops the others.
    `work` is a function at the top of a module.
    """
    errors = []
    together = min(args.parallel, len(jobs))
    if together > 1 and importlib.util.find_spec("ray") is None:
        print("note: Ray is not installed; settings run one after another", file=sys.stderr)
        together = 1
    stream = _with_ray(work, jobs, together, args.platform) if together > 1 else _in_turn(work, jobs)
    with contextlib.closing(stream):
        for number, record in stream:
            if "error" in record:
                errors.append(f"{jobs[number]['setting']['name']}: {record['error']}")
                continue
            try:
                take(number, record)
            except BenchmarkError as error:
                errors.append(str(error))
    return errors


def raise_errors(errors: Sequence[str]) -> None:
    """Raise BenchmarkError with all of them, if there are any."""
    if errors:
        raise BenchmarkError("\n\n".join(errors))


def _in_turn(work: Work, jobs: Sequence[Json]) -> Generator[tuple[int, Json], None, None]:
    for number, job in enumerate(jobs):
        with contextlib.closing(work(job)) as records:
            for record in records:
                yield number, record


def _with_ray(
    work: Work, jobs: Sequence[Json], together: int, platform: str
) -> Generator[tuple[int, Json], None, None]:
    """One task per job, `together` at a time, each with a GPU of its own where there are GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = importlib.import_module("ray")

    def task(path: list[str], module: str, name: str, job: Json) -> Records:
        # Being local, it travels by value: a worker finds its modules only when the path is set.
        sys.path[:0] = path
        yield from getattr(importlib.import_module(module), name)(job)

    here: Json = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
    if platform == "cpu" and here:
        here["num_cpus"] = max(together, len(os.sched_getaffinity(0)))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level="ERROR", **here)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's would abort this process, and leave servers behind
    remote = ray.remote(task).options(
        num_returns="streaming", num_cpus=1, num_gpus=int(platform == "cuda"), max_retries=0
    )
    path = [str(ROOT)]
    waiting = list(enumerate(jobs))
    active: dict[Any, int] = {}
    try:
        while waiting or active:
            while waiting and len(active) < together:
                number, job = waiting.pop(0)
                active[remote.remote(path, work.__module__, work.__name__, job)] = number
            (stream,), _ = ray.wait(list(active), num_returns=1, fetch_local=False)
            try:
                record = ray.get(next(stream))
            except StopIteration:
                del active[stream]
            else:
                yield active[stream], record
    finally:
        _end(active)
        ray.shutdown()


def _end(streams: Mapping[Any, int]) -> None:
    """Cancel what runs, and wait for it: a task's last act is to stop its server."""
    ray: Any = importlib.import_module("ray")

    for stream in streams:
        ray.cancel(stream)
    for stream in streams:
        while ray.wait([stream], timeout=STOPPING, fetch_local=False)[0]:
            try:
                ray.get(next(stream))
            except StopIteration:
                break
            except ray.exceptions.RayError:
                pass
