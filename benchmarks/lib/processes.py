"""The parent of workers: their processes, and the folder of a run with its logs.

A speed benchmark's script runs twice: as the parent, which reads the command line, writes the CSV and prints,
and as the worker, one process per backend. Workers run one after another, so that an engine always has the
machine to itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

from benchmarks import ROOT
from benchmarks.lib.base import BenchmarkError, Json

LOG_TAIL_LINES = 60


def checkout_first() -> dict[str, str]:
    """The environment in which child processes import this checkout's packages, whatever is installed."""
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{others}" if others else str(ROOT)}


def run_worker(module: str, job: Json, log: Path) -> Generator[Json, None, None]:
    """The results of a worker as they come; raises BenchmarkError with the log's tail on failure.

    `module` is a script that takes "--worker" and a job. The worker leads a process group of its own, which
    never outlives this generator.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, "--worker", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, **checkout_first()},
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
