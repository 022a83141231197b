"""Documents to look things up in, made of any text: it goes on, is quoted, and is asked about.

A document is a stretch of a text with memos in it, and an end of three kinds, every token of which is known:

- *prose*: the text as it goes on;
- *quotes*: passages of the document once more, word for word, each behind its first tokens;
- *facts*: questions about the memos, with their answers.

What is quoted and asked for lies at depths that are spread evenly. The questions, their wording and their
names are others than those that a calibration uses.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from benchmarks.lib.text_losses import FACTS, PROSE, QUOTES
from vllm_delta.calibration.texts import Encode, Text

FAMILIES = (QUOTES, FACTS, PROSE)

#: tokens that lead to a quotation, and that are quoted
CUE, QUOTED = 12, 40
#: tokens of prose that are scored
PROSE_ROWS = 192
#: quotations and questions
NUM_QUOTES, NUM_FACTS = 6, 12
#: tokens of a shortest document
LEAST_CONTEXT = 2048
#: parts of a document that `Document.places` distinguishes
PLACES = 4

_TITLES = "Professor|Captain|Sister|Judge|Nurse|Colonel|Deacon|Warden"
_SURNAMES = (
    "Abernathy|Bellweather|Cavendish|Drummond|Eastlake|Fairbanks|Goldberg|Hathaway|Iverson|Kowalski|"
    "Lindqvist|Montoya|Nakamura|Oyelaran|Petrov|Quigley|Rasmussen|Szymanski|Tremblay|Underhill"
)
_TOWNS = "Bristol|Leeds|Oslo|Turin|Ghent|Porto|Graz|Malmo|Cork|Lyon|Basel|Split|Varna|Tampere"
_DISHES = (
    "lentil soup|grilled trout|apple pie|mushroom risotto|roast lamb|onion tart|fish stew|rice pudding|"
    "cheese omelette|potato salad"
)
_DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
_KINDS = "express|night train|ferry|coach|tram"


@dataclass(frozen=True)
class Source:
    """A text, as tokens."""

    name: str
    tokens: list[int]
    #: indices of tokens that begin a sentence, ascending
    sentences: list[int]

    @classmethod
    def read(cls, name: str, text: str, encode: Encode) -> Source:
        """Of a text; sentences begin behind a full stop that a space or a line's end follows."""
        tokens: list[int] = []
        sentences: list[int] = []
        for sentence in _sentences(text):
            sentences.append(len(tokens))
            tokens += encode(sentence)
        return cls(name, tokens, sentences)

    @cached_property
    def digest(self) -> str:
        """The start of the SHA-256 of the tokens."""
        return hashlib.sha256(" ".join(map(str, self.tokens)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Document:
    """What is scored, and where what it needs lies."""

    text: Text
    #: by position of a scored token: the part of the document, from 0 on, in which lies what it looks up; of
    #: prose, the part of the scored tokens
    places: dict[int, int]


@dataclass(frozen=True)
class _Piece:
    """A stretch of the end; its tokens from `begin` to `end` are scored."""

    tokens: list[int]
    begin: int
    end: int
    family: str
    place: int


def make_document(
    source: Source, context: int, part: int, seed: int, encode: Encode, start: list[int]
) -> Document:
    """One document of exactly so many tokens.

    Args:
        source: of its text.
        context: tokens, at least `LEAST_CONTEXT`.
        part: which of several documents of this source and seed.
        seed: of what is chosen.
        encode: the model's tokenizer, without special tokens.
        start: tokens that every text of this model begins with.

    Raises:
        ValueError: the text or the context is too short.
    """
    if context < LEAST_CONTEXT:
        raise ValueError(f"documents have at least {LEAST_CONTEXT} tokens, not {context}")
    draw = random.Random(f"{seed} {part} {context} {source.name}")
    memos, questions = [], []
    for place, (memo, question, answer) in zip(_depths(NUM_FACTS, draw), _facts(draw), strict=False):
        asked, answered = encode(question), encode(answer)
        memos.append((place, encode(memo)))
        end = len(asked) + len(answered)
        tokens = asked + answered + encode(".")
        questions.append(_Piece(tokens, len(asked), end, FACTS, int(place * PLACES)))
    lead, behind = encode("\n\nThe text above says:"), encode("\n")
    quotation = len(lead) + CUE + QUOTED + len(behind)
    tail = PROSE_ROWS + NUM_QUOTES * quotation + sum(len(piece.tokens) for piece in questions)
    length = context - tail - len(start) - sum(len(memo) for _, memo in memos)
    if length < 2 * NUM_QUOTES * (CUE + QUOTED):
        raise ValueError(f"a context of {context} tokens is too short for this tokenizer")
    last = len(source.tokens) - length - PROSE_ROWS
    begins = [index for index in source.sentences if index <= last]
    if not begins:
        raise ValueError(f"{source.name} has {len(source.tokens)} tokens, too few for a context of {context}")
    begin = draw.choice(begins)
    passages = _passages(source, begin, length, draw)
    body = _with_memos(source, begin, length, memos, passages)
    pieces = [
        _Piece(
            lead + source.tokens[at : at + CUE + QUOTED] + behind,
            len(lead) + CUE,
            len(lead) + CUE + QUOTED,
            QUOTES,
            int((at - begin) / length * PLACES),
        )
        for at in passages
    ]
    pieces += questions
    draw.shuffle(pieces)
    return _assemble(
        [*start, *body], source.tokens[begin + length : begin + length + PROSE_ROWS], pieces, source.name
    )


def _assemble(body: list[int], prose: list[int], pieces: list[_Piece], name: str) -> Document:
    scored, places = {}, {}
    tokens = [*body, *prose]
    # The first row gives the token behind it.
    for position in range(len(body) + 1, len(tokens)):
        scored[position] = PROSE
        places[position] = (position - len(body)) * PLACES // len(prose)
    for piece in pieces:
        for position in range(len(tokens) + piece.begin, len(tokens) + piece.end):
            scored[position], places[position] = piece.family, piece.place
        tokens += piece.tokens
    return Document(Text(name, tokens, len(body), scored), places)


def _passages(source: Source, begin: int, length: int, draw: random.Random) -> list[int]:
    """Where passages begin that are quoted: the sentences next to depths that are spread evenly."""
    room = length - CUE - QUOTED
    inside = [index for index in source.sentences if begin <= index < begin + room] or [begin]
    found = []
    for depth in _depths(NUM_QUOTES, draw):
        wanted = begin + depth * room
        found.append(min(inside, key=lambda index: abs(index - wanted)))
    return found


def _with_memos(
    source: Source, begin: int, length: int, memos: list[tuple[float, list[int]]], passages: list[int]
) -> list[int]:
    """The stretch, with memos before sentences, at their depths and outside of the passages."""
    quoted = {index for at in passages for index in range(at + 1, at + CUE + QUOTED)}
    inside = [index for index in source.sentences if begin <= index < begin + length and index not in quoted]
    body: list[int] = []
    done = begin
    for depth, memo in sorted(memos):
        wanted = begin + depth * length
        at = min(
            (index for index in inside if index >= done), key=lambda index: abs(index - wanted), default=done
        )
        body += source.tokens[done:at] + memo
        done = at
    return body + source.tokens[done : begin + length]


def _depths(number: int, draw: random.Random) -> list[float]:
    return [(index + draw.random()) / number for index in range(number)]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])(?=\s)", text)


