"""A commit in a worktree of its own: built, tested and measured there, and nothing of it left behind.

What runs there imports that commit's package, whatever is installed: its folder stands first on Python's
path, with metadata of its own, by which vLLM finds its plugins.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.lib.base import BenchmarkError
from benchmarks.lib.processes import end_group

#: columns that distinguish a benchmark's cases, in their order: those whose values are words, and numbers
WORDS = ("shape", "dtype", "kv_cache_dtype", "kernel", "layer", "part", "backend", "settings")
NUMBERS = ("batch", "context", "requests", "prompts", "prompt", "input", "output", "request_rate")
#: what is compared: the first column that a CSV has, and its name here
METRICS = {
    "ms_per_step": "ms_per_step",
    "microseconds": "microseconds",
    "us": "microseconds",
    "milliseconds": "milliseconds",
    "median_tpot_ms": "median_tpot_ms",
}
#: values that say nothing of a case
USUAL = ("bfloat16", "auto", "{}", "")


#: seconds or other times by case and metric
Values = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Checkout:
    """A commit's worktree."""

    name: str  # as it was asked for, with the short hash if that is another
    commit: str  # the short hash
    folder: Path
    logs: Path

    def run(self, what: str, words: Sequence[str], *, fails: str) -> str:
        """What a Python command prints there, the log of which is kept; raises BenchmarkError.

        Args:
            what: names the log.
            words: behind ``python``.
            fails: the error's sentence, which names the last line of the log.
        """
        log = self.logs / f"{what}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        try:
            status = process.wait()
        finally:
            end_group(process)
        text = log.read_text(errors="replace").strip()
        if status:
            last = text.splitlines()[-1] if text else "it printed nothing"
            raise BenchmarkError(f"{fails} ({last}).")
        return text

    def _environment(self) -> dict[str, str]:
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        others = [path for path in others if not (Path(path) / "vllm_delta").exists()]
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), *others])}

    def build(self) -> None:
        """Build the CPU's extension, and make sure that this commit's package is the one that is imported."""
        build = ["setup.py", "-q", "egg_info", "build_ext", "--inplace"]
        self.run("build", build, fails=f"{self.name} does not build")
        where = "import vllm_delta; print(vllm_delta.__file__)"
        text = self.run("import", ["-c", where], fails=f"the package of {self.name} cannot be imported")
        if not Path(text.splitlines()[-1]).resolve().is_relative_to(self.folder.resolve()):
            raise BenchmarkError(f"another package is imported than that of {self.name}.")

    def test(self, *, gpu: bool) -> None:
        """Run the commit's kernel tests; raises BenchmarkError if one fails."""

        def there(*names: str) -> list[str]:
            return [f"tests/{name}" for name in names if (self.folder / "tests" / name).is_file()]

        found = there("test_contract.py", "test_kernels.py")[:1]
        if gpu:
            found += there("test_gpu_kernels.py")
        if not found:
            raise BenchmarkError(f"{self.name} has no kernel tests, so it is not timed.")
        words = ["-m", "pytest", "-q", "-x", "-m", "not slow", *found]
        self.run("tests", words, fails=f"the kernel tests of {self.name} are red, so nothing is timed")

    def measure(self, bench: str, options: Sequence[str], csv_option: str, round_: int) -> Values:
        """The values of a benchmark's cases, by case and metric."""
        path = self.logs / f"{bench}-{round_}.csv"
        words = [f"benchmarks/{bench}.py", csv_option, str(path), *options]
        self.run(f"{bench}-{round_}", words, fails=f"the benchmark of {self.name} failed")
        return read_values(path)


def read_values(path: Path) -> Values:
    """By case and metric, the median over the rows; raises BenchmarkError if there is no known metric."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = next((name for name in METRICS if rows and name in rows[0]), None)
    if column is None:
        raise BenchmarkError(f"{path.name} has none of the columns {', '.join(METRICS)}.")
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((_name(row), METRICS[column]), []).append(float(row[column]))
    return {key: median(numbers) for key, numbers in values.items()}


def _name(row: dict[str, str]) -> str:
    """A case in words: "tiny28, sparse, batch 1, context 1024"."""
    words = [row[name] for name in WORDS if row.get(name, "") not in USUAL]
    return ", ".join([*words, *(f"{name} {row[name]}" for name in NUMBERS if name in row)])


def resolve(repository: Path, name: str) -> str:
    """The full hash of a commit; raises BenchmarkError if there is no such commit."""
    command = ["git", "-C", str(repository), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise BenchmarkError(f"there is no commit called {name} in {repository}.")
    return found.stdout.strip()


@contextlib.contextmanager
def checkout(repository: Path, name: str, folder: Path) -> Iterator[Checkout]:
    """A commit's worktree in `folder`/tree, with logs beside it; removed in the end, whatever happens."""
    commit = resolve(repository, name)
    tree = folder / "tree"
    folder.mkdir()
    label = name if commit.startswith(name) else f"{name} ({commit[:12]})"
    try:
        if error := _git(repository, "worktree", "add", "--quiet", "--detach", str(tree), commit):
            raise BenchmarkError(f"{error}.")
        yield Checkout(label, commit[:12], tree, folder)
    finally:
        with _uninterrupted():
            if _git(repository, "worktree", "remove", "--force", str(tree)):
                _git(repository, "worktree", "prune")  # an unfinished one


def _git(repository: Path, *words: str) -> str:
    """Why the command failed; nothing if it did not. Ctrl-C does not reach it."""
    command = ["git", "-C", str(repository), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    return f"git {words[0]} {words[1]} failed ({done.stderr.strip()})" if done.returncode else ""


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C has to wait: a second one would leave the worktree behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
