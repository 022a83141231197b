"""Let a trained reasoner solve problems under full attention and under DELTA, and check every step.

    PYTHONPATH=tools python -m reasoner.demo tools/reasoner/trained

Everything is local: the model is a folder, each of the two servers listens on the loopback address. One
problem of each family is asked as a chat; the answers are chains of steps, each of which needs something from
far back, so a chain that leaves the right way shows at which step attention missed what it needed. The exit
status is 0 only if both servers answered and DELTA read fewer tokens than full attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from server import Server, ServerError, exit_status, show_waiting

from reasoner import vocabulary
from reasoner.problems import FAMILIES, Outcome, Problem, check, make_problem

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "build" / "demo-server.log"
#: the layers are those of the file that a calibration left beside the model
DELTA = {"budget_tokens": 512}
#: steps that are shown from either end of a chain
SHOWN = 2
#: characters of a prompt that are shown
WIDTH = 100


@dataclass(frozen=True)
class Answer:
    """What a server wrote to a problem."""

    text: str
    tokens: int
    outcome: Outcome


def ask(server: Server, problem: Problem) -> Answer:
    """Ask as a user would, in a chat, whose template puts in the first token and the last ``=``."""
    chat = server.client().chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": vocabulary.decode(problem.prompt[:-1])}],
        max_tokens=len(problem.answer) + 1,
        temperature=0.0,
    )
    text = chat.choices[0].message.content or ""
    if chat.usage is None or chat.usage.prompt_tokens != len(problem.prompt):
        raise ServerError(f"the server saw another prompt than {len(problem.prompt)} tokens: {chat.usage}")
    return Answer(text, chat.usage.completion_tokens, check(problem, text))


def shorten(text: str) -> str:
    """The beginning and the end of a text."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2]} ... {text[-(WIDTH // 2 - 5) :]}"


def show_problem(problem: Problem) -> None:
    """Print a problem in short, and how its right answer begins and ends."""
    print(
        f"\n{problem.family}: a prompt of {len(problem.prompt)} tokens, {problem.num_steps} steps to answer"
    )
    print(f"  asked    {shorten(vocabulary.decode(problem.prompt))}")
    steps = [vocabulary.decode(step) for step in problem.answer.reshape(-1, problem.step)]
    shown = [*steps[:SHOWN], "...", *steps[-SHOWN:]] if len(steps) > 2 * SHOWN else steps
    print(f"  right    {' | '.join(shown)}")


def show_answer(name: str, problem: Problem, answer: Answer) -> None:
    """Print an answer's end, and whether it is right, or at which step it went wrong."""
    outcome = answer.outcome
    verdict = "every step is right" if outcome.exact else f"wrong at step {outcome.right_steps + 1}"
    words = vocabulary.split(answer.text)
    place = len(words) if outcome.exact else (outcome.right_steps + 1) * problem.step
    end = " ".join(words[max(0, place - 2 * problem.step) : place])
    print(f"  {name:8} ... {end}   ({answer.tokens} tokens, {verdict} of {outcome.num_steps})")


def solve(
    name: str, model: Path, options: Sequence[str], problems: Sequence[Problem]
) -> tuple[list[Answer], dict[str, Any]]:
    """Start a server, ask all problems at once, stop it; returns answers and DELTA's counters, if it has."""
    print(f"\n{name}: vllm serve {model} {' '.join(options)}")
    with Server(model, options, log_path=LOG, on_wait=show_waiting) as server:
        print("\r" if sys.stdout.isatty() else "", end="")
        begin = time.monotonic()
        with ThreadPoolExecutor(len(problems)) as pool:
            answers = list(pool.map(lambda problem: ask(server, problem), problems))
        seconds = time.monotonic() - begin
        counters = server.counters() if "DELTA" in options else {}
    tokens = sum(answer.tokens for answer in answers)
    exact = sum(answer.outcome.exact for answer in answers)
    print(f"  {exact} of {len(answers)} exact, {tokens} tokens in {seconds:.0f} s")
    return answers, counters


def run(arguments: argparse.Namespace, extra: Sequence[str], problems: Sequence[Problem]) -> None:
    """Both servers, one after another, and what they wrote."""
    # vLLM wants to find that share of the machine's memory free; the model needs a fraction of it.
    common = ["--gpu-memory-utilization", "0.3", *extra]
    delta = ["--attention-backend", "DELTA"]
    if arguments.delta:
        delta += ["--additional-config", json.dumps({"delta": arguments.delta})]
    full_answers, _ = solve("full", arguments.model, common, problems)
    delta_answers, counters = solve("DELTA", arguments.model, [*delta, *common], problems)
    for problem, full_answer, delta_answer in zip(problems, full_answers, delta_answers, strict=True):
        show_problem(problem)
        show_answer("full", problem, full_answer)
        show_answer("DELTA", problem, delta_answer)
    attended, context = int(counters["attended_tokens"]), int(counters["context_tokens"])
    print(f"\nDELTA attended to {attended} of {context} tokens, {attended / max(1, context):.1%}")
    if not 0 < attended < context:
        raise ServerError("nothing was saved")


def main() -> int:
    """Run the demo; arguments that are not its own go to ``vllm serve``. Returns the exit status."""
    from vllm_delta.cli.options import json_object

    parser = argparse.ArgumentParser(description="solve problems under full attention and under DELTA")
    parser.add_argument("model", type=Path, help="folder of a trained reasoner")
    parser.add_argument("--length", type=int, default=4096, help="tokens of prompt and answer (4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument(
        "--delta", metavar="JSON", type=json_object, default=DELTA, help=f"settings ({json.dumps(DELTA)})"
    )
    arguments, extra = parser.parse_known_args()
    try:
        problems = [
            make_problem(family, arguments.length, np.random.default_rng([arguments.seed, index]))
            for index, family in enumerate(FAMILIES)
        ]
    except ValueError as error:
        parser.error(str(error))
    return exit_status(lambda: run(arguments, extra, problems), LOG)


if __name__ == "__main__":
    sys.exit(main())
