"""Serve a small model with the DELTA attention backend, ask it two questions, show what it read.

Everything is local: the model is built on this machine (see ``demo_model``) and the server listens
on the loopback address. Both prompts are several times longer than the token budget, so most
layers decode from a small part of the context; the last line says how small. The exit status is 0
only if the server started, both answers had text and fewer tokens were read than a dense attention
would have read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from demo_model import ROOT, default_model, repository_text
from server import Server, ServerError, exit_status, show_waiting

BUDGET = {"budget_tokens": 256, "recent_tokens": 64}
PROMPT_TOKENS = 2000
MAX_TOKENS = 64
LOG = ROOT / "build" / "demo-server.log"


def prompt_text(server: Server, num_tokens: int) -> str:
    """Text from the repository of about ``num_tokens`` tokens of the served model."""
    sample = repository_text(4 * num_tokens)
    count = server.post("/tokenize", {"model": server.model, "prompt": sample})["count"]
    return repository_text(len(sample) * num_tokens // count)


def ask(server: Server) -> None:
    """One completion and one chat completion, both with a long prompt."""
    client = server.client()
    text = prompt_text(server, PROMPT_TOKENS)

    begin = time.monotonic()
    completion = client.completions.create(
        model=server.model, prompt=text, max_tokens=MAX_TOKENS, temperature=0.0
    )
    show_answer("/v1/completions", completion.choices[0].text, completion.usage, begin)

    begin = time.monotonic()
    chat = client.chat.completions.create(
        model=server.model,
        messages=[
            {"role": "system", "content": "Answer from the document."},
            {"role": "user", "content": f"{text}\n\nWhat is this document about?"},
        ],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
    )
    show_answer("/v1/chat/completions", chat.choices[0].message.content, chat.usage, begin)


def show_answer(name: str, answer: str | None, usage: Any, begin: float) -> None:
    """Print one answer in short; an answer without text, or to a short prompt, is an error."""
    if not answer or not answer.strip():
        raise ServerError(f"{name} answered without text")
    print(
        f"{name}: {usage.prompt_tokens} tokens in, {usage.completion_tokens} out, "
        f"{time.monotonic() - begin:.1f} s"
    )
    print(f"  {' '.join(answer.split())[:90]}")
    if usage.prompt_tokens < 4 * BUDGET["budget_tokens"]:
        raise ServerError(f"the prompt of {name} is too short to show anything")


def show_counters(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print what decoding read between two readings of the counters."""
    attended = int(after["attended_tokens"]) - int(before["attended_tokens"])
    context = int(after["context_tokens"]) - int(before["context_tokens"])
    if not 0 < attended < context:
        raise ServerError(f"attended {attended} of {context} tokens: nothing was saved")
    print("decoding, over all layers:")
    print(f"attended {attended} of {context} tokens ({context / attended:.1f} x fewer)")


def run(model: Path | str, extra: list[str]) -> None:
    """Serve the model, ask, count, stop the server."""
    config = json.dumps({"delta": BUDGET})
    # vLLM wants to find that share of the machine's memory free; the model needs a fraction of it.
    extra = ["--gpu-memory-utilization", "0.3", *extra]
    arguments = ["--attention-backend", "DELTA", "--additional-config", config, *extra]
    print(f"vllm serve {model} {' '.join(arguments[:3])} '{config}' {' '.join(extra)}")
    print(f"  log: {LOG}")
    begin = time.monotonic()
    with Server(model, arguments, log_path=LOG, on_wait=show_waiting) as server:
        clear = "\r" if sys.stdout.isatty() else ""
        print(f"{clear}  healthy after {time.monotonic() - begin:.0f} s at {server.base_url}")
        before = server.counters()
        ask(server)
        show_counters(before, server.counters())


def main() -> int:
    """Run the demo; arguments that are not its own go to ``vllm serve``."""
    parser = argparse.ArgumentParser(description="serve a small model with the DELTA backend")
    parser.add_argument("--model", help="a model folder; the demo model if not given")
    options, extra = parser.parse_known_args()
    return exit_status(lambda: run(options.model or default_model(), extra), LOG)


if __name__ == "__main__":
    sys.exit(main())
