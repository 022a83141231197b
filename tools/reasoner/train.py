"""Train the reasoner from scratch, on a GPU in minutes.

    PYTHONPATH=tools python -m reasoner.train --out reasoner --log train.csv
    PYTHONPATH=tools python -m reasoner.train --steps 3 --batch-tokens 512 --layers 1 --out look     # a look

Every batch is new: problems of all families, of lengths up to a limit that grows with the step, from a few
hundred tokens to the longest that is asked for. What a step sees depends on the seed and the step's number
alone. Only answers count for the loss; what a prompt says cannot be foreseen. The log has the loss, and the
share of right tokens by family, over the steps. `--check` adds problems of several lengths that are solved
with the right answer so far given (teacher-forced), where every token of an answer has to be right.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from reasoner.model import Reasoner, Size, export
from reasoner.problems import FAMILIES, make_problem

IGNORED = -100
#: lengths of a batch are multiples of it
ALIGNMENT = 64
Batch = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def length_limit(step: int, steps: int, shortest: int, longest: int) -> int:
    """Tokens of the longest problems of a step: growing by a constant factor over the first half."""
    share = min(1.0, step / (0.5 * steps))
    return int(shortest * (longest / shortest) ** share)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short rise, a plateau, and a linear fall to zero over the last third."""
    return peak * min(1.0, (step + 1) / (0.02 * steps + 1), (steps - step) / (steps / 3))


def make_batch(step: int, seed: int, batch_tokens: int, limit: int) -> Batch:
    """Tokens and targets, ``[problems, length]``, and the problems' families; all from seed and step."""
    generator = np.random.default_rng((seed, step))
    length = limit if generator.random() < 0.5 else int(generator.integers(max(64, limit // 3), limit + 1))
    families = generator.integers(len(FAMILIES), size=max(1, batch_tokens // length))
    names = list(FAMILIES)
    problems = [make_problem(names[family], length, generator) for family in families]
    width = -(-length // ALIGNMENT) * ALIGNMENT
    tokens = np.zeros((len(problems), width), np.int64)
    targets = np.full((len(problems), width), IGNORED, np.int64)
    for row, problem in enumerate(problems):
        whole, start = problem.tokens, len(problem.prompt)
        tokens[row, : len(whole)] = whole
        targets[row, start - 1 : len(whole) - 1] = whole[start:]
    return tokens, targets, families


def batches(arguments: argparse.Namespace) -> Iterator[Batch]:
    """The batches in order, made ahead by other processes."""
    limits = (length_limit(step, arguments.steps, 256, arguments.length) for step in range(arguments.steps))
    make = partial(make_batch, seed=arguments.seed, batch_tokens=arguments.batch_tokens)
    if arguments.workers == 0:
        yield from (make(step, limit=limit) for step, limit in enumerate(limits))
        return
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        ahead: list[Future[Batch]] = []
        for step, limit in enumerate(limits):
            ahead.append(pool.submit(make, step, limit=limit))
            if len(ahead) > 2 * arguments.workers:
                yield ahead.pop(0).result()
        yield from (future.result() for future in ahead)


def token_accuracy(right: Tensor, targets: Tensor, families: Tensor) -> list[float]:
    """Share of right answer tokens by family; NaN for a family that the batch has no problem of."""
    counts = (targets != IGNORED).sum(1)
    hits = right.sum(1)
    return [
        (hits[families == family].sum() / counts[families == family].sum()).item()
        for family in range(len(FAMILIES))
    ]


@torch.no_grad()
def solved(model: torch.nn.Module, length: int, problems: int, device: str) -> list[float]:
    """Share of fresh problems by family whose answer tokens are all right, after the right ones each."""
    shares = []
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
        shares.append(exact / problems)
    return shares


def train(arguments: argparse.Namespace) -> Reasoner:
    """Train as the arguments say; returns the model."""
    torch.manual_seed(arguments.seed)
    device = arguments.device
    model = Reasoner(Size(num_layers=arguments.layers, max_length=arguments.length)).to(device)
    run = torch.compile(model, dynamic=True) if arguments.compile else model
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98), fused=device == "cuda")
    rows, seen, start = [], 0, time.perf_counter()
    for step, (tokens, targets, families) in enumerate(batches(arguments)):
        rate = learning_rate(step, arguments.steps, arguments.rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, wanted = (torch.from_numpy(array).to(device) for array in (tokens, targets))
        with torch.autocast(device, torch.bfloat16):
            logits = run(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += tokens.size
        if step % arguments.log_every == 0 or step == arguments.steps - 1:
            right = logits.argmax(-1) == wanted
            accuracy = token_accuracy(right, wanted, torch.from_numpy(families).to(device))
            row = {
                "step": step,
                "tokens": seen,
                "seconds": round(time.perf_counter() - start, 1),
                "length": tokens.shape[1],
                "rate": rate,
                "loss": round(loss.item(), 5),
            }
            row |= {f"right_{name}": round(value, 5) for name, value in zip(FAMILIES, accuracy, strict=True)}
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
            if not math.isfinite(row["loss"]):
                raise RuntimeError(f"the loss is {row['loss']} at step {step}")
    if arguments.log:
        with arguments.log.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return model


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--log", type=Path, help="CSV of the training (none)")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens of a step (65536)")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the longest problems (16384)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate (2e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="processes that make problems (8)")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log (50)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--check", type=int, default=0, metavar="N", help="solve N problems of each family (0)"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.batch_tokens, arguments.layers, arguments.log_every) < 1:
        parser.error("needs at least one step, token, layer, and step between lines of the log")
    if arguments.length < 256:
        parser.error("--length must be 256 or more")
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main(argv: Sequence[str]) -> int:
    """Train, export, check; returns the exit status."""
    arguments = parse_arguments(argv)
    model = train(arguments)
    export(model, arguments.out)
    if arguments.check:
        for length in (2048, 4096, 8192, 12288, 16384):
            if length <= arguments.length:
                shares = solved(model, length, arguments.check, arguments.device)
                print(
                    length,
                    " ".join(f"{name} {share:.3f}" for name, share in zip(FAMILIES, shares, strict=True)),
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
