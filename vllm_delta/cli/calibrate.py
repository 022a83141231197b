"""``vllm-delta calibrate``: choose a model's full and selection layers by what its answers lose.

Everything that a user hands over is looked at before the engine starts, and what was found is printed before
it is written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_delta.calibration.file import CALIBRATION_FILE, unfinished
from vllm_delta.calibration.prompts import CalibrationError, Json, given_text, read_prompts, render
from vllm_delta.calibration.texts import Text, make_text
from vllm_delta.cli.options import json_object
from vllm_delta.method.config import DeltaConfig, DeltaConfigError

if TYPE_CHECKING:
    from vllm_delta.calibration.engine import Engine, Model

#: Full and selection layers where nobody says how many, at most: as many as the defaults have.
DEFAULT_PASSES = (DeltaConfig.full_layers, 3)
#: Built-in texts, half of them held out, and their tokens that look things up.
TEXTS, ROWS = 6, 384
#: Prompts that are answered at a time, each with a whole sequence's memory.
MOST_SEQUENCES = 16
#: Answers beyond the budget: one to search with, one to report on.
LEAST_ANSWERS = 2

#: Settings that a calibration has options for, or that mean nothing to it.
NOT_SETTINGS = {
    "full_layers": "use --full-layers",
    "selection_layers": "use --selection-layers",
    "budget_tokens": "use --budget-tokens",
    "calibration": "use --out",
    "calibrate": "it is what a server does at its start",
    "policy": "layers are searched for DELTA alone",
    "recall_sample_steps": "it measures what is lost",
}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vllm-delta``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="choose a model's full and selection layers by what its answers lose",
        description="Lets the model look things up in texts with full attention, searches the layers that "
        "lose least of this when all others are sparse, and writes them to a file that a server finds.",
    )
    add = parser.add_argument
    add("model", help="as vllm serve takes it")
    add("--context", type=int, metavar="N", help="tokens of the built-in texts (4096 on a CPU, or 8192)")
    add("--keep", type=float, default=0.99, metavar="SHARE", help="of what is looked up (%(default)s)")
    add("--selection-layers", type=int, metavar="N", help="how many (as few as keep enough)")
    add("--full-layers", type=int, metavar="N", help="passes over the whole cache beside those")
    budget = DeltaConfig.budget_tokens
    add("--budget-tokens", type=int, default=budget, metavar="B", help="that will be used (%(default)s)")
    add("--delta", type=json_object, default={}, metavar="JSON", help="further settings")
    add(
        "--prompts", type=Path, metavar="FILE", help="instead of the built-in texts: one a line, text or JSON"
    )
    add("--output-tokens", type=int, default=4096, metavar="N", help="longest answer to these (%(default)s)")
    add("--scored-tokens", type=int, default=1024, metavar="N", help="at an answer's end (%(default)s)")
    add("--max-prompt-tokens", type=int, default=4096, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the answers (%(default)s)")
    add("--engine", type=json_object, default={}, metavar="JSON", help="arguments of vllm.LLM")
    add("--out", type=Path, help=f"file to write ({CALIBRATION_FILE} in the model's folder, or else here)")
    add("--picture", type=Path, metavar="FILE", help=".svg or .png; takes matplotlib (none)")
    add("--end-with-stdin", action="store_true", help="when standard input is closed: nobody waits for it")
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
        numbers = ("selection_layers", "context", "output_tokens", "scored_tokens", "max_prompt_tokens")
        given = [value for name in numbers if (value := getattr(arguments, name)) is not None]
        if min(given) < 1 or (arguments.full_layers or 0) < 0:
            raise CalibrationError("--full-layers is 0 or more, and the other numbers are 1 or more")
        if not 0 < arguments.keep <= 1:
            raise CalibrationError("--keep is a share, above 0 and at most 1")
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
    """Calibrate; returns the exit status. No process of the engine is left, however it ends."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # At once: an exception would have to find its way out of an engine that may be starting.
        end_processes()
        for path in filter(None, (arguments.out, arguments.picture)):
            unfinished(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError, RuntimeError):  # nobody reads it, or this came amid a print
            print("\nvllm-delta calibrate: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if arguments.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        return _calibrate(arguments)
    except CalibrationError as error:
        print(f"vllm-delta calibrate: {error}", file=sys.stderr)
        return 1
    finally:
        end_processes()


def _end_with_stdin() -> None:
    """Signal this process when standard input is closed: whoever held its other end is gone."""
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def end_processes(engine: Engine | None = None) -> None:
    """Close the engine; then kill what is left of the processes that this one has started, and theirs."""
    import psutil  # type: ignore[import-untyped]

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started = psutil.Process().children(recursive=True)
    # It removes shared memory that others leave behind, and ends by itself.
    started = [process for process in started if not _is_tracker(process)]
    if engine is not None:
        engine.close()
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=10)


def _is_tracker(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in word for word in process.cmdline())
    return False


