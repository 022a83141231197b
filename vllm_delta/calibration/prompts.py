"""What a calibration lets a model answer instead of the built-in texts: prompts of a file. Without vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_delta.calibration.texts import ANSWERS, DOCUMENTS, Text, answered

Json = dict[str, Any]

#: Tokens of an answer that can be scored: one to see, one to guess.
LEAST_ANSWER = 2

#: From a chat's messages to token ids.
Chat = Callable[[Any], list[int]]


class CalibrationError(Exception):
    """Stops a calibration; the message is for the person who started it."""


def read_prompts(path: Path) -> list[tuple[str, Json]]:
    """Entries of a file of prompts, and where each stands.

    Args:
        path: one prompt a line: JSON objects with "prompt", "prompt_token_ids" or "messages" (a chat), and
            "answer" where the model shall not write one, or with "document"; or plain text, which becomes an
            entry with "text".

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
        "document": lambda value: isinstance(value, str) and value != "",
        "answer": lambda value: isinstance(value, str) and value != "",
    }
    known = {name: entry[name] for name in kinds if name in entry}
    if not set(known) - {"answer"}:
        raise CalibrationError(f'{place}: neither "prompt", "prompt_token_ids", "messages" nor "document"')
    if "answer" in known and "document" in known:
        raise CalibrationError(f'{place}: a "document" has no "answer"')
    for name, value in known.items():
        if not kinds[name](value):
            wanted = {"prompt_token_ids": "a list of numbers", "messages": "a list of messages"}
            raise CalibrationError(f'{place}: "{name}" must be {wanted.get(name, "a text")}')
    return known


def given_text(place: str, prompt: Json, encode: Callable[..., list[int]], scored_tokens: int) -> Text | None:
    """A rendered prompt with its answer, or a document; None where the model has to write the answer.

    Args:
        place: where it stands, which becomes its name.
        prompt: of `render`.
        encode: from text to token ids; with ``add_special_tokens=False`` without those that begin a text.
        scored_tokens: of its end, at most.

    Raises:
        CalibrationError: a document or an answer of a single token.
    """
    if "document" in prompt:
        tokens = encode(prompt["document"])
        begin, end, family = tokens[:1], tokens[1:], DOCUMENTS
    elif "answer" in prompt:
        begin = prompt.get("prompt_token_ids") or encode(prompt["prompt"])
        end, family = encode(prompt["answer"], add_special_tokens=False), ANSWERS
    else:
        return None
    if len(end) < LEAST_ANSWER:
        raise CalibrationError(f"{place}: {len(end)} tokens are too few to score")
    return answered(place, begin, end, scored_tokens, family)


def render(entries: Sequence[tuple[str, Json]], chat: Chat | None) -> list[Json]:
    """Entries of `read_prompts` as vLLM takes them.

    Text is a chat's only message where `chat` can render one, and else the prompt.

    Raises:
        CalibrationError: messages for a model without a chat template, or that its template refuses.
    """
    prompts: list[Json] = []
    for place, entry in entries:
        answer = {"answer": entry["answer"]} if "answer" in entry else {}
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
            prompts.append({"prompt_token_ids": chat(messages)} | answer)
        except Exception as error:  # of the template's own
            raise CalibrationError(f"{place}: the chat template refuses these messages: {error}") from error
    return prompts
