"""What both accuracy benchmarks share: settings and their sweep, a server for each, several at a time by Ray.

A setting is a backend with a name and, for DELTA, the settings that the server gets. They are not checked
here: what is wrong with them, the server says. A benchmark's work on one setting is a function of a *job*,
which is plain JSON, and yields *records*, which are plain JSON too: it runs in this process or in a Ray task.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from common import Run, check_header
from engine import DELTA, BenchmarkError, Json, check_activity
from environment import ROOT, find_machine

from vllm_delta.cli.options import json_object
from vllm_delta.method.config import DeltaConfig

sys.path.append(str(ROOT / "tools"))

from server import Server, ServerError

Records = Generator[Json, None, None]
Work = Callable[[Json], Records]

#: the dense backend, by platform
DENSE = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}
#: options of a sweep, in the order in which they vary, the last one fastest: (key, its name in short)
SWEEPS = {
    "policies": ("policy", ""),
    "selection_layers": ("selection_layers", "layers"),
    "page_sizes": ("page_size", "page"),
    "recent_tokens": ("recent_tokens", "recent"),
    "sink_tokens": ("sink_tokens", "sinks"),
    "budgets": ("budget_tokens", "budget"),
}
#: policies that read more than what they attend to, in order to choose: just above a budget, more than all
READ_MORE = ("quest",)
#: seconds that Ray's tasks get to stop their servers
STOPPING = 60.0


# --- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What one server runs."""

    name: str
    backend: str
    delta: Json = field(default_factory=dict)

    @property
    def is_delta(self) -> bool:
        """Whether the server has DELTA's counters."""
        return self.backend == DELTA

    @property
    def columns(self) -> Json:
        """The CSV's columns that tell settings apart."""
        settings = json.dumps(self.delta, sort_keys=True)
        return {"setting": self.name, "backend": self.backend, "settings": settings}


def label(delta: Mapping[str, Any]) -> str:
    """Settings in a few words: "quest layers=2-6-9 budget=512", or "DELTA budget=512" without a policy."""
    short = dict(SWEEPS.values())
    words = [str(delta.get("policy", DELTA))]
    for key, value in delta.items():
        if key != "policy":
            shown = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{short.get(key, key)}={shown}")
    return " ".join(words)


def parse_numbers(text: str) -> list[int]:
    """Read "512,1024"; raises ValueError."""
    return [int(word) for word in text.split(",")]


def parse_words(text: str) -> list[str]:
    """Read "delta,quest"."""
    return [word.strip() for word in text.split(",")]


def parse_layers(text: str) -> list[list[int] | str]:
    """Read "2,6,9;3,5;auto"; raises ValueError."""
    return ["auto" if part.strip() == "auto" else parse_numbers(part) for part in text.split(";")]


def read_settings(path: Path) -> list[Setting]:
    """A list of {"name": ..., "backend": ..., "delta": {...}}, the last two optional; raises ValueError.

    From what ``vllm-delta calibrate`` wrote, come the layers that it compared, with its other settings.
    """
    entries = json.loads(path.read_text())
    if isinstance(entries, dict) and "calibration" in entries:
        try:
            entries = _compared(entries)
        except KeyError as error:
            raise ValueError(f"{path} lacks what a calibration compared: it has no {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of settings")
    settings = []
    for entry in entries:
        keys = entry.keys() if isinstance(entry, dict) else set()
        if "name" not in keys or not keys <= {"name", "backend", "delta"}:
            raise ValueError(f'{path}: a setting has "name", "backend" and "delta", not {json.dumps(entry)}')
        settings.append(Setting(**{"backend": DELTA, **entry}))
    return settings


def _compared(calibration: Json) -> list[Json]:
    names = ("full_layers", "selection_layers")
    return [
        {"name": name, "delta": calibration["delta"] | {key: found[key] for key in names}}
        for name, found in calibration["calibration"]["compared"].items()
    ]