def _calibrate(arguments: argparse.Namespace) -> int:
    from vllm_delta.calibration import run as calibration
    from vllm_delta.calibration.engine import Engine, Model

    config = arguments.config
    passes = [arguments.full_layers, arguments.selection_layers]
    most = sum(
        default if told is None else told for told, default in zip(passes, DEFAULT_PASSES, strict=True)
    )
    model = Model(arguments.model, {"seed": arguments.seed} | arguments.engine)
    if arguments.entries is None:
        context = model.context(arguments.context)
        texts, prompts = built_in(model, context), []
        searched = calibration.search_budget(config, context)
    else:
        searched = config.budget_tokens
        prompts = render(arguments.entries, model.chat_renderer())
        texts, prompts = given_texts(model, arguments, prompts)
    options = calibration.Options(
        config=config,
        search_budget=searched,
        most_passes=min(most, model.num_layers),
        exactly=passes != [None, None],
        keep=arguments.keep,
    )
    longest = max((len(text.tokens) for text in texts), default=0)
    if prompts:
        longest = max(longest, arguments.max_prompt_tokens + arguments.output_tokens)
    sequences = min(max(1, len(prompts)), MOST_SEQUENCES)
    budget = max(calibration.budgets(options))
    engine = Engine(model, config, budget, longest, rows=max(ROWS, sequences), sequences=sequences)
    try:
        if prompts:
            texts += engine.answer(prompts, arguments.output_tokens, arguments.scored_tokens)
        if arguments.entries is not None:
            texts = enough(texts, len(arguments.entries), searched)
        with Progress(calibration.estimate(texts, options, len(engine.eligible))) as progress:
            result = calibration.calibrate(engine, texts, options, progress.tick)
    finally:
        end_processes(engine)
    result.notes = calibration.describe_run(
        arguments.model, "built in" if arguments.prompts is None else arguments.prompts.name
    )
    result.notes |= {"num_layers": model.num_layers, **model.shape}
    print(calibration.table(result), flush=True)
    _write(arguments, result)
    return 0


def built_in(model: Model, context: int) -> list[Text]:
    """The built-in texts in a model's tokens, of this length; halves of the prose in turn.

    Raises:
        CalibrationError: the model has no tokenizer.
    """
    tokenizer = model.tokenizer()

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return tokens

    start = tokenizer.encode("")  # what begins every text of this model
    rows = max(64, min(ROWS, context // 4) // 64 * 64)
    return [make_text(seed, encode, start, context, rows, seed % 2) for seed in range(TEXTS)]


def given_texts(
    model: Model, arguments: argparse.Namespace, prompts: list[Json]
) -> tuple[list[Text], list[Json]]:
    """Prompts with their answers and documents, as texts; and the prompts that the model has to answer.

    Raises:
        CalibrationError: one that is too short, or longer than the model takes.
    """
    if not any("answer" in prompt or "document" in prompt for prompt in prompts):
        return [], prompts
    encode = model.tokenizer().encode
    texts, rest = [], []
    for (place, _), prompt in zip(arguments.entries, prompts, strict=True):
        text = given_text(place, prompt, encode, arguments.scored_tokens)
        if text is None:
            rest.append(prompt)
        elif len(text.tokens) >= model.max_model_len:
            raise CalibrationError(
                f"{place}: {len(text.tokens)} tokens are more than the model's {model.max_model_len}"
            )
        else:
            texts.append(text)
    return texts, rest


def enough(answers: list[Text], prompts: int, budget: int) -> list[Text]:
    """Those that exceed the budget; raises `CalibrationError` where they are too few."""
    found = [answer for answer in answers if len(answer.tokens) > budget]
    if len(found) < LEAST_ANSWERS:
        raise CalibrationError(
            f"{len(found)} of {prompts} sequences exceed the budget of {budget} tokens, where at least "
            f"{LEAST_ANSWERS} are needed: longer prompts, more output tokens or a smaller budget"
        )
    return found


def _write(arguments: argparse.Namespace, result: Any) -> None:
    from vllm_delta.calibration.file import whole, write_settings

    out = arguments.out
    try:
        write_settings(result.settings(), out)
        print(f'\nwritten to {out}; vllm serve ... --additional-config "$(cat {out})"')
        if arguments.picture is not None:
            from vllm_delta.calibration.picture import draw

            with whole(arguments.picture) as picture:
                draw(result, picture)
    except OSError as error:
        raise CalibrationError(f"{error.filename}: {error.strerror}") from error


class Progress:
    """A bar over all tokens that will be computed, at most, with an estimate of the time."""

    def __init__(self, tokens: int) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(total=tokens, unit="tok", unit_scale=True, dynamic_ncols=True, desc="calibrating")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # it took fewer
            self._bar.total = self._bar.n
        self._bar.close()

    def tick(self, tokens: int) -> None:
        """So many more are done."""
        self._bar.update(tokens)