def _facts(draw: random.Random) -> Iterator[tuple[str, str, str]]:
    """Memo, question and answer; no two share what they are about."""
    surnames, towns = _shuffled(_SURNAMES, draw), _shuffled(_TOWNS, draw)
    people = [f"{draw.choice(_TITLES.split('|'))} {surname}" for surname in surnames]
    kinds: list[Callable[[str, str], tuple[str, str, str]]] = [
        lambda person, _: _room(person, draw),
        lambda _, town: _departure(town, draw),
        lambda person, _: _order(person, draw),
        lambda person, _: _case(person, draw),
    ]
    for index in range(min(len(people), len(towns))):
        yield kinds[index % len(kinds)](people[index], towns[index])


def _shuffled(words: str, draw: random.Random) -> list[str]:
    chosen = words.split("|")
    draw.shuffle(chosen)
    return chosen


def _room(person: str, draw: random.Random) -> tuple[str, str, str]:
    room = draw.randrange(100, 1000)
    return (
        f"\n[Staff list: {person} sits in room {room}.]\n",
        f"\n\nIn which room does {person} sit? According to the staff list, in room",
        f" {room}",
    )


def _departure(town: str, draw: random.Random) -> tuple[str, str, str]:
    kind, hour, minute = draw.choice(_KINDS.split("|")), draw.randrange(5, 24), draw.randrange(10, 60)
    return (
        f"\n[Timetable: the {kind} to {town} leaves at {hour:02}:{minute}.]\n",
        f"\n\nWhen does the {kind} to {town} leave? According to the timetable, at",
        f" {hour:02}:{minute}",
    )


def _order(person: str, draw: random.Random) -> tuple[str, str, str]:
    day, dish = draw.choice(_DAYS.split("|")), draw.choice(_DISHES.split("|"))
    return (
        f"\n[Menu: on {day} {person} ordered {dish}.]\n",
        f"\n\nWhat did {person} order on {day}? According to the menu, {person} ordered",
        f" {dish}",
    )


def _case(person: str, draw: random.Random) -> tuple[str, str, str]:
    number = f"{draw.choice('ABCDEFGHJKLM')}{draw.randrange(100, 1000)}"
    return (
        f"\n[Register: case {number} was handed to {person}.]\n",
        f"\n\nTo whom was case {number} handed? According to the register, it was handed to",
        f" {person}",
    )
