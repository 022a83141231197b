"""Train the reasoner from scratch, on a GPU.

    PYTHONPATH=tools python -m reasoner.train --out reasoner --log train.csv
    PYTHONPATH=tools python -m reasoner.train --steps 3 --batch-tokens 512 --layers 1 --out look     # a look

Every batch is new: problems of all families, each up to a length of its own, which grows whenever its
problems are nearly solved, from short ones to the longest that are asked for; short ones keep coming, as they
are forgotten otherwise. What a step sees depends on the seed, the step's number and these lengths. Only
answers count for the loss; what a prompt says cannot be foreseen. The learning rate rises, stays until some
while after all families have come to the longest problems, and falls to zero.

The log has, every so many steps, the loss, and each family's length and share of right tokens. `--check` adds
problems of several lengths that are solved with the right answer so far given (teacher-forced): all of an
answer's tokens have to be right, which is when a greedy answer is. With `--checkpoint` and `--stop-after`, a
training goes on where an earlier call of the same seed stopped; `--start` begins another one with an exported
model, and with problems as long as that model's longest.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from reasoner.model import Reasoner, Size, export, restore
from reasoner.problems import FAMILIES, make_problem

IGNORED = -100
#: lengths of a batch are multiples of it
ALIGNMENT = 64
#: each family's share of a step's tokens
SHARES = {"chase": 0.35, "trace": 0.45, "needles": 0.2}
#: tokens of the first problems
SHORTEST = 128
#: a family's problems grow by this factor when this share of the longest ones' tokens is right
GROWTH = 1.5
MASTERED = 0.97
#: batches of the longest problems that decide it
DECIDING = 8
#: shares of batches that have the longest problems, and problems of any length
LONGEST_SHARE, ANY_SHARE = 0.35, 0.25
#: steps in which the learning rate rises
RISE = 200
CHECKED_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 12288, 16384)


class Batch(NamedTuple):
    """Problems of one family."""

    #: int64 ``[problems, width]``, the width being `length` or a little more
    tokens: NDArray[np.int64]
    #: the token that follows each, or `IGNORED`
    targets: NDArray[np.int64]
    #: tokens that a problem may have
    length: int


@dataclass
class Course:
    """How long one family's problems are by now."""

    longest: int
    length: int = SHORTEST
    accuracies: deque[float] = field(default_factory=lambda: deque(maxlen=DECIDING))

    def see(self, length: int, accuracy: float) -> None:
        """A batch's share of right tokens; lengths grow when it was high for long enough."""
        if length < self.length:
            return
        self.accuracies.append(accuracy)
        if len(self.accuracies) == DECIDING and sum(self.accuracies) / DECIDING >= MASTERED:
            self.length = min(self.longest, int(self.length * GROWTH))
            self.accuracies.clear()


def learning_rate(step: int, steps: int, decay: int, peak: float) -> float:
    """A short rise, a plateau, and a linear fall to zero over the last `decay` of `steps`."""
    return peak * min(1.0, (step + 1) / RISE, (steps - step) / decay)


