"""What every implementation of DELTA's three kinds of layers must do: cases, batches, and one check.

The check is an opinion of its own: it computes each row in float64 from masks, and shares no code with
vllm_delta. Implementations are the reference, the C++ kernels and the Triton kernels; each has a face of its
own in `implementations`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from dense_mask import choose_pages
from torch import Tensor

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import ALL_PAGES, DecodeRows, SelectionRule

NAN = float("nan")

#: Where rows are computed again: in float64, which GPUs are faster at.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Entries of block tables behind a row's blocks: they are stale in vLLM, and here outside of the cache.
STALE = 1 << 30


@dataclass(frozen=True)
class Case:
    """The shape and options of a batch; lengths in tokens, 0 for padding."""

    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    block_size: int = 16
    #: of all rows, or of each
    kept_pages: int | tuple[int, ...] = 4
    recent_pages: int = 1
    sink_pages: int = 1
    dtype: torch.dtype = torch.float16
    layout: str = "plain"
    softcap: float = 0.0
    sinks: bool = False
    fp8: bool = False
    #: query tokens of each row; empty: one each
    query_lens: tuple[int, ...] = ()
    #: pages behind a row's end that the selection table names, too
    following_pages: int = 0
    #: tokens of logits that a GPU's workspace holds
    logit_tokens: int = 1 << 16
    seed: int = 0

    @property
    def budgets(self) -> tuple[int, ...]:
        """Kept pages of each row."""
        whole = isinstance(self.kept_pages, int)
        return (self.kept_pages,) * len(self.lengths) if whole else self.kept_pages

    @property
    def most_pages(self) -> int:
        """Pages of a row in a selection table."""
        most = max([budget for budget in self.budgets if budget != ALL_PAGES], default=1)
        return most + self.following_pages

    def tokens_of(self, row: int) -> int:
        """Query tokens of a row."""
        return self.query_lens[row] if self.query_lens else 1

    def seen_tokens(self, row: int) -> int:
        """Tokens that a row's query tokens see, summed up."""
        count = self.tokens_of(row)
        return count * self.lengths[row] - count * (count - 1) // 2

    @property
    def real_rows(self) -> list[int]:
        """Rows that are not padding."""
        return [row for row, length in enumerate(self.lengths) if length]

    def with_rows(self, rows: list[int]) -> Case:
        """The same case with some of its rows."""
        return replace(
            self,
            lengths=tuple(self.lengths[row] for row in rows),
            kept_pages=tuple(self.budgets[row] for row in rows),
            query_lens=tuple(self.tokens_of(row) for row in rows) if self.query_lens else (),
        )


