"""Problems whose answers are chains of steps, each of which needs something from far back, and their checks.

All of a problem's facts come in random order, so where a step's facts lie cannot be foreseen. A problem is
``mark facts ? question =``, its answer a sequence of steps and the end of the text:

- chase: facts ``name digit next``; from a name on, follow `next`, until it is ``=``. A step is
  ``name digit sum``, with the sum of the digits so far, mod 10.
- trace: inputs ``name digit``, then the lines of a program, ``left right : name``. A step is
  ``left value right value name value``, the last one being the sum of both, mod 10: wherever a name has a
  value, it stands behind it.
- needles: facts ``name digit digit digit``; the question is a list of names. A step repeats the fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasoner import vocabulary

Tokens = NDArray[np.int64]

#: inputs of a traced program
TRACE_INPUTS = 8


@dataclass(frozen=True)
class Problem:
    """One problem and its only right answer."""

    family: str
    #: with the first special token and the last ``=``
    prompt: Tokens
    #: without the end of the text
    answer: Tokens
    #: tokens of a step
    step: int

    @property
    def num_steps(self) -> int:
        """Steps of the answer."""
        return len(self.answer) // self.step

    @property
    def tokens(self) -> Tokens:
        """Prompt, answer and the end of the text."""
        return np.concatenate([self.prompt, self.answer, [vocabulary.token_ids()[vocabulary.EOS]]])


@dataclass(frozen=True)
class Outcome:
    """How an answer compares with the right one."""

    #: every step is right, and nothing follows
    exact: bool
    #: steps before the first wrong one
    right_steps: int
    num_steps: int


def check(problem: Problem, text: str) -> Outcome:
    """Compare an answer's text, special tokens left out, with the right answer, step by step."""
    given, right = vocabulary.split(text), vocabulary.split(vocabulary.decode(problem.answer))
    steps = range(0, len(right), problem.step)
    right_steps = 0
    for start in steps:
        if given[start : start + problem.step] != right[start : start + problem.step]:
            break
        right_steps += 1
    return Outcome(given == right, right_steps, problem.num_steps)


def make_problem(family: str, length: int, generator: np.random.Generator) -> Problem:
    """A random problem of at most `length` tokens, prompt and answer together, and not much less.

    Raises:
        ValueError: a family that there is not, or a length that its smallest problem exceeds.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    make, smallest = FAMILIES[family]
    if length < smallest:
        raise ValueError(f"a problem of the family {family} has {smallest} tokens or more, not {length}")
    return make(length - 6, generator)  # the mark, its neighbours, the end


def _problem(family: str, facts: Tokens, question: Tokens, answer: Tokens, step: int) -> Problem:
    ids = vocabulary.token_ids()
    head, ask, end = [ids[vocabulary.BOS], ids[family]], [ids["?"]], [ids["="]]
    return Problem(family, np.concatenate([head, facts, ask, question, end]), answer, step)


def _some_names(count: int, generator: np.random.Generator) -> Tokens:
    return vocabulary.first_name() + generator.permutation(vocabulary.NUM_NAMES)[:count]


def _chase(length: int, generator: np.random.Generator) -> Problem:
    # Between a third and all of the facts are on the way.
    share = generator.uniform(1 / 3, 1)
    num_facts = min(int(length / (3 + 3 * share)), vocabulary.NUM_NAMES)
    num_steps = max(1, int(share * num_facts))
    names = _some_names(num_facts, generator)
    digits = generator.integers(10, size=num_facts)
    # What is not on the way leads to others of its kind.
    end = vocabulary.token_ids()["="]
    following = np.concatenate([names[1:num_steps], [end], generator.permutation(names[num_steps:])])
    zero = vocabulary.first_digit()
    facts = np.stack([names, zero + digits, following], 1)
    sums = np.cumsum(digits[:num_steps]) % 10
    answer = np.stack([names[:num_steps], zero + digits[:num_steps], zero + sums], 1)
    return _problem("chase", generator.permutation(facts).ravel(), names[:1], answer.ravel(), 3)


def _trace(length: int, generator: np.random.Generator) -> Problem:
    num_lines = min((length - 2 * TRACE_INPUTS) // 10, vocabulary.NUM_NAMES - TRACE_INPUTS)
    names = _some_names(TRACE_INPUTS + num_lines, generator)
    values = np.zeros(len(names), np.int64)
    values[:TRACE_INPUTS] = generator.integers(10, size=TRACE_INPUTS)
    line = np.arange(TRACE_INPUTS, len(names))
    left, right = (generator.integers(line) for _ in range(2))
    for index, (one, other) in enumerate(zip(left.tolist(), right.tolist(), strict=True), TRACE_INPUTS):
        values[index] = (values[one] + values[other]) % 10
    value_tokens = vocabulary.first_digit() + values
    inputs = np.stack([names, value_tokens], 1)[:TRACE_INPUTS]
    colon = np.full(num_lines, vocabulary.token_ids()[":"])
    program = np.stack([names[left], names[right], colon, names[line]], 1)
    columns = [column for index in (left, right, line) for column in (names[index], value_tokens[index])]
    facts = np.concatenate([inputs.ravel(), program.ravel()])
    return _problem("trace", facts, names[-1:], np.stack(columns, 1).ravel(), 6)


def _needles(length: int, generator: np.random.Generator) -> Problem:
    share = generator.uniform(0.1, 0.8)
    num_facts = min(int(length / (4 + 5 * share)), vocabulary.NUM_NAMES)
    num_asked = max(1, int(share * num_facts))
    digits = vocabulary.first_digit() + generator.integers(10, size=(num_facts, 3))
    facts = np.concatenate([_some_names(num_facts, generator)[:, None], digits], 1)
    asked = generator.permutation(facts)[:num_asked]
    return _problem("needles", facts.ravel(), asked[:, 0], asked.ravel(), 4)


#: maker and least number of tokens of each family
FAMILIES: dict[str, tuple[Callable[[int, np.random.Generator], Problem], int]] = {
    "chase": (_chase, 32),
    "trace": (_trace, 64),
    "needles": (_needles, 32),
}