def choose_length(limit: int, generator: np.random.Generator) -> int:
    """Tokens of a batch's problems: `limit`; any length, short ones more often; or a quarter of it on."""
    kind, shortest = generator.random(), SHORTEST // 2
    if kind < LONGEST_SHARE:
        return limit
    if kind < LONGEST_SHARE + ANY_SHARE:
        return round(math.exp(generator.uniform(math.log(shortest), math.log(limit))))
    return int(generator.integers(max(shortest, limit // 4), limit + 1))


def make_batch(step: int, family: str, seed: int, batch_tokens: int, limit: int) -> Batch:
    """New problems of one family, at least two."""
    generator = np.random.default_rng((seed, step, list(FAMILIES).index(family)))
    length = choose_length(limit, generator)
    count = max(2, int(batch_tokens * SHARES[family]) // length)
    problems = [make_problem(family, length, generator) for _ in range(count)]
    width = -(-length // ALIGNMENT) * ALIGNMENT
    tokens = np.zeros((count, width), np.int64)
    targets = np.full((count, width), IGNORED, np.int64)
    for row, problem in enumerate(problems):
        whole, start = problem.tokens, len(problem.prompt)
        tokens[row, : len(whole)] = whole
        targets[row, start - 1 : len(whole) - 1] = whole[start:]
    return Batch(tokens, targets, length)


class Batches:
    """Batches in the order of steps, one per family and step, made ahead by other processes."""

    def __init__(self, arguments: argparse.Namespace, courses: dict[str, Course], first_step: int) -> None:
        self._arguments = arguments
        self._courses = courses
        self._next = first_step
        self._ahead: deque[dict[str, AsyncResult[Batch]]] = deque()
        self._pool = get_context("spawn").Pool(arguments.workers)

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        """Endless."""
        while True:
            while len(self._ahead) <= self._arguments.workers:
                self._submit()
            yield {family: result.get() for family, result in self._ahead.popleft().items()}

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._pool.terminate()
        self._pool.join()

    def _submit(self) -> None:
        a = self._arguments
        self._ahead.append(
            {
                family: self._pool.apply_async(
                    make_batch, (self._next, family, a.seed, a.batch_tokens, c.length)
                )
                for family, c in self._courses.items()
            }
        )
        self._next += 1


@torch.no_grad()
def solved(model: torch.nn.Module, length: int, problems: int, device: str) -> dict[str, float]:
    """Share of fresh problems by family whose answer tokens are all right, after the right ones each."""
    shares = {}
    for index, family in enumerate(FAMILIES):
        generator = np.random.default_rng((2**32 - 1, index, length))
        exact = 0
        for _ in range(problems):
            problem = make_problem(family, length, generator)
            tokens = torch.from_numpy(problem.tokens).to(device)[None]
            with torch.autocast(device, torch.bfloat16):
                guesses = model(tokens)[0].argmax(-1)
            start = len(problem.prompt)
            exact += bool((guesses[start - 1 : -1] == tokens[0, start:]).all())
        shares[family] = exact / problems
    return shares


class Training:
    """The model, its optimizer, and how far they are."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments = arguments
        self.device: str = arguments.device
        size = Size(num_layers=arguments.layers, max_length=arguments.length)
        self.model = Reasoner(size).to(self.device)
        decayed = [parameter for parameter in self.model.parameters() if parameter.dim() == 2]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() != 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=arguments.rate, betas=(0.9, 0.98), fused=self.device == "cuda"
        )
        first = SHORTEST if arguments.start is None else restore(self.model, arguments.start)
        self.courses = {family: Course(arguments.length, min(first, arguments.length)) for family in FAMILIES}
        self.step = 0
        #: the step at which all families had come to the longest problems
        self.grown: int | None = None
        self.seen = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        if arguments.compile:
            self.model.compile_layers()

    @property
    def steps(self) -> int:
        """Steps in total: as many as are asked for, or fewer if the problems' lengths allow."""
        a = self.arguments
        most: int = a.steps
        return most if self.grown is None else min(most, self.grown + a.plateau + a.decay)

    def run(self) -> bool:
        """Train up to the last step, or until the time is over; returns whether the last step is done."""
        a = self.arguments
        batches = Batches(a, self.courses, self.step)
        start, before = time.perf_counter(), self.seconds
        try:
            for parts in batches:
                if self.step >= self.steps or self.seconds - before > a.stop_after:
                    break
                self._step(parts, learning_rate(self.step, self.steps, a.decay, a.rate))
                if self.grown is None and all(c.length == c.longest for c in self.courses.values()):
                    self.grown = self.step
                self.seconds = before + time.perf_counter() - start
                self.step += 1
        finally:
            batches.close()
        return self.step >= self.steps

    def _step(self, parts: dict[str, Batch], rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        answers = torch.from_numpy(
            np.flatnonzero(np.concatenate([batch.targets.ravel() for batch in parts.values()]) != IGNORED)
        ).to(self.device)
        inputs = [torch.from_numpy(batch.tokens).to(self.device) for batch in parts.values()]
        wanted = [torch.from_numpy(batch.targets[batch.targets != IGNORED]) for batch in parts.values()]
        with torch.autocast(self.device, torch.bfloat16):
            hidden = self.model.hidden(inputs)[answers]
            logits = F.linear(hidden, self.model.embed_tokens.weight).float()
        total = torch.zeros((), device=self.device)
        rights = {}
        guesses = torch.split(logits, [len(targets) for targets in wanted])
        for family, guess, targets in zip(parts, guesses, wanted, strict=True):
            right = targets.to(self.device)
            total = total + SHARES[family] * F.cross_entropy(guess, right)
            rights[family] = (guess.detach().argmax(-1) == right).float().mean()
        total.backward()  # type: ignore[no-untyped-call]
        self.seen += sum(batch.tokens.size for batch in parts.values())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss_value, *shares = torch.stack([total.detach(), *rights.values()]).tolist()
        if not math.isfinite(loss_value):
            raise RuntimeError(f"the loss is {loss_value} at step {self.step}")
        a = self.arguments
        if self.step % a.log_every == 0 or self.step == self.steps - 1:
            self._log(rate, loss_value, dict(zip(rights, shares, strict=True)))
        for (family, batch), share in zip(parts.items(), shares, strict=True):
            self.courses[family].see(batch.length, share)

    def _log(self, rate: float, loss: float, shares: dict[str, float]) -> None:
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.seen,
            "seconds": round(self.seconds, 1),
            "rate": rate,
            "loss": round(loss, 6),
        }
        for family, share in shares.items():
            row |= {f"length_{family}": self.courses[family].length, f"right_{family}": round(share, 6)}
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        self.rows.append(row)

    def save(self, path: Path) -> None:
        """Write all that going on needs."""
        names = ("courses", "step", "grown", "seen", "seconds", "rows")
        state = {name: getattr(self, name) for name in names}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from there."""
        state = torch.load(path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)

    def write_log(self, path: Path) -> None:
        """One line per logged step."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--start", type=Path, help="a model to start from, with its longest problems (none)")
    parser.add_argument("--log", type=Path, help="CSV of the training (none)")
    parser.add_argument("--steps", type=int, default=6000, help="at most (6000)")
    parser.add_argument(
        "--plateau",
        type=int,
        default=500,
        help="steps with the longest problems before the rate falls (500)",
    )
    parser.add_argument("--decay", type=int, default=1600, help="steps in which the rate falls (1600)")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens of a step (65536)")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the longest problems (16384)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate (2e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="processes that make problems (8)")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log (50)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--checkpoint", type=Path, help="go on from this file if it is there; written at the end"
    )
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="(never)")
    parser.add_argument(
        "--check", type=int, default=0, metavar="N", help="solve N problems of each family (0)"
    )
    arguments = parser.parse_args(argv)
    counts = ("steps", "decay", "batch_tokens", "layers", "workers", "log_every")
    if min(getattr(arguments, name) for name in counts) < 1:
        parser.error("needs at least one step, token, layer, process, and step between lines of the log")
    if arguments.length < SHORTEST:
        parser.error(f"--length must be {SHORTEST} or more")
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main(argv: Sequence[str]) -> int:
    """Train, export, check; returns the exit status."""
    arguments = parse_arguments(argv)
    training = Training(arguments)
    if arguments.checkpoint and arguments.checkpoint.exists():
        training.load(arguments.checkpoint)
    finished = training.run()
    if arguments.checkpoint:
        training.save(arguments.checkpoint)
    export(training.model, arguments.out)
    if arguments.log and training.rows:
        training.write_log(arguments.log)
    print(f"{training.step} steps, {training.seen} tokens, {training.seconds:.0f} s, finished: {finished}")
    for length in CHECKED_LENGTHS if arguments.check else ():
        if length <= arguments.length:
            shares = solved(training.model, length, arguments.check, arguments.device)
            print(length, " ".join(f"{family} {share:.3f}" for family, share in shares.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