@dataclass
class Batch:
    """Everything that a layer reads, on the CPU, in a plain cache with blocks in random order.

    Blocks that are nobody's and tokens behind a sequence hold NaN. With `fp8`, query and cache are float8.
    """

    case: Case
    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    rows: DecodeRows
    parameters: AttentionParameters
    rule: SelectionRule

    @classmethod
    def random(cls, case: Case) -> Batch:
        """A batch of the case; the same for the same case."""
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        following = case.following_pages * case.page_size
        num_rows, width = len(case.lengths), -(-(max(case.lengths) + following) // case.block_size) + 1
        blocks = [-(-(length + following * (length > 0)) // case.block_size) for length in case.lengths]
        num_blocks = sum(blocks) + 1
        # A few strong keys, so that heads disagree and scores spread.
        cache = randn(num_blocks, case.num_kv_heads, case.block_size, 2 * case.head_size)
        strength = torch.rand(num_blocks, case.num_kv_heads, case.block_size, 1, generator=generator)
        cache[..., : case.head_size] *= 1 + 2 * strength
        free = torch.randperm(num_blocks, generator=generator).tolist()
        block_table = torch.full((num_rows, width), STALE, dtype=torch.int32)
        requests = torch.randperm(num_rows, generator=generator).int()
        for row, count in enumerate(blocks):
            own = [free.pop() for _ in range(count)]
            block_table[int(requests[row]), :count] = torch.tensor(own)
            for place, block in enumerate(own):  # and blocks that the row has not begun
                cache[block, :, max(0, case.lengths[row] - place * case.block_size) :] = NAN
        cache[free] = NAN
        storage = torch.float8_e4m3fn if case.fp8 else case.dtype
        scales = (torch.tensor(0.5), torch.tensor(0.25), torch.tensor(2.0)) if case.fp8 else None
        sinks = randn(case.num_heads).to(case.dtype) if case.sinks else None
        num_tokens = sum(map(case.tokens_of, range(num_rows))) + 2
        query = (2 * randn(num_tokens, case.num_heads, case.head_size)).to(storage)
        first_tokens = torch.randperm(num_rows + 2, generator=generator).int()
        if case.query_lens:  # the two tokens that are nobody's stand first and last
            order = first_tokens[first_tokens < num_rows].tolist()
            ends = dict(zip(order, accumulate(map(case.tokens_of, order)), strict=True))
            first_tokens = torch.tensor(
                [1 + ends[row] - case.tokens_of(row) for row in range(num_rows)], dtype=torch.int32
            )
        return cls(
            case,
            query=query,
            kv_cache=cache.to(storage),
            block_table=block_table,
            rows=DecodeRows(
                tokens=first_tokens[:num_rows],
                requests=requests,
                lengths=torch.tensor(case.lengths, dtype=torch.int32),
                kept_pages=torch.tensor(case.budgets, dtype=torch.int32),
                query_lens=torch.tensor(case.query_lens, dtype=torch.int32) if case.query_lens else None,
                max_query_len=max(case.query_lens, default=1),
            ),
            parameters=AttentionParameters(
                case.head_size**-0.5, case.softcap, sinks, case.layout, case.dtype, scales
            ),
            rule=SelectionRule(case.page_size, case.recent_pages, case.sink_pages, case.following_pages),
        )


@dataclass
class Results:
    """What an implementation gives for a batch, on the CPU.

    Outputs are ``[tokens, num_heads, head_size]``, NaN where nothing was written; counters are rows, attended
    and context tokens.
    """

    full: Tensor
    selection: Tensor
    sparse: Tensor
    #: kept pages of each row, ascending; None of a row that keeps everything, and of padding
    pages: list[Tensor | None]
    full_counters: list[int]
    selection_counters: list[int]
    sparse_counters: list[int]
    #: of each row, where the implementation reports them
    scores: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True)
class Precision:
    """How exact an implementation is."""

    #: error of an output that is allowed, relative to its largest element
    output: float
    #: multiple of the error of the same attention, computed in the model's own type, that is allowed beside
    eager: float
    #: whether one rounding of each element to the output's type is allowed beside
    rounds: bool
    #: relative error of a page's score, up to which pages may change places
    score: float


def keeps_all(case: Case, row: int) -> bool:
    """Whether a row attends to everything in sparse layers."""
    return -(-case.lengths[row] // case.page_size) <= case.budgets[row]


def check(batch: Batch, results: Results, precision: Precision) -> None:
    """Every row of all three layers; raises AssertionError with the row."""
    case, attended, written = batch.case, 0, []
    for row in case.real_rows:
        length, first = case.lengths[row], int(batch.rows.tokens[row])
        kept = torch.ones(length, dtype=torch.bool)
        if keeps_all(case, row):
            assert results.pages[row] is None, f"row {row} keeps everything"
        else:
            kept = torch.zeros(length, dtype=torch.bool)
            for page in results.pages[row][: case.budgets[row]].tolist():
                kept[page * case.page_size : (page + 1) * case.page_size] = True
        for index in range(case.tokens_of(row)):
            token = first + index
            written.append(token)
            seen = torch.arange(length) <= length - case.tokens_of(row) + index
            query, keys, values, sinks = row_tensors(batch, row, index)
            probabilities = masked_probabilities(case, query, keys, sinks, seen)
            exact = weighted_sum(probabilities, values)
            eager = precision.eager * eager_error(batch, row, index, exact) if precision.eager else 0.0
            for output in (results.full, results.selection):
                assert is_close(output[token], exact, precision, eager), f"row {row}, token {index}"
            if index == 0 and not keeps_all(case, row):
                check_pages(batch, row, probabilities, results.pages[row], precision.score)
            if index == 0 and results.scores and results.scores[row] is not None:
                expected = page_sums(probabilities, case.page_size).cpu()
                torch.testing.assert_close(
                    results.scores[row].double(), expected, rtol=precision.score, atol=1e-12
                )
            exact = weighted_sum(masked_probabilities(case, query, keys, sinks, kept & seen), values)
            assert is_close(results.sparse[token], exact, precision, eager), f"row {row}, token {index}"
            attended += int((kept & seen).sum())
    is_written = torch.zeros(len(batch.query), dtype=torch.bool)
    is_written[written] = True
    for output in (results.full, results.selection, results.sparse):
        assert bool(output[is_written].isfinite().all()), "not everything was written"
        assert bool(output[~is_written].isnan().all()), "padding was written"
    context = sum(case.seen_tokens(row) for row in case.real_rows)
    counters = [len(written), context, context]
    assert results.full_counters == results.selection_counters == counters
    assert results.sparse_counters == [len(written), attended, context]


def is_close(output: Tensor, exact: Tensor, precision: Precision, eager: float) -> bool:
    """Whether a row's output is as exact as it has to be; `eager` is an error that is allowed beside."""
    rounding = torch.finfo(output.dtype).eps / 2 if precision.rounds else 0.0
    allowed = eager + precision.output * exact.abs().max() + rounding * exact.abs()
    return bool(((output.to(exact.device).double() - exact).abs() <= allowed).all())


def check_pages(batch: Batch, row: int, probabilities: Tensor, pages: Tensor, tolerance: float) -> None:
    """The kept pages are the best ones, but for pages whose scores are as good as equal."""
    case = batch.case
    token_scores = probabilities.amax(0).cpu().numpy()
    kept, num_pages = case.budgets[row], -(-case.lengths[row] // case.page_size)
    behind = pages[kept:].tolist()
    assert behind == list(range(num_pages, num_pages + case.following_pages)), f"row {row}: {behind}"
    pages = pages[:kept]
    mask = choose_pages(token_scores, case.page_size, kept, case.recent_pages, case.sink_pages)
    expected = sorted({position // case.page_size for position in mask.nonzero()[0].tolist()})
    found = pages.tolist()
    assert found == sorted(set(found)) and len(found) == kept, f"row {row}"
    extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if extra or missing:
        scores = page_sums(probabilities, case.page_size)
        gap = scores[missing].max() - scores[extra].min()
        assert gap <= tolerance * scores[missing].max(), (
            f"row {row}: {extra} kept, not {missing}, {gap} worse"
        )


def row_tensors(batch: Batch, row: int, index: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A row's query of this index ``[H, D]``, keys and values ``[H, n, D]``, and sinks, in float64."""
    case, rows = batch.case, batch.rows
    request, length = int(rows.requests[row]), case.lengths[row]
    blocks = batch.block_table[request, : -(-length // case.block_size)].long()
    tokens = batch.kv_cache[blocks].to(DEVICE).double().transpose(0, 1).flatten(1, 2)[:, :length]
    keys, values = tokens.repeat_interleave(case.num_heads // case.num_kv_heads, 0).chunk(2, -1)
    query, sinks = batch.query[int(rows.tokens[row]) + index].to(DEVICE).double(), batch.parameters.sinks
    if batch.parameters.scales is not None:
        q_scale, k_scale, v_scale = (scale.to(DEVICE).double() for scale in batch.parameters.scales)
        query, keys, values = query * q_scale, keys * k_scale, values * v_scale
    return query, keys, values, None if sinks is None else sinks.to(DEVICE).double()


def masked_probabilities(
    case: Case, query: Tensor, keys: Tensor, sinks: Tensor | None, mask: Tensor
) -> Tensor:
    """The softmax over the tokens of the mask, ``[H, n]``."""
    logits = (keys @ query[:, :, None])[:, :, 0] * case.head_size**-0.5
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    weights = torch.exp(logits) * mask.to(logits.device)
    total = weights.sum(-1) + (0 if sinks is None else torch.exp(sinks))
    return weights / total[:, None]


def weighted_sum(probabilities: Tensor, values: Tensor) -> Tensor:
    """``[H, n]`` and ``[H, n, D]`` to ``[H, D]``."""
    return (probabilities[:, None] @ values)[:, 0]


def page_sums(probabilities: Tensor, page_size: int) -> Tensor:
    """The score of each page."""
    return torch.stack([part.sum() for part in probabilities.amax(0).split(page_size)])


def eager_error(batch: Batch, row: int, index: int, exact: Tensor) -> float:
    """Largest error of the same attention, computed in the model's own type by plain PyTorch."""
    case = batch.case
    query, keys, values, sinks = row_tensors(batch, row, index)
    seen = case.lengths[row] - case.tokens_of(row) + 1 + index
    keys, values = keys[:, :seen], values[:, :seen]
    query, keys, values = (part.to(case.dtype) for part in (query, keys, values))
    logits = (keys @ query[:, :, None])[:, :, 0] * case.head_size**-0.5
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None].to(logits)], -1)
    probabilities = torch.softmax(logits, -1)[:, : keys.shape[1]]
    return float((weighted_sum(probabilities, values).double() - exact).abs().max())
