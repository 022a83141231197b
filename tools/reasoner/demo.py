"""Let a trained reasoner solve problems with full attention, DELTA and lossless drafts; check every step.

    PYTHONPATH=tools python -m reasoner.demo tools/reasoner/trained

Everything is local: the model is a folder, each of the three servers listens on the loopback address. One
problem of each family is asked as a chat; the answers are chains of steps, each of which needs something from
far back, so a chain that leaves the right way shows at which step attention missed what it needed. Then steps
are timed at a context where DELTA pays: several answers to one long prompt, of two lengths, whose difference
leaves out what a request costs once. The exit status is 0 only if all servers answered and DELTA read fewer
tokens than full attention. Drafts use no calibration: full attention verifies them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from server import Server, ServerError, exit_status, show_waiting

from reasoner import vocabulary
from reasoner.problems import FAMILIES, Outcome, Problem, check, make_problem
from vllm_delta.method.counters import difference

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "build" / "demo-server.log"
#: the layers are those of the file that a calibration left beside the model
DELTA = {"budget_tokens": 512}
#: with another number of full layers than that file's, so that it is left alone
LOSSLESS = {"budget_tokens": 512, "lossless": True, "draft_when": "always", "full_layers": 2}
#: steps that are shown from either end of a chain
SHOWN = 2
#: characters of a prompt that are shown
WIDTH = 100
#: answers that are timed at a time, the lengths of which the difference is taken, and how often
BATCH, SHORT, LONG, ROUNDS = 4, 8, 72, 5


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


@dataclass(frozen=True)
class Timed:
    """Decode steps at a long context."""

    #: of a token of each of `BATCH` sequences, the median of the rounds
    milliseconds: float
    #: DELTA's counters of all of them; empty without DELTA
    counters: dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What one server did."""

    answers: list[Answer]
    #: DELTA's, of the answers; empty without DELTA
    counters: dict[str, Any]
    timed: Timed


def time_steps(server: Server, context: int) -> Timed:
    """Time steps of answers to one prompt of so many tokens, which the prefix cache then holds."""
    words = np.random.default_rng(0).integers(vocabulary.first_name(), len(vocabulary.words()), context)

    def seconds(count: int, tokens: int) -> float:
        begin = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda _: write(tokens), range(count)))
        return time.monotonic() - begin

    def write(tokens: int) -> None:
        server.client().completions.create(
            model=server.model,
            prompt=words.tolist(),
            max_tokens=tokens,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )

    print(f"  reading a prompt of {context} tokens ...", flush=True)
    seconds(1, SHORT)
    before = counters_of(server)
    slopes = [(seconds(BATCH, LONG) - seconds(BATCH, SHORT)) / (LONG - SHORT) for _ in range(ROUNDS)]
    timed = Timed(1000 * median(slopes), difference(counters_of(server), before))
    print(f"  {timed.milliseconds:.1f} ms per token of {BATCH} sequences")
    return timed


def counters_of(server: Server) -> dict[str, Any]:
    """DELTA's counters; empty for a server without DELTA."""
    return server.counters() if "DELTA" in server.args else {}


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


def serve(name: str, model: Path, options: Sequence[str], problems: Sequence[Problem], context: int) -> Arm:
    """Start a server, ask all problems at once, time steps, stop it."""
    print(f"\n{name}: vllm serve {model} {' '.join(options)}")
    with Server(model, options, log_path=LOG, on_wait=show_waiting) as server:
        print("\r" if sys.stdout.isatty() else "", end="")
        begin = time.monotonic()
        with ThreadPoolExecutor(len(problems)) as pool:
            answers = list(pool.map(lambda problem: ask(server, problem), problems))
        seconds = time.monotonic() - begin
        counters = counters_of(server)
        tokens = sum(answer.tokens for answer in answers)
        exact = sum(answer.outcome.exact for answer in answers)
        print(f"  {exact} of {len(answers)} exact, {tokens} tokens in {seconds:.0f} s")
        return Arm(answers, counters, time_steps(server, context))


def share(counters: Mapping[str, Any]) -> str:
    """The tokens that DELTA attended to.

    Raises:
        ServerError: it attended to all, or to none.
    """
    attended, context = int(counters["attended_tokens"]), int(counters["context_tokens"])
    if not 0 < attended < context:
        raise ServerError("nothing was saved")
    return f"attended to {attended} of {context} tokens, {attended / context:.1%}"


def run(arguments: argparse.Namespace, extra: Sequence[str], problems: Sequence[Problem]) -> None:
    """All servers, one after another, what they wrote and how fast."""
    # vLLM wants to find that share of the machine's memory free; the model needs a fraction of it.
    common = ["--gpu-memory-utilization", "0.3", *extra]
    options = ["--attention-backend", "DELTA"]
    if arguments.delta:
        options += ["--additional-config", json.dumps({"delta": arguments.delta})]
    full = serve("full", arguments.model, common, problems, arguments.context)
    delta = serve("DELTA", arguments.model, [*options, *common], problems, arguments.context)
    drafting = ["--attention-backend", "DELTA", "--additional-config", json.dumps({"delta": LOSSLESS})]
    lossless = serve("lossless", arguments.model, [*drafting, *common], problems, arguments.context)
    arms = {"full": full, "DELTA": delta, "lossless": lossless}
    for index, problem in enumerate(problems):
        show_problem(problem)
        for name, arm in arms.items():
            show_answer(name, problem, arm.answers[index])
    same = sum(a.text == b.text for a, b in zip(full.answers, lossless.answers, strict=True))
    print(f"\nin these, DELTA {share(delta.counters)}; {same} of {len(problems)} lossless answers are full's")
    print(f"{BATCH} sequences of {arguments.context} tokens, DELTA {share(delta.timed.counters)}:")
    for name, arm in arms.items():
        speed = full.timed.milliseconds / arm.timed.milliseconds
        print(f"  {name:8} {arm.timed.milliseconds:.1f} ms per token, {speed:.1f}x")


def main() -> int:
    """Run the demo; arguments that are not its own go to ``vllm serve``. Returns the exit status."""
    from vllm_delta.cli.options import json_object

    parser = argparse.ArgumentParser(description="solve problems under full attention and under DELTA")
    parser.add_argument("model", type=Path, help="folder of a trained reasoner")
    parser.add_argument("--length", type=int, default=4096, help="tokens of prompt and answer (4096)")
    parser.add_argument("--context", type=int, default=10000, help="tokens where steps are timed (10000)")
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
