"""One worker's part of a calibration: decode steps along a given text, under any plan, all at once.

The tokens of a text from `first_row` on are decode rows, whoever wrote them: what a row computes does not
depend on how many rows a step has (`vllm_delta.method.step`). So the text is one request whose prompt is said
to end at `first_row`, and one run of the model gives the distribution of the next token after every row,
with the keys and values of earlier rows as DELTA itself computes them.

A text that is kept runs so once, under full attention. Its steps with rows are copied, and so are the keys
and values of all that comes before. Other plans replay these steps alone, over keys and values that nobody
computes again.

Distributions are compared by the divergence from full attention's, ``KL = sum_v p(v) log(p(v) / q(v))`` in
nats, with p of full attention, over its `LIKELIEST` tokens and all others as one. What layers attend to is
compared by mass: ``m[i, j]`` is the share of layer j's attention, the mean over its heads and over rows, on
the pages that layer i chooses; and by the distance ``d[j] = 1 - cos(a[i], a[j])`` of the attention (mean over
heads) of neighbouring layers i and j.
"""

from __future__ import annotations

import copy
import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_delta.integration import probe_at_start
from vllm_delta.integration.worker_state import WorkerState
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import make_plan
from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.plain.rivals.oracle import Oracle
from vllm_delta.plain.rows import Layer, RowIndex

#: log-probabilities that are computed at a time
PROBABILITIES_AT_A_TIME = 10_000_000
#: tokens of full attention's distributions that are distinguished
LIKELIEST = 1024

#: Tensors of vLLM's metadata that are made for each step and, on CPUs, hold addresses within themselves.
_WITH_ADDRESSES = ("scheduler_metadata",)


@dataclass(frozen=True)
class Distributions:
    """Full attention's log-probabilities of the likeliest tokens."""

    #: float32 ``[rows, tokens]``, descending
    log_probabilities: Tensor
    #: int64 ``[rows, tokens]``
    tokens: Tensor

    @classmethod
    def keep(cls, log_probabilities: Tensor) -> Distributions:
        """Of all log-probabilities, ``[rows, vocabulary]``."""
        return cls(*log_probabilities.topk(min(LIKELIEST, log_probabilities.shape[1])))

    def divergence(self, found: Tensor) -> Tensor:
        """From these to others, whole ones as in `keep`: ``[rows]``, nats."""
        others = found.gather(1, self.tokens)
        distinguished = (self.log_probabilities.exp() * (self.log_probabilities - others)).sum(-1)
        rest, other_rest = (
            (1 - part.exp().sum(-1)).clamp_min(1e-9) for part in (self.log_probabilities, others)
        )
        return (distinguished + rest * (rest / other_rest).log()).clamp_min(0)

    def slice(self, begin: int, end: int) -> Distributions:
        """Rows `begin` to `end`."""
        return Distributions(self.log_probabilities[begin:end], self.tokens[begin:end])

    @classmethod
    def join(cls, parts: Sequence[Distributions]) -> Distributions:
        """All rows of several."""
        columns = ([part.log_probabilities for part in parts], [part.tokens for part in parts])
        return cls(*map(torch.cat, columns))


@dataclass(frozen=True)
class Blocks:
    """Blocks of a layer's KV cache, and a copy of what was in them."""

    cache: Tensor
    numbers: Tensor
    contents: Tensor

    def put_back(self) -> None:
        """Into the cache."""
        self.cache.index_copy_(0, self.numbers, self.contents)


@dataclass(frozen=True)
class Step:
    """A step with decode rows of a text, as vLLM's model runner ran it, in tensors of its own."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: ForwardContext
    #: position of its first token
    first: int
    #: tokens
    count: int

    @classmethod
    def copied(cls, args: Any, kwargs: Any, first: int, count: int) -> Step:
        """The step that runs now."""
        memo: dict[int, Any] = {}
        context = copy.copy(get_forward_context())
        context.attn_metadata = _copied(context.attn_metadata, memo)
        context.slot_mapping = _copied(context.slot_mapping, memo)
        return cls(_copied(args, memo), _copied(kwargs, memo), context, first, count)

    def blocks_before(self, first_row: int) -> list[Blocks]:
        """Copies of the blocks that hold the tokens before this position, of all layers with a KV cache."""
        found = []
        for name, metadata in self.context.attn_metadata.items():
            cache = self.context.no_compile_layers[name].kv_cache
            if not isinstance(cache, Tensor):
                continue  # of Mamba's kind, whose state is not kept: a text that runs again then differs
            numbers = metadata.block_table[0, : -(-first_row // cache.shape[2])].long()
            found.append(Blocks(cache, numbers, cache[numbers]))
        return found

    def renewable(self) -> list[Any]:
        """The metadata of all groups with layers that may be sparse."""
        of_groups = {id(metadata): metadata for metadata in self.context.attn_metadata.values()}
        return [metadata for metadata in of_groups.values() if getattr(metadata, "plan", None) is not None]


@dataclass
class Kept:
    """A text that has run under full attention."""

    steps: list[Step]
    #: positions of the rows whose next token counts, ascending
    rows: list[int]
    #: the tokens behind these rows
    following: list[int]
    #: full attention's distributions behind them, where this rank sees them
    expected: Distributions | None
    #: of all layers, with the keys and values of what comes before the rows
    blocks: list[Blocks]


@dataclass
class Text:
    """The current request's text, and what is found along it."""

    #: position of the first decode row
    first_row: int
    #: tokens
    length: int
    #: positions of the tokens behind which distributions are looked at, ascending
    rows: list[int]
    #: the tokens behind these, where it is kept
    following: list[int]
    #: number under which it is kept; None: it is not
    keep: int | None
    #: observe every so many rows; 0 for none
    observe_every: int
    steps: list[Step] = field(default_factory=list)
    kept: list[Distributions] = field(default_factory=list)
    #: the likeliest next token, behind each of `rows`
    likeliest: list[int] = field(default_factory=list)


