"""Texts that retrieve: a long stretch to look things up in, and an end that looks them up. Without vLLM.

An end quotes passages word for word, answers questions, repeats what names are bound to, reads code back,
and goes on with plain prose. Each of its tokens is known, so a model need not write any: it is enough to see
which of them full attention expects, and what sparse layers make of these.

The prose in ``passages.txt`` was written for this project. All else comes from the generators below; the same
seed gives the same text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

#: From text to token ids, without special tokens.
Encode = Callable[[str], list[int]]

#: Families of tokens that are looked up, and that of plain prose.
RETRIEVAL = ("quotes", "facts", "names", "code")
PROSE = "prose"
#: Of answers and documents that somebody gives.
ANSWERS, DOCUMENTS = "answers", "documents"

#: Words of a quoted passage that lead to the rest of it.
CUE_WORDS = 9
#: Words that are quoted.
QUOTED_WORDS = 36
#: Paragraphs of each text that go on as plain prose, and their tokens before those that count.
PROSE_PASSAGES, PROSE_CUE = 4, 8

_FIRST = "Ada Bram Celia Dov Elin Farid Greta Hugo Ines Jonas Kaya Lars Mira Nils Oda Pavel Runa Selim Tova"
_LAST = "Adler Brandt Castell Dahl Ekman Falk Garnier Holt Ivers Jansen Korda Lindt Marlow Norden Okafor"
_THINGS = "locker|boat shed|bicycle|garden plot|post box|library card|telescope|cello case|kiln|studio|barge"
_PLACES = "Norrvik Altstead Brenna Calder Dunmore Estrel Fennick Garrow Halden Istria Jarrow Kestrel Lomond"
_GOODS = "timber|salt|copper|barley|wool|slate|coal|hemp|glass|lamp oil|dried cod|roof tiles|potatoes"
_COLOURS = "amber black blue copper green grey ochre purple red silver violet white yellow"
_WEATHER = "fog at dawn|a falling glass|wind from the north|snow on the hills|a heavy swell|clear skies"
_WORDS = "marlin cedar falcon harbor lantern orchard pebble quarry ribbon saddle thistle walnut anchor"
_MONTHS = "January February March April May June July August September October November December"


@dataclass(frozen=True)
class Piece:
    """A stretch of a text; with a family, its tokens from `skipped` on are scored."""

    text: str
    family: str | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Text:
    """Tokens, and which of them are scored."""

    name: str
    tokens: list[int]
    #: position from which tokens are decode rows
    first_row: int
    #: families of the scored tokens by position, all behind `first_row`
    scored: dict[int, str] = field(default_factory=dict)

    @property
    def positions(self) -> list[int]:
        """Those of the scored tokens, ascending."""
        return sorted(self.scored)


@cache
def passages() -> tuple[str, ...]:
    """The paragraphs of prose."""
    text = (files(__package__) / "passages.txt").read_text()
    return tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


def make_text(
    seed: int, encode: Encode, start: Sequence[int], length: int, num_rows: int, part: int = 0
) -> Text:
    """A text of at most `length` tokens, of which at most the last `num_rows` are decode rows.

    These begin at a multiple of `num_rows`, so that a model that computes as many tokens at a time has them
    for themselves.

    Args:
        seed: of everything in it.
        encode: the model's tokenizer.
        start: tokens that every text of this model begins with.
        length: tokens, at least twice `num_rows`.
        num_rows: tokens of the end, in which things are looked up.
        part: 0 or 1: which half of the prose it is made of.
    """
    draw = random.Random(seed)
    source = _Source(draw, passages()[part::2])
    pieces: list[list[int]] = []
    tail: list[tuple[Piece, list[int]]] = []
    used = 0
    for group in source.ends():
        encoded = [(piece, encode(piece.text)) for piece in group]
        size = sum(len(tokens) for _, tokens in encoded)
        if used + size > num_rows:
            break
        tail += encoded
        used += size
    first_row = (length - used) // num_rows * num_rows
    needed = [encode(text) for text in source.needed]
    room = first_row - len(start) - sum(map(len, needed))
    for text in source.filling():
        if room <= 0:
            break
        pieces.append(encode(text)[:room])
        room -= len(pieces[-1])
    pieces += needed
    draw.shuffle(pieces)
    tokens = [*start, *(token for piece in pieces for token in piece)][:first_row]
    end = first_row
    scored: dict[int, str] = {}
    for piece, encoded_piece in tail:
        if piece.family is not None:
            # The first row gives the token behind it.
            begin = max(end + piece.skipped, first_row + 1)
            scored |= dict.fromkeys(range(begin, end + len(encoded_piece)), piece.family)
        tokens += encoded_piece
        end = len(tokens)
    return Text(f"built in {seed}", tokens, first_row, scored)


def answered(
    name: str, prompt: list[int], answer: list[int], scored_tokens: int, family: str = ANSWERS
) -> Text:
    """A prompt with an answer, of which the last tokens are scored, two or more."""
    tokens = prompt + answer
    first_row = max(len(prompt), len(tokens) - scored_tokens - 1)
    return Text(name, tokens, first_row, dict.fromkeys(range(first_row + 1, len(tokens)), family))


class _Source:
    """Where the parts of one text come from."""

    def __init__(self, draw: random.Random, prose: Sequence[str]) -> None:
        self._draw = draw
        paragraphs = list(prose)
        draw.shuffle(paragraphs)
        #: these go on as plain prose, and stand nowhere else
        self._prose = iter(paragraphs[:PROSE_PASSAGES])
        self._paragraphs = paragraphs[PROSE_PASSAGES:]
        self._quoted = iter(self._paragraphs)
        #: what the end looks up
        self.needed: list[str] = []

    def ends(self) -> Iterator[list[Piece]]:
        """Groups of pieces for a text's end, without end; what they look up goes to `needed`."""
        kinds = (self._quote, self._fact, self._binding, self._fact, self._code, self._fact, self._go_on)
        for kind in itertools.cycle(kinds):
            yield kind() or self._fact()

    def filling(self) -> Iterator[str]:
        """What stands between what is looked up, without end."""
        for paragraph in self._paragraphs:
            if not any(paragraph in text for text in self.needed):
                yield f"\n\n{paragraph}"
        while True:
            yield self._entry()

    def _pick(self, words: str) -> str:
        return self._draw.choice(words.split("|") if "|" in words else words.split())

    def _name(self) -> str:
        return f"{self._pick(_FIRST)} {self._pick(_LAST)}"

    def _go_on(self) -> list[Piece]:
        paragraph = next(self._prose, None)
        return [Piece(f"\n\n{paragraph}", PROSE, PROSE_CUE)] if paragraph else []

    def _quote(self) -> list[Piece]:
        passage = next(self._quoted, None)
        if passage is None:
            return []
        words = passage.split()
        number = self._draw.randrange(100, 1000)
        self.needed.append(f"\n\n({number}) {passage}")
        cue, rest = " ".join(words[:CUE_WORDS]), " ".join(words[CUE_WORDS : CUE_WORDS + QUOTED_WORDS])
        return [Piece(f"\n\nAs quoted above, word for word: ({number}) {cue}"), Piece(f" {rest}", "quotes")]

    def _fact(self) -> list[Piece]:
        name, thing, number = self._name(), self._pick(_THINGS), self._draw.randrange(1000, 10000)
        colour, place = self._pick(_COLOURS), self._pick(_PLACES)
        self.needed.append(
            f"\n\nNote: the {thing} of {name} has the number {number}. It is {colour} and stands in {place}."
        )
        question, answer = self._draw.choice(
            [
                (f"Which number has the {thing} of {name}? The number", f" {number}"),
                (f"Which colour has the {thing} of {name}? It is", f" {colour}"),
                (f"Where does the {thing} of {name} stand? It stands in", f" {place}"),
            ]
        )
        return [Piece(f"\n\nQuestion: {question}"), Piece(answer, "facts"), Piece(".")]

    def _binding(self) -> list[Piece]:
        name, value = f"{self._pick(_WORDS)}_{self._pick(_WORDS)}", self._draw.randrange(10000, 100000)
        self.needed.append(f"\n\nset {name} = {value}")
        return [Piece(f"\n\nget {name} ="), Piece(f" {value}", "names")]

    def _code(self) -> list[Piece]:
        name = f"{self._pick(_WORDS)}_{self._pick(_WORDS)}"
        first, second, third = (self._draw.randrange(2, 100) for _ in range(3))
        operator, other = self._draw.choice("+-*"), self._draw.choice(["min", "max", "pow"])
        head = f"\n\ndef {name}(value, limit):"
        body = (
            f"\n    total = value {operator} {first}\n    if total > limit:"
            f"\n        total = {other}(total, {second})\n    return total + {third}"
        )
        self.needed.append(head + body)
        return [Piece(head), Piece(body, "code")]

    def _entry(self) -> str:
        """A line of a harbour's book, as prose that a model has not seen."""
        day, month, year = self._draw.randrange(1, 29), self._pick(_MONTHS), self._draw.randrange(1802, 1930)
        ship, goods, weather = self._pick(_WORDS).capitalize(), self._pick(_GOODS), self._pick(_WEATHER)
        tons, crew = self._draw.randrange(20, 900), self._draw.randrange(3, 40)
        come, go = self._pick(_PLACES), self._pick(_PLACES)
        return self._draw.choice(
            [
                f"\n\nOn {day} {month} {year} the {ship} came in from {come} with {tons} tons of {goods} and "
                f"a crew of {crew}. Her master, {self._name()}, reported {weather} and asked for water.",
                f"\n\n{self._name()} wrote from {come} in {month} {year} that {goods} had become dear, that "
                f"there was {weather}, and that the {ship} lay at {go} with {tons} tons unsold.",
                f"\n\nThe harbour of {come} let {crew} boats out on {day} {month} {year}, in spite "
                f"of {weather}. By evening all but the {ship} were back; she had gone to {go} for {goods}.",
            ]
        )
