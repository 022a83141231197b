"""The command ``vllm-delta``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_delta.calibration.file import CALIBRATION_FILE
from vllm_delta.config import DeltaConfig, DeltaConfigError


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="vllm-delta", description="Tools for DELTA, sparse decoding in vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser(
        "calibrate",
        help="choose a model's full and selection layers by what its answers lose",
        description="Lets the model answer with full attention, searches the layers that change the "
        "distribution of the next token least along these answers when all others are sparse, and writes "
        "them to a file that --additional-config takes.",
    )
    add = calibrate.add_argument
    add("model", help="as vllm serve takes it")
    add("--prompts", type=Path, metavar="FILE", help="one a line, text or JSON (reasoning tasks)")
    add("--selection-layers", type=int, default=3, metavar="N", help="how many (3)")
    add(
        "--full-layers",
        type=int,
        default=DeltaConfig.full_layers,
        metavar="N",
        help="passes over the whole cache beside those; the result may spend them otherwise (%(default)s)",
    )
    budget = DeltaConfig.budget_tokens
    add("--budget-tokens", type=int, default=budget, metavar="B", help="(%(default)s)")
    add("--delta", type=json_object, default={}, metavar="JSON", help="further settings")
    add("--output-tokens", type=int, default=4096, metavar="N", help="longest answer (%(default)s)")
    add("--scored-tokens", type=int, default=1024, metavar="N", help="at an answer's end (%(default)s)")
    add("--max-prompt-tokens", type=int, default=4096, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the answers (%(default)s)")
    add("--engine", type=json_object, default={}, metavar="JSON", help="arguments of vllm.LLM")
    add("--out", type=Path, help=f"file to write ({CALIBRATION_FILE} in the model's folder, or else here)")
    add("--picture", type=Path, metavar="FILE", help=".svg or .png; takes matplotlib (none)")
    arguments = parser.parse_args(argv)
    try:
        settings = {**arguments.delta, "budget_tokens": arguments.budget_tokens}
        arguments.config = DeltaConfig.from_additional_config({"delta": settings})
    except DeltaConfigError as error:
        parser.error(str(error))
    if arguments.engine.get("pipeline_parallel_size", 1) != 1:
        parser.error("--engine: a calibration does not serve pipeline parallelism")
    numbers = ("selection_layers", "output_tokens", "scored_tokens", "max_prompt_tokens")
    if min(getattr(arguments, name) for name in numbers) < 1 or arguments.full_layers < 0:
        parser.error("--full-layers is 0 or more, and the other numbers are 1 or more")
    return arguments


def json_object(text: str) -> dict[str, Any]:
    """An option's value; raises ValueError for other JSON than an object."""
    value: Any = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def calibrate(arguments: argparse.Namespace) -> int:
    """``vllm-delta calibrate``; returns the exit status."""
    from vllm_delta.calibration import run
    from vllm_delta.calibration.engine import CalibrationError, Engine, read_prompts
    from vllm_delta.calibration.prompts import PROMPTS

    config, model = arguments.config, arguments.model
    max_tokens = arguments.max_prompt_tokens + arguments.output_tokens
    engine_options = {"seed": arguments.seed} | arguments.engine
    engine = Engine(model, config, max(run.budgets(config)), max_tokens, engine_options)
    try:
        chat = chat_renderer(engine.llm, arguments.engine)
        if arguments.prompts is None:
            if chat is None:
                raise CalibrationError("this model has no chat template: give prompts by --prompts FILE")
            prompts = [{"prompt_token_ids": chat([{"role": "user", "content": text}])} for text in PROMPTS]
        else:
            prompts = read_prompts(arguments.prompts, chat)
        options = run.Options(
            config=config,
            passes=arguments.full_layers + arguments.selection_layers,
            output_tokens=arguments.output_tokens,
            scored_tokens=arguments.scored_tokens,
        )
        with Progress() as progress:
            result = run.calibrate(engine, prompts, options, progress.part)
    except CalibrationError as error:
        print(f"vllm-delta calibrate: {error}", file=sys.stderr)
        return 1
    finally:
        engine.close()
    result.notes = run.describe_run(
        model, "built in" if arguments.prompts is None else arguments.prompts.name
    )
    folder = Path(model) if Path(model).is_dir() else Path()
    out = arguments.out or folder / CALIBRATION_FILE
    run.write_settings(result, out)
    if arguments.picture is not None:
        from vllm_delta.calibration.picture import draw

        draw(result, arguments.picture)
    print(run.table(result))
    print(f'\nwritten to {out}; vllm serve ... --additional-config "$(cat {out})"')
    return 0


def chat_renderer(llm: Any, engine_options: dict[str, Any]) -> Callable[[Any], list[int]] | None:
    """From messages to token ids, by the model's chat template; None where it has none."""
    if engine_options.get("skip_tokenizer_init"):
        return None
    tokenizer = llm.get_tokenizer()
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return tokens

    return render


class Progress:
    """A bar that counts the steps of one part after another; their number is not known ahead."""

    def __init__(self) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(unit=" steps", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def part(self, name: str) -> Callable[[], object]:
        """Begin a part; what is returned counts one step."""
        self._bar.reset()
        self._bar.set_description(name)
        update: Callable[[], object] = self._bar.update
        return update


def main() -> None:
    """Entry point; ends the process."""
    arguments = parse_arguments(sys.argv[1:])
    sys.exit(calibrate(arguments))
