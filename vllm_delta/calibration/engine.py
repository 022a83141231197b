"""An engine that a calibration asks: full attention's answers, and what any plan loses along them.

It uses vLLM's public interface alone; the workers' part is `vllm_delta.integration.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vllm_delta.calibration.prompts import CalibrationError, Chat, Json
from vllm_delta.calibration.search import Passes, split_passes
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.counters import total


@dataclass(frozen=True)
class Answer:
    """A prompt and the answer that full attention gave, of which the last tokens are scored."""

    tokens: list[int]
    #: position from which tokens are decode rows
    first_row: int

    @property
    def num_rows(self) -> int:
        """Tokens that are decode rows."""
        return len(self.tokens) - self.first_row


@dataclass(frozen=True)
class Loss:
    """What a plan loses, over all rows of some answers."""

    #: mean divergence from full attention's next-token distributions, nats
    divergence: float
    #: share of rows whose likeliest token is full attention's
    agreement: float


@dataclass(frozen=True)
class Observed:
    """What layers attend to, as defined in `vllm_delta.integration.calibration`."""

    #: share of layer j's attention on the pages that layer i chooses, by (i, j), i < j
    mass: dict[tuple[int, int], float]
    #: 1 - cos(attention of the layer before, of the layer), by layer
    distances: dict[int, float]


class Model:
    """A model as vLLM takes it, before an engine is started."""

    def __init__(self, name: str, options: Json) -> None:
        """Read its configuration.

        Args:
            name: as vLLM takes it.
            options: further arguments of ``vllm.LLM``.

        Raises:
            CalibrationError: there is no such model, or no such argument.
        """
        from vllm.engine.arg_utils import EngineArgs

        self.name, self.options = name, options
        try:
            self._config: Any = EngineArgs(model=name, **options).create_model_config()
        except Exception as error:  # vLLM's, transformers', pydantic's: their first line says it
            raise CalibrationError(f"{name} cannot be loaded: {first_line(error)}") from error
        self.max_model_len: int = self._config.max_model_len
        self.num_layers: int = self._config.get_total_num_hidden_layers()

    def chat_renderer(self) -> Chat | None:
        """From messages to token ids, by the model's chat template; None where it has none."""
        from vllm.tokenizers import cached_tokenizer_from_config

        if self._config.skip_tokenizer_init:
            return None
        try:
            tokenizer: Any = cached_tokenizer_from_config(self._config)
        except Exception as error:
            raise CalibrationError(f"{self.name} has no tokenizer: {first_line(error)}") from error
        if not getattr(tokenizer, "chat_template", None):
            return None

        def render(messages: Any) -> list[int]:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return tokens

        return render


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith("ModelConfig"):  # pydantic's head: what is wrong comes behind it
        lines = lines[1:]
    return lines[0] if lines else type(error).__name__