def expand(args: argparse.Namespace, dense: str) -> list[Setting]:
    """The settings that `add_arguments`' options mean: dense ones, a file's, a sweep's; raises ValueError."""
    swept = {key: values for option, (key, _) in SWEEPS.items() if (values := getattr(args, option))}
    backends = [name.upper() for name in args.backends or ()]
    if args.url:
        if args.settings or swept or len(backends) > 1:
            raise ValueError("a server that runs already has one setting, which --url cannot change")
        return [Setting(args.name or "unnamed", (backends or ["unknown"])[0], args.delta)]
    listed = read_settings(args.settings) if args.settings else []
    if not backends:
        backends = ([DELTA] if swept or args.delta else []) if listed else [dense, DELTA]
    settings = [Setting(backend, backend) for backend in backends if backend != DELTA] + listed
    for values in product(*swept.values()) if DELTA in backends else ():
        changes = dict(zip(swept, values, strict=True))
        settings.append(Setting(label(changes), DELTA, args.delta | changes))
    names = [setting.name for setting in settings]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"every setting needs a name of its own; several have: {', '.join(sorted(twice))}")
    return settings


# --- servers -------------------------------------------------------------------------------------


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
    env: dict[str, str] = {}
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


# --- jobs ----------------------------------------------------------------------------------------


def run_jobs(
    args: argparse.Namespace, work: Work, jobs: Sequence[Json], take: Callable[[int, Json], None]
) -> list[str]:
    """Do all jobs, and give every record to `take`, with the number of its job, as soon as it is there.

    Returns what went wrong: records with "error", and BenchmarkErrors of `take`; neither stops the others.
    `work` is a function of a module beside this one.
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
    path = [str(ROOT / "benchmarks"), str(ROOT)]
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


# --- command line --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both accuracy benchmarks."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="that the servers load")
    model.add_argument("--url", help="of a server that runs already; asked as it is")
    parser.add_argument("--name", help="of the setting that --url has")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="JSON, or a calibration")
    parser.add_argument("--backends", metavar="A,B", type=parse_words, help="the dense one and DELTA")
    parser.add_argument("--delta", metavar="JSON", type=json_object, default={}, help="settings of the sweep")
    parser.add_argument("--policies", metavar="A,B", type=parse_words, help="sweep of delta.policy")
    parser.add_argument("--budgets", metavar="N,N", type=parse_numbers, help="sweep of delta.budget_tokens")
    parser.add_argument("--page-sizes", metavar="N,N", type=parse_numbers, help="sweep of delta.page_size")
    parser.add_argument("--recent-tokens", metavar="N,N", type=parse_numbers, help="likewise")
    parser.add_argument("--sink-tokens", metavar="N,N", type=parse_numbers, help="likewise")
    parser.add_argument(
        "--selection-layers", metavar="I,J;K", type=parse_layers, help="sweep of delta.selection_layers"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=16, help="questions at a time per server (16)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="servers at a time, by Ray (1)")
    parser.add_argument("--timeout", type=float, default=14400, help="seconds to wait for an answer (14400)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/SCRIPT_PLATFORM.csv")
    parser.add_argument("--commit", help="what to record where the tree is not a git checkout")


def complete_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, kind: type[Run], script: str
) -> None:
    """Check what `add_arguments` added and fill in defaults; exits with a message if something is wrong.

    Adds `platform`, `machine`, `shape` (the model's name with `--url`) and `expanded` (the settings).
    """
    if min(args.concurrency, args.parallel, args.timeout) < 1 or args.seed < 0:
        parser.error("needs at least one question, server and second, and a seed of at least zero")
    try:
        args.platform, args.machine = find_machine()
        args.csv = args.csv or ROOT / "benchmarks" / "results" / f"{script}_{args.platform}.csv"
        check_header(args.csv, kind)
        args.expanded = expand(args, DENSE[args.platform])
        args.shape = None
        if args.url:
            with RunningServer(args.url) as server:
                args.shape = Path(server.model).name
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
