"""An engine that a calibration asks: full attention's answers, and what any plan loses along them.

It uses vLLM's public interface alone; the workers' part is `vllm_delta.integration.calibration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_delta.calibration.evidence import Found
from vllm_delta.calibration.file import shape_of
from vllm_delta.calibration.prompts import CalibrationError, Chat, Json
from vllm_delta.calibration.search import Passes, split_passes
from vllm_delta.calibration.texts import Text, answered
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.counters import total


@dataclass(frozen=True)
class Observed:
    """What layers attend to, as defined in `vllm_delta.integration.calibration`."""

    #: share of layer j's attention on the pages that layer i chooses, by (i, j), i < j
    mass: dict[tuple[int, int], float]
    #: 1 - cos(attention of the layer before, of the layer), by layer
    distances: dict[int, float]


#: Tokens of a text in which something can be looked up from afar.
LEAST_CONTEXT = 768


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
        self.shape = shape_of(self._config.hf_text_config)

    def context(self, asked: int | None) -> int:
        """Tokens of the texts to calibrate with: as asked, or as the model and the machine allow.

        Raises:
            CalibrationError: more tokens are asked for than the model takes, or it takes too few.
        """
        from vllm.platforms import current_platform

        longest = self.max_model_len - 1
        if asked is not None and asked > longest:
            raise CalibrationError(f"--context {asked} is more than the model's {longest} tokens")
        context = asked or min(longest, 4096 if current_platform.is_cpu() else 8192)
        if context < LEAST_CONTEXT:
            raise CalibrationError(f"texts of {context} tokens are too short: {LEAST_CONTEXT} are needed")
        return context

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache for so many tokens, and some more, on each rank."""
        from vllm.config import ParallelConfig

        parallel = ParallelConfig(tensor_parallel_size=self.options.get("tensor_parallel_size", 1))
        quantized = str(self.options.get("kv_cache_dtype", "auto")).startswith("fp8")
        itemsize = 1 if quantized else self._config.dtype.itemsize
        heads = self._config.get_num_kv_heads(parallel)
        token_bytes = 2 * self.num_layers * heads * self._config.get_head_size() * itemsize
        return int(1.1 * tokens * token_bytes) + (1 << 25)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CalibrationError: it has none.
        """
        from vllm.tokenizers import cached_tokenizer_from_config

        if self._config.skip_tokenizer_init:
            raise CalibrationError(f"{self.name} is loaded without a tokenizer: give prompts of token ids")
        try:
            return cached_tokenizer_from_config(self._config)
        except Exception as error:
            raise CalibrationError(f"{self.name} has no tokenizer: {first_line(error)}") from error

    def chat_renderer(self) -> Chat | None:
        """From messages to token ids, by the model's chat template; None where it has none."""
        if self._config.skip_tokenizer_init:
            return None
        tokenizer = self.tokenizer()
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
    """vLLM with DELTA in Python: no graphs, no prefix caching, and but for answers one request at a time."""

    def __init__(
        self,
        model: Model,
        config: DeltaConfig,
        largest_budget: int,
        max_tokens: int,
        *,
        rows: int = 512,
        sequences: int = 1,
    ) -> None:
        """Start.

        Args:
            model: whose layers are asked about.
            config: the settings to calibrate for.
            largest_budget: that will be asked for, in tokens.
            max_tokens: of the longest sequence; less where the model cannot take as many, more where the
                model's options say so.
            rows: tokens that are computed at a time.
            sequences: that are answered at a time.

        Raises:
            CalibrationError: it did not start; vLLM's log says why.
        """
        from vllm import LLM

        settings = {
            "full_layers": model.num_layers,
            "page_size": config.page_size,
            "budget_tokens": largest_budget,
            "recent_tokens": config.recent_tokens,
            "sink_tokens": config.sink_tokens,
        }
        longest = min(max_tokens + 1, model.max_model_len)
        # What some models compute depends on it; -1 lets vLLM fit it to the cache.
        told = max(0, model.options.get("max_model_len") or 0)
        arguments: Json = {
            "attention_backend": "DELTA",
            "additional_config": {"delta": settings},
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": longest,
            "max_num_seqs": sequences,
            "max_num_batched_tokens": rows,
            "kv_cache_memory_bytes": model.cache_bytes(max(sequences * longest, told)),
            "disable_log_stats": True,
            **model.options,
        }
        try:
            self.llm: Any = LLM(model.name, **arguments)
        except Exception as error:
            raise CalibrationError(f"the engine did not start: {first_line(error)}") from error
        self.config = config
        self.eligible: list[int] = self._ask("layers")[0]

    def answer(self, prompts: Sequence[Json], output_tokens: int, scored_tokens: int) -> list[Text]:
        """Full attention's answers to prompts as vLLM takes them, sampled as the model's settings say."""
        self._use(tuple(self.eligible), self.config.budget_tokens)
        sampling = self.llm.get_default_sampling_params()
        sampling.max_tokens, sampling.detokenize = output_tokens, False
        answers = []
        for number, output in enumerate(self.llm.generate(list(prompts), sampling, use_tqdm=False), 1):
            prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            if len(answer) < 2:
                continue
            answers.append(answered(f"prompt {number}", prompt, answer, scored_tokens))
        return answers

    def keep(self, key: int, text: Text, observed_rows: int) -> Found:
        """Run a text under full attention, and keep it to be scored under other plans.

        Every layer selects meanwhile, which computes full attention. About `observed_rows` rows are observed.
        """
        settings = {"full_layers": 0, "selection_layers": self.eligible}
        self.use(settings | {"budget_tokens": self.config.budget_tokens})
        every = max(1, (len(text.tokens) - text.first_row) // max(1, observed_rows))
        likeliest = self._run(
            text.tokens,
            text.first_row,
            [position - 1 for position in text.positions],
            following=[text.tokens[position] for position in text.positions],
            keep=key,
            observe_every=every if observed_rows else 0,
        )
        return Found([0.0] * len(likeliest), likeliest)

    def hits(self) -> dict[int, float]:
        """By layer, how often its best head looks repeated tokens up; none where a probe is not possible.

        See `vllm_delta.plain.probe`.
        """
        hits: dict[int, float] = self._ask("hits")[0]
        return hits

    def observations(self) -> Observed:
        """What layers attended to along the texts that were kept."""
        seen = self._ask("observations")[0]
        return Observed(
            {(int(i), int(j)): mass for i, j, mass in seen["mass"]},
            {int(layer): distance for layer, distance in seen["distance"]},
        )

    def score(self, passes: Passes, budget_tokens: int, key: int) -> Found:
        """What a plan makes of a text that was kept under this number."""
        self._use(passes, budget_tokens)
        return self.score_in_use(key)

    def score_in_use(self, key: int) -> Found:
        """What the settings in use make of a text that was kept under this number."""
        return Found(*next((found for found in self._ask("score", key) if found[1]), ([], [], [])))

    def guesses(self, tokens: Sequence[int], first_row: int) -> list[int]:
        """The likeliest token at each place of a text from `first_row` on, and behind it, given all before.

        The tokens from `first_row` on are decode rows. Greedy decoding from there would write the text, and
        end it so, if and only if these are its tokens.
        """
        likeliest = self._run(tokens, first_row, range(first_row - 1, len(tokens)))
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

    def _run(self, tokens: Sequence[int], first_row: int, rows: Sequence[int], **how: Any) -> list[int]:
        from vllm import SamplingParams

        self._ask("begin", first_row, len(tokens), list(rows), **how)
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": list(tokens)}], sampling, use_tqdm=False)
        return next((likeliest for likeliest in self._ask("end") if likeliest), [])

    def _ask(self, action: str, *args: Any, **kwargs: Any) -> list[Any]:
        results: list[Any] = self.llm.collective_rpc("delta_calibration", args=(action, *args), kwargs=kwargs)
        return results

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()
