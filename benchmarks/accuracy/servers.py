"""The servers of an accuracy benchmark, one per setting: their jobs, their counters, why one failed."""

from __future__ import annotations

import argparse
import json
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from server import Server, ServerError

from benchmarks.accuracy.settings import Setting
from benchmarks.lib.activity import check_activity
from benchmarks.lib.base import Json
from benchmarks.lib.processes import checkout_first
from vllm_delta.method.config import DeltaConfig

#: policies that read more than what they attend to, in order to choose: just above a budget, more than all
READ_MORE = ("quest",)


class RunningServer(Server):
    """A server that somebody else started, at `url`, with or without ``/v1``; it is left running."""

    def __init__(self, url: str) -> None:
        super().__init__("")
        self._url = url.rstrip("/").removesuffix("/v1")

    @property
    def base_url(self) -> str:
        """Where the server listens, without a path."""
        return self._url

    def start(self) -> None:
        """Ask for the name of the model."""
        try:
            with urllib.request.urlopen(f"{self._url}/v1/models", timeout=30) as response:
                self.model = str(json.load(response)["data"][0]["id"])
        except (OSError, ValueError, LookupError) as error:
            raise ServerError(f"{self._url}/v1/models does not name a model: {error}") from error

    def _failure(self, message: str) -> ServerError:
        return ServerError(message)


def server_jobs(args: argparse.Namespace, folder: Path, options: Sequence[str]) -> list[Json]:
    """One job per setting: how to reach or start its server; `options` are those of ``vllm serve``."""
    env = checkout_first()
    if args.model and not Path(args.model).is_dir():
        env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
    if args.parallel > 1 and args.platform == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // args.parallel)
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    jobs = []
    for number, setting in enumerate(args.expanded):
        own = ["--attention-backend", setting.backend]
        if setting.delta:
            own += ["--additional-config", json.dumps({"delta": setting.delta})]
        jobs.append(
            {
                "setting": asdict(setting),
                "url": args.url,
                "model": args.model,
                "options": [*options, *own, *args.server],
                "env": env,
                "log": str(folder / f"server{number}.log"),
                "concurrency": args.concurrency,
                "timeout": args.timeout,
            }
        )
    return jobs


def open_server(job: Json) -> Server:
    """The server of a job, not started yet."""
    if job["url"]:
        return RunningServer(job["url"])
    return Server(job["model"], job["options"], env=job["env"], log_path=Path(job["log"]))


def explain(error: Exception, job: Json) -> str:
    """Why a setting failed: in one line if ``vllm serve`` refuses it, and with the end of the log if not."""
    log = Path(job["log"])
    if isinstance(error, ServerError) and log.is_file():
        pattern = r"Value error, (.*?) \[type=|DeltaConfigError: (.*)"
        if match := re.search(pattern, log.read_text(errors="replace")):
            return f"vllm serve refuses it: {match[1] or match[2]}"
    return f"{type(error).__name__}: {error}"


def read_counters(server: Server, setting: Setting) -> Json:
    """DELTA's counters; empty for another backend."""
    return server.counters() if setting.is_delta else {}


def activity(what: str, setting: Setting, counts: Json, longest: int) -> Json:
    """The CSV's columns of attended tokens; raises BenchmarkError if DELTA was not at work.

    `longest` is the context of the longest decode row, 0 if there was none.
    """
    budget = int(setting.delta.get("budget_tokens", DeltaConfig.budget_tokens))
    if setting.delta.get("policy") in READ_MORE and longest:
        budget = longest  # then nothing has to have been saved
    tokens = check_activity(f"{setting.name}, {what}", counts if longest else {}, longest, budget)
    attended, context = tokens["attended_tokens"], tokens["context_tokens"]
    return tokens | {"attended_share": round(attended / context, 6) if context else None}