@dataclass
class Observations:
    """Sums over observed rows; see the head of this module."""

    rows: int = 0
    mass: dict[tuple[int, int], float] = field(default_factory=dict)
    distance: dict[int, float] = field(default_factory=dict)
    #: of the current step, by row: the tokens that layers chose so far, as masks; the last layer's attention
    chosen: dict[RowIndex, dict[int, Tensor]] = field(default_factory=dict)
    previous: dict[RowIndex, Tensor] = field(default_factory=dict)


class Calibration:
    """Changes the plan of a running worker, and measures what that does along given texts.

    One request at a time, without CUDA graphs, prefix caching and pipeline parallelism.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, state: WorkerState[Any], device: torch.device
    ) -> None:
        self._vllm_config, self._state, self._device = vllm_config, state, device
        self._start: DeltaConfig = state.config
        self._model = model
        self._compute_logits: Any = model.compute_logits
        self._rows_at_a_time = max(1, PROBABILITIES_AT_A_TIME // vllm_config.model_config.get_vocab_size())
        self._num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self._kept: dict[int, Kept] = {}
        #: the text whose keys and values lie in the KV cache
        self._present: int | None = None
        self._text: Text | None = None
        self._seen = Observations()
        model.register_forward_hook(self._after_forward, with_kwargs=True)
        state.prompt_lens = self._prompt_lens

    def call(self, action: str, *args: Any, **kwargs: Any) -> Any:
        """One of the methods below, by name.

        Raises:
            ValueError: a name that is none of theirs.
        """
        methods = (self.layers, self.use, self.hits, self.begin, self.end, self.score, self.observations)
        actions = {method.__name__: method for method in methods}
        if action not in actions:
            raise ValueError(f"action must be one of {', '.join(actions)}, not {action!r}")
        return actions[action](*args, **kwargs)

    def layers(self) -> list[int]:
        """Indices of the layers that a plan may make sparse, ascending."""
        return sorted(self._state.plan.roles)

    def hits(self) -> dict[int, float]:
        """What a probe finds; see `vllm_delta.integration.probe_at_start.found`."""
        return probe_at_start.found(self._vllm_config, self._model, self._device)

    def use(self, settings: Mapping[str, Any]) -> None:
        """Change the settings to those of the start, but for these.

        The budget is at most, the page size at least that of the start, and divides the KV block size.

        Raises:
            DeltaConfigError: as at a start.
        """
        known = dataclasses.asdict(self._start) | dict(settings)
        config = DeltaConfig.from_additional_config({"delta": known})
        self._state.use(config, make_plan(config, self.layers(), self._num_layers))

    def begin(
        self,
        first_row: int,
        length: int,
        rows: Sequence[int],
        following: Sequence[int] = (),
        keep: int | None = None,
        observe_every: int = 0,
    ) -> None:
        """Announce the next request's text.

        Args:
            first_row: position of the first decode row, 1 or more.
            length: tokens.
            rows: positions of the tokens behind which the next one counts, ascending.
            following: these next ones, where the text is kept.
            keep: number under which it is kept, to be scored under other plans.
            observe_every: observe every so many rows; 0 for none.
        """
        self._text = Text(first_row, length, list(rows), list(following), keep, observe_every)
        self._state.aside.observer = self._observe if observe_every else None

    def end(self) -> list[int]:
        """The likeliest tokens behind its rows.

        None on tensor parallel ranks that do not see distributions.
        """
        text, self._text = self._text, None
        self._state.aside.observer = None
        assert text is not None
        if text.keep is not None:
            expected = Distributions.join(text.kept) if text.kept else None
            blocks = text.steps[0].blocks_before(text.first_row)
            self._kept[text.keep] = Kept(text.steps, text.rows, text.following, expected, blocks)
        self._present = text.keep
        return text.likeliest

    @torch.inference_mode()
    def score(self, number: int) -> tuple[list[float], list[int], list[float]]:
        """What the settings in use make of a text that was kept, behind each of its rows.

        Returns:
            The divergences from full attention, the likeliest tokens, and the log-probabilities of the text's
            own, both in nats. All are empty on tensor parallel ranks that do not see distributions.
        """
        kept = self._kept[number]
        if self._present != number:
            for blocks in kept.blocks:
                blocks.put_back()
            self._present = number
        divergences: list[float] = []
        likeliest: list[int] = []
        log_probabilities: list[float] = []
        for step in kept.steps:
            self._state.step += 1
            for metadata in step.renewable():
                self._state.renew(metadata)
            context = copy.copy(step.context)  # whose counters of layers begin anew
            with override_forward_context(context):
                hidden = self._model.forward(*step.args, **step.kwargs)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                for part, found in self._distributions(hidden, step.first, step.count, kept.rows):
                    assert kept.expected is not None
                    likeliest += found.argmax(-1).tolist()
                    expected = kept.expected.slice(part.start, part.stop)
                    divergences += expected.divergence(found).tolist()
                    following = torch.tensor(kept.following[part], device=found.device)
                    log_probabilities += found.gather(1, following[:, None])[:, 0].tolist()
        return divergences, likeliest, log_probabilities

    def observations(self) -> dict[str, list[list[float]]]:
        """``"mass"`` as ``[i, j, m]``, ``"distance"`` as ``[j, d]``: means over the observed rows."""
        seen = self._seen
        rows = max(1, seen.rows)
        return {
            "mass": [[*pair, value / rows] for pair, value in seen.mass.items()],
            "distance": [[layer, value / rows] for layer, value in seen.distance.items()],
        }

    def _prompt_lens(self, common: CommonAttentionMetadata) -> Tensor:
        """Of a batch of one request, in place of what DELTA's worker knows."""
        first_row = 1 << 30 if self._text is None else self._text.first_row
        return torch.full((common.num_reqs,), first_row, dtype=torch.int64)

    @torch.inference_mode()
    def _after_forward(self, _model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        text = self._text
        if text is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        positions = positions[0] if positions.dim() == 2 else positions  # three equal ones, for texts
        first = int(positions[0])
        count = min(len(positions), text.length - first)
        for _, found in self._distributions(hidden, first, count, text.rows):
            text.likeliest += found.argmax(-1).tolist()
            if text.keep is not None:
                text.kept.append(Distributions.keep(found))
        if text.keep is not None and first + count > text.first_row:
            text.steps.append(Step.copied(args, kwargs, first, count))
        self._seen.chosen.clear()
        self._seen.previous.clear()

    def _distributions(
        self, hidden: Tensor, first: int, count: int, rows: Sequence[int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Log-probabilities behind those of `rows` that are among a step's tokens, some at a time.

        None on tensor parallel ranks that do not see them.
        """
        begin, end = bisect_left(rows, first), bisect_left(rows, first + count)
        for start in range(begin, end, self._rows_at_a_time):
            part = slice(start, min(start + self._rows_at_a_time, end))
            places = torch.tensor(rows[part], device=hidden.device) - first
            logits: Tensor | None = self._compute_logits(hidden[places])
            if logits is not None:
                yield part, logits.float().log_softmax(-1)

    def _observe(self, index: int, layer: Layer, rows: Sequence[RowIndex]) -> None:
        """What a layer that attends to everything attends to; called at every such layer, in their order."""
        text, config, seen = self._text, self._state.config, self._seen
        assert text is not None
        for row in rows:
            if row.kept_pages == ALL_PAGES or row.length % text.observe_every:
                continue
            these = layer.rows([row])
            attention = these.probabilities()[0].mean(0)
            chosen = seen.chosen.setdefault(row, {})
            seen.rows += not chosen
            for other, its_tokens in chosen.items():
                seen.mass[other, index] = seen.mass.get((other, index), 0) + float(
                    attention[its_tokens].sum()
                )
            fits = row.length <= config.budget_tokens
            chosen[index] = (these.visible if fits else Oracle(config).choose(these))[0, 0]
            if row in seen.previous:
                cosine = torch.cosine_similarity(seen.previous[row], attention, 0)
                seen.distance[index] = seen.distance.get(index, 0) + float(1 - cosine)
            seen.previous[row] = attention


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """The same with tensors of its own; what was one object stays one."""
    if id(value) in memo:
        return memo[id(value)]
    result = value
    if isinstance(value, Tensor):
        result = value.clone()
    elif isinstance(value, dict):
        result = {key: _copied(part, memo) for key, part in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        result = type(value)(*(_copied(part, memo) for part in value))
    elif isinstance(value, list | tuple):
        result = type(value)(_copied(part, memo) for part in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for part in dataclasses.fields(value):
            if hasattr(value, part.name) and part.name not in _WITH_ADDRESSES:
                object.__setattr__(result, part.name, _copied(getattr(value, part.name), memo))
    memo[id(value)] = result
    return result
