"""The reasoner's problems, asked and checked; the file of their outcomes; the confidence of a share.

A problem depends on family, length, seed and index alone, so that every setting gets the same ones. The file
has one line of JSON per answer, with what was asked, and under which setting: a run that goes on where an
interrupted one stopped finds there what it need not ask again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openai import OpenAIError
from reasoner import vocabulary
from reasoner.problems import Problem, check, make_problem
from server import Server, ServerError

from benchmarks.accuracy.jobs import Records
from benchmarks.accuracy.servers import explain, open_server, read_counters
from benchmarks.accuracy.settings import Setting
from benchmarks.lib.base import BenchmarkError, Json
from vllm_delta.method.counters import difference, total

if TYPE_CHECKING:
    from openai import OpenAI

#: tokens that an answer may have beyond the right one's, its end among them
SLACK = 8
#: of the standard normal distribution: 95% lie between it and its opposite
Z95 = 1.959963984540054
#: what distinguishes a question from another
QUESTION = ("family", "length", "seed", "index", "problem")
#: what distinguishes the answerer from another
ANSWERER = ("setting", "backend", "settings", "weights", "dtype", "options")


# --- problems ------------------------------------------------------------------------------------


def problem_of(family: str, length: int, seed: int, index: int) -> Problem:
    """The problem of that index; raises ValueError as `make_problem` does."""
    return make_problem(family, length, np.random.default_rng([seed, length, index, *family.encode()]))


def question_of(family: str, length: int, seed: int, index: int) -> Json:
    """What a line of the file says of the question, with a checksum of the problem and its answer."""
    checksum = zlib.crc32(problem_of(family, length, seed, index).tokens.astype("<i8").tobytes())
    values = (family, length, seed, index, f"{checksum:08x}")
    return dict(zip(QUESTION, values, strict=True))


def wilson(right: int, of: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for the share that `right` of `of` estimates; all of [0, 1] if `of` is 0."""
    if of == 0:
        return 0.0, 1.0
    share, spread = right / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


# --- the work on one setting ---------------------------------------------------------------------


def ask_all(job: Json) -> Records:
    """The outcomes of the job's questions, group by group, as answers come; or a record with "error"."""
    setting = Setting(**job["setting"])
    try:
        with open_server(job) as server, server.client(job["timeout"]) as client:
            for group in job["groups"]:
                yield from ask_group(server, client, setting, group, job)
    except (ServerError, BenchmarkError, OpenAIError) as error:
        yield {"error": explain(error, job)}


def ask_group(server: Server, client: OpenAI, setting: Setting, group: Sequence[Json], job: Json) -> Records:
    """Ask questions of one family and length, at most `concurrency` at a time.

    Every outcome has the seconds since the group's start, and the counters since then.
    """
    before = read_counters(server, setting)
    start = time.perf_counter()
    pool = ThreadPoolExecutor(job["concurrency"])
    try:
        work = partial(ask, client, server.model, job["max_model_len"])
        for future in as_completed([pool.submit(work, question) for question in group]):
            outcome = future.result()
            outcome["seconds"] = round(time.perf_counter() - start, 3)
            outcome["counts"] = difference(read_counters(server, setting), before) if before else {}
            yield outcome
    finally:
        # What is under way ends with the server.
        pool.shutdown(wait=False, cancel_futures=True)


def ask(client: OpenAI, model: str, max_model_len: int | None, question: Json) -> Json:
    """The outcome of one question; raises BenchmarkError if the server did not see the whole prompt."""
    problem = problem_of(*(question[name] for name in QUESTION[:-1]))
    prompt: list[int] = problem.prompt.tolist()
    room = len(problem.answer) + SLACK
    if max_model_len is not None:
        room = min(room, max_model_len - len(prompt))
    completion = client.completions.create(model=model, prompt=prompt, max_tokens=room, temperature=0)
    choice, usage = completion.choices[0], completion.usage
    if usage is None or usage.prompt_tokens != len(prompt):
        raise BenchmarkError(f"the server took a prompt of {len(prompt)} tokens for another: {usage}")
    outcome = check(problem, choice.text)
    given, right = vocabulary.split(choice.text), vocabulary.split(vocabulary.decode(problem.answer))
    at = slice(outcome.right_steps * problem.step, (outcome.right_steps + 1) * problem.step)
    return question | {
        "exact": outcome.exact,
        "right_steps": outcome.right_steps,
        "num_steps": outcome.num_steps,
        "prompt_tokens": usage.prompt_tokens,
        "generated_tokens": usage.completion_tokens,
        "finish_reason": choice.finish_reason,
        "wrong_step": "" if outcome.exact else " ".join(given[at]),
        "right_step": "" if outcome.exact else " ".join(right[at]),
    }


# --- outcomes ------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """The start of the SHA-256 of a model's configuration, tokenizer, weights and calibration."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def longest_decode(outcomes: Sequence[Json]) -> int:
    """Context of the longest decode row, in tokens: the first token of an answer comes from its prompt."""
    lengths = [o["prompt_tokens"] + o["generated_tokens"] - 1 for o in outcomes if o["generated_tokens"] > 1]
    return max(lengths, default=0)


class Outcomes:
    """The file of outcomes, one line of JSON each: what is there, and where new ones go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Json] = {}
        self._ends: dict[str, Json] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self._keep(json.loads(line))
                except (ValueError, LookupError, TypeError):
                    continue  # cut off when a run was ended

    def add(self, record: Json) -> None:
        """Append one outcome, with the names in `QUESTION` and `ANSWERER`, and "run", which names its run."""
        self._keep(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")

    def find(self, answerer: Json, question: Json) -> Json | None:
        """The outcome of a question under a setting, if it is there."""
        return self._records.get(_key(answerer, ANSWERER) + _key(question, QUESTION))

    def segments(self, answerer: Json, family: str, length: int, seed: int) -> tuple[Json, float]:
        """Counters, and seconds, over all runs that asked problems of that kind under that setting.

        They include what a run that was interrupted did for answers that never came.
        """
        wanted = _key(answerer, ANSWERER) + json.dumps([family, length, seed])
        ends = [end for key, end in self._ends.items() if key.startswith(wanted)]
        return total(end["counts"] for end in ends), sum(end["seconds"] for end in ends)

    def _keep(self, record: Json) -> None:
        answerer = _key(record, ANSWERER)
        kind = json.dumps([record[name] for name in QUESTION[:3]])
        segment = f"{answerer}{kind}{record['run']}"
        if segment not in self._ends or record["seconds"] >= self._ends[segment]["seconds"]:
            self._ends[segment] = record
        self._records[answerer + _key(record, QUESTION)] = record


def _key(record: Json, names: Sequence[str]) -> str:
    values: list[Any] = [record[name] for name in names]
    return json.dumps(values)
