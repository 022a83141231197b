"""The reasoner's problems under many settings in one engine, the right answer so far given at every step.

A greedy answer is right if and only if the likeliest token is the right one at every step that follows right
ones. So one pass is enough, over prompt and right answer, whose tokens are decode rows. It shows whether the
answer would be exact, and how many steps come before the first wrong one, in a fraction of the time that
writing it takes. Settings change between passes; other policies, which are slow row by row, take all rows of
an answer at once. What is not covered is the server; a few settings should be asked both ways.
"""

from __future__ import annotations

import time

import numpy as np
from reasoner import vocabulary

from benchmarks.accuracy.engines import complete, start_engine, to_json
from benchmarks.accuracy.jobs import Records
from benchmarks.accuracy.problems import QUESTION, problem_of
from benchmarks.accuracy.settings import Setting
from benchmarks.lib.base import Json
from vllm_delta.calibration.engine import Engine, Model
from vllm_delta.calibration.prompts import CalibrationError
from vllm_delta.method.config import DeltaConfigError
from vllm_delta.method.counters import difference

#: the engine of this process, which serves one job after another
_engines: list[Engine] = []


def force_all(job: Json) -> Records:
    """The outcomes of the job's questions, as `problems.ask_all` gives them."""
    setting = Setting(**job["setting"])
    try:
        engine = _engine(job)
        engine.use(to_json(complete(setting, job["model"], len(engine.eligible))))
        for group in job["groups"]:
            before, start = engine.counters(), time.perf_counter()
            for question in group:
                yield (
                    question
                    | _force(engine, question)
                    | {
                        "seconds": round(time.perf_counter() - start, 3),
                        "counts": difference(engine.counters(), before) if setting.is_delta else {},
                    }
                )
    except (CalibrationError, DeltaConfigError) as error:
        yield {"error": f"{type(error).__name__}: {error}"}


def _engine(job: Json) -> Engine:
    if not _engines:
        needs = job["engine"]
        _engines.append(start_engine(Model(job["model"], needs["options"]), needs, rows=2048))
    return _engines[0]


def close() -> None:
    """End the engine, if there is one."""
    while _engines:
        _engines.pop().close()


def _force(engine: Engine, question: Json) -> Json:
    problem = problem_of(*(question[name] for name in QUESTION[:-1]))
    tokens, first_row = problem.tokens[:-1].tolist(), len(problem.prompt)
    guesses = np.array(engine.guesses(tokens, first_row))
    wrong = np.flatnonzero(guesses != problem.tokens[first_row:])
    exact = len(wrong) == 0
    right_steps = problem.num_steps if exact else min(problem.num_steps, int(wrong[0]) // problem.step)
    step = slice(right_steps * problem.step, (right_steps + 1) * problem.step)
    return {
        "exact": exact,
        "right_steps": right_steps,
        "num_steps": problem.num_steps,
        "prompt_tokens": first_row,
        "generated_tokens": len(problem.answer) + 1,
        "finish_reason": "given",
        "wrong_step": "" if exact else vocabulary.decode(guesses[step]),
        "right_step": "" if exact else vocabulary.decode(problem.answer[step]),
    }
