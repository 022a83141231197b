"""``vllm-delta calibrate``: choose a model's full and selection layers by what its answers lose.

Everything that a user hands over is looked at before the engine starts, and what was found is printed before
it is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vllm_delta.calibration.file import CALIBRATION_FILE
from vllm_delta.calibration.prompts import PROMPTS, CalibrationError, read_prompts, render
from vllm_delta.cli.options import json_object
from vllm_delta.method.config import DeltaConfig, DeltaConfigError

#: Settings that a calibration has options for, or that mean nothing to it.
NOT_SETTINGS = {
    "full_layers": "use --full-layers",
    "selection_layers": "use --selection-layers",
    "budget_tokens": "use --budget-tokens",
    "calibration": "use --out",
    "policy": "layers are searched for DELTA alone",
    "recall_sample_steps": "it measures what is lost",
}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vllm-delta``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="choose a model's full and selection layers by what its answers lose",
        description="Lets the model answer with full attention, searches the layers that change the "
        "distribution of the next token least along these answers when all others are sparse, and writes "
        "them to a file that --additional-config takes.",
    )
    add = parser.add_argument
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
    parser.set_defaults(complete=lambda arguments: _complete(parser, arguments), run=run)


def _complete(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Check what the command line names, files included; exits with a message if something is wrong."""
    try:
        for key, instead in NOT_SETTINGS.items():
            if key in arguments.delta:
                raise CalibrationError(f"--delta: {key} does not apply to a calibration; {instead}")
        settings = {**arguments.delta, "budget_tokens": arguments.budget_tokens}
        arguments.config = DeltaConfig.from_additional_config({"delta": settings})
        if arguments.engine.get("pipeline_parallel_size", 1) != 1:
            raise CalibrationError("--engine: a calibration does not support pipeline parallelism")
        numbers = ("selection_layers", "output_tokens", "scored_tokens", "max_prompt_tokens")
        if min(getattr(arguments, name) for name in numbers) < 1 or arguments.full_layers < 0:
            raise CalibrationError("--full-layers is 0 or more, and the other numbers are 1 or more")
        folder = Path(arguments.model) if Path(arguments.model).is_dir() else Path()
        arguments.out = arguments.out or folder / CALIBRATION_FILE
        check_output("--out", arguments.out)
        if arguments.picture is not None:
            _check_picture(arguments.picture)
        arguments.entries = None if arguments.prompts is None else read_prompts(arguments.prompts)
    except (CalibrationError, DeltaConfigError) as error:
        parser.error(str(error))


def check_output(option: str, path: Path) -> None:
    """Raise `CalibrationError` unless the file can be written."""
    folder = path.parent
    if path.is_dir():
        raise CalibrationError(f"{option}: {path} is a folder, not a file")
    if not folder.is_dir():
        raise CalibrationError(f"{option}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CalibrationError(f"{option}: {path} cannot be written")


def _check_picture(path: Path) -> None:
    if path.suffix not in (".svg", ".png"):
        raise CalibrationError(f"--picture: {path} must end in .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise CalibrationError("--picture takes matplotlib, which is not installed: pip install matplotlib")
    check_output("--picture", path)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate; returns the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _calibrate(arguments)
    except CalibrationError as error:
        print(f"vllm-delta calibrate: {error}", file=sys.stderr)
        return 1


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends this process by way of an exception, so that the engine is stopped on the way out."""
    raise SystemExit(128 + number)


def _calibrate(arguments: argparse.Namespace) -> int:
    from vllm_delta.calibration import run as calibration
    from vllm_delta.calibration.engine import Engine, Model

    config = arguments.config
    options = calibration.Options(
        config=config,
        passes=arguments.full_layers + arguments.selection_layers,
        output_tokens=arguments.output_tokens,
        scored_tokens=arguments.scored_tokens,
    )
    model = Model(arguments.model, {"seed": arguments.seed} | arguments.engine)
    chat = model.chat_renderer()
    if arguments.entries is not None:
        prompts = render(arguments.entries, chat)
    elif chat is not None:
        prompts = [{"prompt_token_ids": chat([{"role": "user", "content": text}])} for text in PROMPTS]
    else:
        raise CalibrationError("this model has no chat template: give prompts by --prompts FILE")
    max_tokens = arguments.max_prompt_tokens + arguments.output_tokens
    engine = Engine(model, config, max(calibration.budgets(config)), max_tokens)
    try:
        with Progress() as progress:
            result = calibration.calibrate(engine, prompts, options, progress.part)
    finally:
        engine.close()
    result.notes = calibration.describe_run(
        arguments.model, "built in" if arguments.prompts is None else arguments.prompts.name
    )
    result.notes["num_layers"] = model.num_layers
    print(calibration.table(result), flush=True)
    _write(arguments, result)
    return 0


def _write(arguments: argparse.Namespace, result: Any) -> None:
    from vllm_delta.calibration.file import write_settings

    out = arguments.out
    try:
        write_settings(result.settings(), out)
        print(f'\nwritten to {out}; vllm serve ... --additional-config "$(cat {out})"')
        if arguments.picture is not None:
            from vllm_delta.calibration.picture import draw

            draw(result, arguments.picture)
    except OSError as error:
        raise CalibrationError(f"{error.filename}: {error.strerror}") from error


class Progress:
    """A bar that counts what is done of one part after another; how much it will be is not known ahead."""

    def __init__(self) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(unit=" passes", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def part(self, name: str) -> Callable[[], object]:
        """Begin a part; what is returned counts up by one."""
        self._bar.reset()
        self._bar.set_description(name)
        update: Callable[[], object] = self._bar.update
        return update