class Engine:
    """vLLM with DELTA, one request at a time in Python: no graphs, no prefix caching."""

    def __init__(self, model: Model, config: DeltaConfig, largest_budget: int, max_tokens: int) -> None:
        """Start.

        Args:
            model: that answers.
            config: the settings to calibrate for.
            largest_budget: of which the loss will be asked, in tokens.
            max_tokens: of the longest sequence; less where the model cannot take as many.

        Raises:
            CalibrationError: it did not start; vLLM's log says why.
        """
        from vllm import LLM

        settings = {
            "page_size": config.page_size,
            "budget_tokens": largest_budget,
            "recent_tokens": config.recent_tokens,
            "sink_tokens": config.sink_tokens,
        }
        arguments: Json = {
            "attention_backend": "DELTA",
            "additional_config": {"delta": settings},
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": min(max_tokens + 1, model.max_model_len),
            "disable_log_stats": True,
            **model.options,
        }
        try:
            self.llm: Any = LLM(model.name, **arguments)
        except Exception as error:
            raise CalibrationError(f"the engine did not start: {first_line(error)}") from error
        self.config = config
        self.eligible: list[int] = self._ask("layers")[0]
        self._scored: dict[int, Answer] = {}
        self._likeliest: dict[int, list[int]] = {}

    def answer(self, prompts: Sequence[Json], output_tokens: int, scored_tokens: int) -> list[Answer]:
        """Full attention's answers to prompts as vLLM takes them, sampled as the model's settings say."""
        self._use(tuple(self.eligible), self.config.budget_tokens)
        sampling = self.llm.get_default_sampling_params()
        sampling.max_tokens, sampling.detokenize = output_tokens, False
        answers = []
        for output in self.llm.generate(list(prompts), sampling, use_tqdm=False):
            prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            if len(answer) < 2:
                continue
            tokens = prompt + answer[:-1]
            answers.append(Answer(tokens, max(len(prompt), len(tokens) - scored_tokens)))
        return answers

    def record(self, answers: Sequence[Answer], observed_rows: int, tick: Callable[[], object]) -> Observed:
        """Keep full attention's distributions along the answers.

        Every layer selects meanwhile, which computes full attention. About `observed_rows` rows of each
        answer are observed. `tick` is called after each.
        """
        settings = {"full_layers": 0, "selection_layers": self.eligible}
        self.use(settings | {"budget_tokens": self.config.budget_tokens})
        for key, answer in enumerate(answers):
            self._scored[key] = answer
            every = max(1, answer.num_rows // observed_rows)
            _, likeliest = self._run(answer.tokens, answer.first_row, keep=key, observe_every=every)
            self._likeliest[key] = likeliest
            tick()
        seen = self._ask("observations")[0]
        return Observed(
            {(int(i), int(j)): mass for i, j, mass in seen["mass"]},
            {int(layer): distance for layer, distance in seen["distance"]},
        )

    def loss(self, passes: Passes, budget_tokens: int, keys: Sequence[int]) -> Loss:
        """What a plan loses along the recorded answers with these numbers."""
        self._use(passes, budget_tokens)
        divergences: list[float] = []
        agreements: list[bool] = []
        for key in keys:
            answer = self._scored[key]
            found, likeliest = self._run(answer.tokens, answer.first_row, against=key)
            if len(found) != answer.num_rows:
                raise CalibrationError(f"{len(found)} tokens were scored, not {answer.num_rows}")
            divergences += found
            agreements += [
                one == other for one, other in zip(likeliest[1:], self._likeliest[key][1:], strict=True)
            ]
        return Loss(fmean(divergences), fmean(agreements))

    def guesses(self, tokens: Sequence[int], first_row: int) -> list[int]:
        """The likeliest token at each place of a text from `first_row` on, and behind it, given all before.

        The tokens from `first_row` on are decode rows. Greedy decoding from there would write the text, and
        end it so, if and only if these are its tokens.
        """
        _, likeliest = self._run(tokens, first_row)
        if len(likeliest) != len(tokens) - first_row + 1:
            raise CalibrationError(f"{len(likeliest)} tokens were guessed, not {len(tokens) - first_row + 1}")
        return likeliest

    def use(self, settings: Json) -> None:
        """Change DELTA's settings; see `vllm_delta.integration.calibration.Calibration.use`."""
        self._ask("use", settings)

    def counters(self) -> Json:
        """DELTA's counters, summed over workers."""
        return total(self.llm.collective_rpc("delta_counters"))

    def _use(self, passes: Passes, budget_tokens: int) -> None:
        full_layers, selection_layers = split_passes(passes, self.eligible)
        settings = {"full_layers": full_layers, "selection_layers": list(selection_layers)}
        self.use(settings | {"budget_tokens": budget_tokens})

    def _run(self, tokens: Sequence[int], first_row: int, **how: Any) -> tuple[list[float], list[int]]:
        from vllm import SamplingParams

        self._ask("begin", first_row, len(tokens), **how)
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": list(tokens)}], sampling, use_tqdm=False)
        return next((found for found in self._ask("end") if found[1]), ([], []))

    def _ask(self, action: str, *args: Any, **kwargs: Any) -> list[Any]:
        results: list[Any] = self.llm.collective_rpc("delta_calibration", args=(action, *args), kwargs=kwargs)
        return results

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()
