"""The reasoner's words and its tokenizer: names of two syllables, digits and a few marks, one token each.

A name is one token, so that looking a name up is one step of attention and not the assembly of several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

CONSONANTS = "bdfghjklmnprstvwxyz"
VOWELS = "aeiou"
NUM_NAMES = 4096

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MARKS = ("chase", "trace", "needles", "?", "=", ":")
DIGITS = tuple("0123456789")
SPECIAL = (PAD, BOS, EOS)

_PATTERN = r"[a-z]+|[0-9]|[^\sa-z0-9]"
_WORD = re.compile(_PATTERN)


@cache
def names() -> tuple[str, ...]:
    """The names, in the order of their tokens: `NUM_NAMES` of the words of two syllables."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    words = [first + second for first in syllables for second in syllables if first != second]
    return tuple(words[:NUM_NAMES])


@cache
def words() -> tuple[str, ...]:
    """All tokens, in order: special ones, marks, digits, names."""
    return (*SPECIAL, *MARKS, *DIGITS, *names())


@cache
def token_ids() -> dict[str, int]:
    """The token of each word."""
    return {word: index for index, word in enumerate(words())}


def first_digit() -> int:
    """The token of 0; those of the other digits follow."""
    return token_ids()["0"]


def first_name() -> int:
    """The token of the first name; the others follow."""
    return token_ids()[names()[0]]


def encode(text: str) -> list[int]:
    """The tokens of a text, without special ones.

    Raises:
        KeyError: a word that is not in the vocabulary.
    """
    ids = token_ids()
    return [ids[word] for word in _WORD.findall(text)]


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens, special ones left out; one space between words."""
    all_words = words()
    return " ".join(all_words[token] for token in tokens if token >= len(SPECIAL))


def split(text: str) -> list[str]:
    """The words of a text, known or not."""
    return _WORD.findall(text)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)


def save_tokenizer(folder: str, max_length: int) -> None:
    """Write the tokenizer, as transformers and vLLM load it; `max_length` is the model's, in tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids: dict[str, int] = token_ids()
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), "removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("$"), " "), decoders.Fuse()])
    bos: Sequence[tuple[str, int]] = [(BOS, ids[BOS])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=bos)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
