"""What a calibration lets a model answer: prompts of a file, or those that are built in. Without vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

#: From a chat's messages to token ids.
Chat = Callable[[Any], list[int]]

#: For models that reason: each takes many steps to answer.
PROMPTS = (
    "How many integers from 1 to 2000 are divisible by 3 or by 5, but not by 7? Show each step.",
    "Find all pairs of positive integers (a, b) with a <= b and 1/a + 1/b = 1/12. Check every pair you list.",
    "A fair die is rolled until the sum of the results is at least 10. What is the expected number of "
    "rolls? Set up the recurrence and solve it exactly.",
    "Five people sit in a row. Anna does not sit next to Ben, Carl sits somewhere to the left of Dora, "
    "and Emil sits at an end. List all seatings.",
    "Write a Python function that finds the longest substring in which no character occurs more than "
    "twice. Explain why it is right, then trace it on 'aababcabbbcad'.",
    "In triangle ABC, AB = 13, BC = 14 and CA = 15. Find the distance between the incentre and the "
    "circumcentre, and verify the result in a second way.",
    "Multiply 48713 by 90274 by hand, digit by digit, and check the result by casting out nines and elevens.",
    "A water tank is filled by two pipes in 6 and 9 hours and emptied by a third in 12 hours. The first"
    " is opened at 8:00, the second at 9:30, the third at 10:15. When is the tank full?",
    "Determine the remainder when 7^2024 + 11^2024 is divided by 130. Justify each reduction.",
    "Design a schedule for a round-robin tournament of nine teams in which no team plays twice in a "
    "row. Give the whole schedule and check it.",
    "Prove that among any seven real numbers there are two, x and y, with 0 <= (x - y)/(1 + xy) <= "
    "1/sqrt(3). Discuss every case.",
    "Find the number of sequences of ten coin flips in which heads never occur three times in a row. "
    "List the values of the recurrence.",
)


class CalibrationError(Exception):
    """Stops a calibration; the message is for the person who started it."""


def read_prompts(path: Path) -> list[tuple[str, Json]]:
    """Entries of a file of prompts, and where each stands.

    Args:
        path: one prompt a line: JSON objects with "prompt", "prompt_token_ids" or "messages" (a chat), or
            plain text, which becomes an entry with "text".

    Raises:
        CalibrationError: a file that cannot be read, no prompt in it, or an entry that is none.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise CalibrationError(f"--prompts: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"--prompts: {path} is no text: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            is_object = line.lstrip().startswith("{")
            entries.append((place, _parse_object(place, line) if is_object else {"text": line}))
    if not entries:
        raise CalibrationError(f"--prompts: {path} has no prompt")
    return entries


def _parse_object(place: str, line: str) -> Json:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place}: {error}") from error
    kinds: dict[str, Callable[[Any], bool]] = {
        "prompt": lambda value: isinstance(value, str) and value != "",
        "prompt_token_ids": lambda value: isinstance(value, list)
        and value != []
        and all(isinstance(token, int) for token in value),
        "messages": lambda value: isinstance(value, list) and all(isinstance(m, dict) for m in value),
    }
    known = {name: entry[name] for name in kinds if name in entry}
    if not known:
        raise CalibrationError(f'{place}: neither "prompt", "prompt_token_ids" nor "messages"')
    for name, value in known.items():
        if not kinds[name](value):
            wanted = {"prompt": "a text", "prompt_token_ids": "a list of numbers"}
            raise CalibrationError(f'{place}: "{name}" must be {wanted.get(name, "a list of messages")}')
    return known


def render(entries: Sequence[tuple[str, Json]], chat: Chat | None) -> list[Json]:
    """Entries of `read_prompts` as vLLM takes them.

    Text is a chat's only message where `chat` can render one, and else the prompt.

    Raises:
        CalibrationError: messages for a model without a chat template, or that its template refuses.
    """
    prompts: list[Json] = []
    for place, entry in entries:
        messages = entry.get("messages")
        if "text" in entry:
            if chat is None:
                prompts.append({"prompt": entry["text"]})
                continue
            messages = [{"role": "user", "content": entry["text"]}]
        if messages is None:
            prompts.append(entry)
            continue
        if chat is None:
            raise CalibrationError(f"{place}: this model has no chat template for messages")
        try:
            prompts.append({"prompt_token_ids": chat(messages)})
        except Exception as error:  # of the template's own
            raise CalibrationError(f"{place}: the chat template refuses these messages: {error}") from error
    return prompts
