"""The Triton kernels beside the contract: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from contract import NAN, Batch, Case, Results, check
from gpu_batch import DEVICE, DTYPE, POISON, GPUBatch
from implementations import IMPLEMENTATIONS

from vllm_delta.kernels.gpu import ops, schedule, scores, workspace
from vllm_delta.kernels.gpu.device import SideStream
from vllm_delta.kernels.gpu.l2 import set_aside_l2
from vllm_delta.kernels.gpu.select import select_pages
from vllm_delta.kernels.gpu.shape import BAND_QUERIES, LayerShape
from vllm_delta.kernels.gpu.tuning import MIN_TILE, Tuning, choose_tuning, shared_bytes
from vllm_delta.kernels.gpu.workspace import SELECTION_WIDTH
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method import reference
from vllm_delta.method.rows import ALL_PAGES, DecodeRows, SelectionRule

pytestmark = pytest.mark.triton

TRITON = IMPLEMENTATIONS["triton"]


@contextmanager
def stand_in(multiprocessors: int):
    """A GPU of so many multiprocessors."""
    with ExitStack() as stack:
        for module in (ops, schedule, scores, workspace):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: multiprocessors))
        yield


def check_case(case: Case) -> None:
    batch = Batch.random(case)
    check(batch, TRITON.run(batch), TRITON.precision)


def test_tiles_fit_the_shared_memory() -> None:
    for key_bytes, units, shared_memory, sparse in itertools.product(
        (128, 256, 512, 1024), (1, 1000), (232448, 166912, 101376), (False, True)
    ):
        if key_bytes == 1024 and shared_memory == 101376:
            continue
        tuning = choose_tuning(key_bytes, units, shared_memory, 132, sparse=sparse)
        assert tuning.num_stages * tuning.tile * 2 * key_bytes < shared_memory
        assert tuning.tile >= MIN_TILE and tuning.num_stages >= 2
        if key_bytes * BAND_QUERIES > shared_memory // 4:
            continue
        tuning = choose_tuning(key_bytes, units, shared_memory, 132, sparse=sparse, queries=BAND_QUERIES)
        assert shared_bytes(tuning, key_bytes, BAND_QUERIES) <= shared_memory
        assert tuning.tile >= MIN_TILE and tuning.num_stages >= 2 and not tuning.whole
    with pytest.raises(ValueError, match="need more shared memory than 101376 bytes"):
        choose_tuning(1024, 1, 101376, 132, sparse=False)
    with pytest.raises(ValueError, match="no kernel for keys of 2048 bytes"):
        choose_tuning(2048, 1, 232448, 132, sparse=False)


def test_rows_are_whole_where_they_fill_the_gpu() -> None:
    def whole(key_bytes: int, shared_memory: int, *, sparse: bool = True) -> list[int]:
        return [
            units
            for units in range(1, 400)
            if choose_tuning(key_bytes, units, shared_memory, 132, sparse=sparse).whole
        ]

    assert whole(256, 232448) == [*range(106, 133), *range(159, 265)]
    assert not whole(256, 232448, sparse=False)
    assert not choose_tuning(256, 128, 232448, 132, sparse=True, quantized=True).whole
    for units, tile in ((4, 64), (16, 32), (40, 64)):
        assert choose_tuning(256, units, 232448, 132, sparse=True).tile == tile
        assert choose_tuning(256, units, 232448, 132, sparse=True, quantized=True).tile == 64
    for other in ((128, 232448), (512, 232448), (256, 101376)):
        assert not whole(*other), "not measured, or too little shared memory"


def test_full_layers_of_few_rows_are_run() -> None:
    def most(shape: LayerShape, itemsize: int = 2, *, hopper: bool = True) -> int:
        with stand_in(132), mock.patch.object(ops, "has_dependent_launch", lambda device: hopper):
            return ops.most_full_rows(shape, itemsize, torch.device(DEVICE))

    shape = LayerShape(28, 4, 128)
    assert most(shape) == 16
    assert most(LayerShape(12, 2, 128)) == 33
    assert most(dataclasses.replace(shape, quantized=True)) == 0
    for not_measured in (most(dataclasses.replace(shape, head_size=64)), most(shape, 4)):
        assert not_measured == 0
    assert most(shape, hopper=False) == 0


@pytest.mark.parametrize(
    ("shape", "query_len", "bands", "queries"),
    [
        (LayerShape(28, 4, 128), 1, 1, 64),
        (LayerShape(28, 4, 128), 8, 1, 64),
        (LayerShape(32, 8, 128), 8, 1, 64),
        (LayerShape(64, 8, 128), 16, 2, 64),
        (LayerShape(28, 4, 128), 17, 2, 64),
        (LayerShape(28, 4, 128), 19, 3, 64),
        (LayerShape(16, 2, 256), 5, 1, 64),
        (LayerShape(16, 16, 64), 16, 1, 64),
        (LayerShape(128, 1, 128), 1, 1, 128),
        (LayerShape(128, 1, 128), 3, 3, 128),
    ],
)
def test_query_tokens_are_cut_into_bands(shape: LayerShape, query_len: int, bands: int, queries: int) -> None:
    kernel_shape = shape.for_kernels(SelectionRule(16, 1, 0), 16, query_len)
    assert (shape.bands(query_len), kernel_shape.BAND_QUERIES) == (bands, queries)
    assert (bands - 1) * kernel_shape.BAND < query_len <= bands * kernel_shape.BAND
    assert shape.programs_per_split(query_len) == shape.num_kv_heads * bands


#: Rows whose last tile, page or split the first query tokens do not see, rows of as many tokens, and fewer.
SEVERAL = (
    Case((130, 257, 0, 8, 129), query_lens=(8, 3, 1, 8, 1), recent_pages=2),
    Case((140, 70), 8, 1, query_lens=(16, 4), recent_pages=2, kept_pages=5),  # two bands
    Case((300, 40), 6, 2, 32, 1, 16, kept_pages=20, recent_pages=5, query_lens=(5, 5), following_pages=2),
    Case((264, 129), 6, 2, 256, query_lens=(8, 7), recent_pages=2, sinks=True),
    Case((150, 133), fp8=True, softcap=5.0, query_lens=(3, 2), recent_pages=2, logit_tokens=0),
)


@pytest.mark.parametrize("multiprocessors", [2, 16])
@pytest.mark.parametrize("case", SEVERAL)
def test_several_query_tokens(case: Case, multiprocessors: int) -> None:
    """On a GPU of few multiprocessors, and of so many that rows are cut into splits of a tile or two."""
    with stand_in(multiprocessors):
        check_case(dataclasses.replace(case, dtype=DTYPE))


def test_query_tokens_are_read_from_memory() -> None:
    """What was compiled for a number of tokens holds for rows that have fewer, as in a graph."""
    case = Case((130, 200, 97), query_lens=(5, 5, 5), recent_pages=2, dtype=DTYPE)
    gpu = GPUBatch(Batch.random(case))
    for query_lens in ((1, 5, 3), (5, 2, 1)):
        batch = Batch.random(dataclasses.replace(case, query_lens=query_lens))
        part = GPUBatch(batch)
        part.rows = dataclasses.replace(part.rows, max_query_len=5)
        part.workspace, part.schedule = gpu.workspace, gpu.schedule
        part.make_schedule()
        results = [part.run(kind) for kind in ("full", "selection", "sparse")]
        outputs, counters = zip(*results, strict=True)
        check(batch, Results(*outputs, part.pages(), *(counts[:3] for counts in counters)), TRITON.precision)


@pytest.mark.parametrize("multiprocessors", [11, 6])
@pytest.mark.parametrize(
    "options",
    [
        {"kept_pages": (32, ALL_PAGES, 32, 32, 32)},
        {"sinks": True, "softcap": 5.0},
        {"page_size": 1, "kept_pages": 512},
        {"recent_pages": 0},
    ],
    ids=str,
)
def test_whole_rows(multiprocessors: int, options: dict) -> None:
    """Rows that fill a GPU of so many multiprocessors, but for those that are much longer than others."""
    case = Case((100, 700, 90, 0, 120), head_size=128, dtype=DTYPE, **{"kept_pages": 32, **options})
    with stand_in(multiprocessors):
        gpu = GPUBatch(Batch.random(case))
        assert schedule.tunings(gpu.shape, 2, len(case.lengths), torch.device(DEVICE))[1].whole
        gpu.make_schedule()
        check_case(case)
    splits = gpu.schedule.row_splits[1, :, 1].tolist()
    assert 1 in splits and max(splits) > 1, "rows of one split and of several"


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("lengths", [(500, 497, 40, 17), (129, 300, 0, 16)])
def test_the_last_page_may_be_left_out(lengths: tuple[int, ...], sinks: bool) -> None:
    """Without recent pages: what is kept ends in a whole page, or in the row's last one, which is partial."""
    options = {"page_size": 16, "recent_pages": 0, "sink_pages": 0, "sinks": sinks, "dtype": DTYPE}
    for kept_pages in (1, 3, 8):
        check_case(Case(lengths, kept_pages=kept_pages, seed=kept_pages, **options))


@pytest.mark.parametrize("multiprocessors", [8, 32])
@pytest.mark.parametrize("seed", range(3, 7))
def test_the_split_that_reads_the_rows_token_writes_it(multiprocessors: int, seed: int) -> None:
    """Without recent pages several splits may lie behind it, in what is left of a long page."""
    case = Case((1030,), 4, 2, 64, 128, 128, 8, recent_pages=0, sink_pages=0, dtype=DTYPE, seed=seed)
    with stand_in(multiprocessors):
        check_case(case)


class MainStream(SideStream):
    """Stands in for a side stream where there is no GPU."""

    def __init__(self) -> None:
        self.forks = 0

    @contextmanager
    def fork(self):
        self.forks += 1
        yield


@pytest.mark.parametrize("logit_tokens", [1 << 16, 600, 0])
def test_a_side_stream_chooses_the_same_pages(logit_tokens: int) -> None:
    side = MainStream() if DEVICE == "cpu" else SideStream(torch.device(DEVICE))
    batch = GPUBatch(Batch.random(Case((300, 40, 300, 0, 300), logit_tokens=logit_tokens, dtype=DTYPE)))
    batch.make_schedule()
    expected, _ = batch.run("selection")
    kept = batch.pages()
    batch.poison_table()
    output, _ = batch.run("selection", side=side)
    if isinstance(side, MainStream):
        assert side.forks == 1
    else:
        assert side.join() and not side.join()
    assert torch.equal(output.nan_to_num(9), expected.nan_to_num(9))
    for pages, others in zip(batch.pages(), kept, strict=True):
        assert pages is others is None or torch.equal(pages, others)


@pytest.mark.gpu
def test_part_of_the_l2_cache_is_set_aside() -> None:
    device = torch.device(DEVICE)
    part = torch.cuda.get_device_properties(device).L2_cache_size * 3 // 8
    is_hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    assert set_aside_l2(device) == (pytest.approx(part, rel=0.1) if is_hopper else 0)
    assert set_aside_l2(device, 0.0) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_tokens_without_a_slot_are_not_written(sparse: bool) -> None:
    """As in vLLM's dummy runs, whose block table may name blocks that are in use."""
    batch = GPUBatch(Batch.random(Case((200, 40, 97), dtype=DTYPE)))
    batch.make_schedule()
    batch.run("selection")
    keys, values, slots = batch.take_last_tokens()
    slots[batch.rows.tokens[1]] = -1
    before = batch.kv_cache.clone()
    inputs = dataclasses.replace(batch.inputs, appended=(keys, values, slots))
    output, counters = torch.empty_like(batch.query), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    arguments = inputs, batch.workspace, counters, output, batch.table
    if sparse:
        ops.sparse_attention(*arguments, same_blocks=True)
    else:
        ops.selection_attention(*arguments)
    written = (batch.kv_cache.float().nan_to_num(9) != before.float().nan_to_num(9)).flatten(1)
    assert int(written.any(dim=1).sum()) == 2  # blocks
    head_size = batch.case.head_size
    for row in (0, 2):
        token = int(batch.rows.tokens[row])
        block, place = divmod(int(slots[token]), batch.case.block_size)
        stored_keys, stored_values = batch.kv_cache[block, :, place].split(head_size, dim=-1)
        assert torch.equal(stored_keys, keys[token]) and torch.equal(stored_values, values[token])


@pytest.mark.parametrize("following", [0, 3, 200])
@pytest.mark.parametrize("num_pages", [5, 300, 2049, 5000, 9000])
def test_select_pages(num_pages: int, following: int) -> None:
    """Also rows of which too many pages are left when they are thinned out: of 9000 with ties, a third."""
    generator = torch.Generator().manual_seed(num_pages)
    rows, kept_pages = 5, [4, 3, 4, ALL_PAGES, 2]
    page_scores = torch.rand(rows, num_pages, generator=generator)
    page_scores[1] = torch.randint(3, (num_pages,), generator=generator) / 4  # ties, zeros among them
    page_scores[2] *= 1e-30
    lengths = torch.full((rows,), num_pages * 16 - 3, dtype=torch.int32)
    index = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    blocks = -(-(num_pages + following) // 2)
    block_table = torch.randperm(rows * blocks, generator=generator).int().view(rows, -1)
    width = 4 + following
    table = SelectionTable.allocate(rows, width, DEVICE, frames=True)
    table.pages.fill_(POISON)
    decode_rows = DecodeRows(index, index, lengths.to(DEVICE), torch.tensor(kept_pages).int().to(DEVICE))
    listed = torch.full((rows, SELECTION_WIDTH), POISON, dtype=torch.int32, device=DEVICE)
    rule = SelectionRule(page_size=16, recent_pages=1, sink_pages=1, following_pages=following)
    select_pages(page_scores.to(DEVICE), listed, decode_rows, block_table.to(DEVICE), 32, rule, table)
    for row, kept in enumerate(kept_pages):
        expected = reference.select_pages(page_scores[row], kept, 1, 1, following)
        if kept == ALL_PAGES:
            assert table.pages[row].tolist() == [POISON] * width
            continue
        assert table.pages[row].tolist() == [*expected.tolist(), *[POISON] * (4 - kept)]
        frames = block_table[row][expected // 2] * 2 + expected % 2
        assert table.frames[row, : kept + following].tolist() == frames.tolist()


def test_no_page_follows_where_the_block_table_ends() -> None:
    """A sequence of the greatest length does not grow: its block table is not read behind its end."""
    batch = GPUBatch(Batch.random(Case((100, 100), kept_pages=3, following_pages=2, dtype=DTYPE)))
    batch.block_table = batch.block_table[:, :8].contiguous()  # of 7 pages, and one more
    batch.make_schedule()
    batch.run("selection")
    assert (batch.table.pages[:, 3:] == torch.tensor([7, POISON], device=DEVICE)).all()
    table = SelectionTable.allocate(2, 2, DEVICE, frames=True)
    arguments = (
        batch.workspace,
        torch.zeros(5, dtype=torch.int64, device=DEVICE),
        torch.empty_like(batch.query),
    )
    with pytest.raises(ValueError, match="2 pages has no room for 2 following pages and kept ones"):
        ops.selection_attention(batch.inputs, *arguments, table)


def test_programs_fill_whole_waves() -> None:
    tuning = Tuning(tile=64, num_warps=4, num_stages=2, programs=3, waves=4)
    for rows, kv_heads, waves in ((1, 4, 1), (32, 4, 1), (64, 4, 2), (24, 8, 1), (32, 8, 2), (64, 8, 4)):
        wave = -(-3 * 132 // kv_heads)
        assert tuning.programs_per_head(rows, kv_heads, 132) == waves * wave
    for rows in range(1, 1025):
        programs = tuning.programs_per_head(rows, 8, 132)
        assert programs <= tuning.most_programs_per_head(8, 132)
        assert rows > 200 or programs // rows * rows > 0.6 * programs


@pytest.mark.parametrize("lengths", [(1,), (5000,), (0, 0, 7), (4000, *[1] * 40), tuple(range(0, 3000, 131))])
def test_schedule_covers_every_token_once(lengths: tuple[int, ...]) -> None:
    case = Case(lengths, num_heads=1, num_kv_heads=1, head_size=16, dtype=DTYPE)
    batch = GPUBatch(Batch.random(case))
    batch.make_schedule()
    kept = [length - max(0, -(-length // 16) - 4) * 16 for length in lengths]
    for sparse, tokens in enumerate((list(lengths), kept)):
        records = batch.schedule.splits[sparse].tolist()
        of_rows = batch.schedule.row_splits[sparse].tolist()
        covered = [0] * len(lengths)
        for index, (row, begin, end, *_) in enumerate(records):
            if row < 0:
                continue
            first, count = of_rows[row][:2]
            assert first <= index < first + count
            assert begin == covered[row] < end, "splits of a row follow one another and are not empty"
            covered[row] = end
        assert covered == tokens
    tuning, _ = schedule.tunings(batch.shape, 2, len(lengths), torch.device(DEVICE))
    programs = schedule.programs(len(lengths), 1, tuning, torch.device(DEVICE))
    used = [record for record in batch.schedule.splits[0].tolist() if record[0] >= 0]
    assert len(used) <= programs + sum(map(bool, lengths))
    if len(lengths) < programs:
        tiles = sum(-(-length // 128) for length in lengths)
        assert len(used) <= programs
        assert max(end - begin for _, begin, end, *_ in used) <= 128 * -(-tiles // (programs - len(lengths)))
    assert batch.full_counters[:3].tolist() == [
        2 * sum(map(bool, lengths)),
        2 * sum(lengths),
        2 * sum(lengths),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": SelectionRule(48, 1, 1)}, "blocks of 16 tokens cannot hold pages of 48"),
        ({"rule": SelectionRule(32, 1, 1)}, "blocks of 16 tokens cannot hold pages of 32"),
        ({"query": torch.zeros(5, 4, 32, dtype=DTYPE)}, "4 heads of 32 does not fit a cache of 2 KV heads"),
        ({"query": torch.zeros(5, 3, 64, dtype=DTYPE)}, "3 heads of 64 does not fit a cache of 2 KV heads"),
        ({"query": torch.zeros(5, 64, 4, dtype=DTYPE).mT}, "must be contiguous in a head"),
        ({"appended": (torch.zeros(5, 1, 64),) * 3}, "new keys and values must have 2 heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    batch = GPUBatch(Batch.random(Case((70, 40, 20), dtype=DTYPE)))
    inputs = dataclasses.replace(batch.inputs, **change)
    counters, output = torch.zeros(5, dtype=torch.int64, device=DEVICE), torch.empty_like(batch.query)
    with pytest.raises(ValueError, match=message):
        ops.full_attention(inputs, batch.workspace, counters, output)


def test_too_many_rows_are_refused() -> None:
    few, many = (GPUBatch(Batch.random(Case((70,) * count, dtype=DTYPE))) for count in (2, 3))
    counters, output = torch.zeros(5, dtype=torch.int64, device=DEVICE), torch.empty_like(many.query)
    with pytest.raises(ValueError, match="3 rows are more than the workspace's 2"):
        ops.full_attention(many.inputs, few.workspace, counters, output)
    with pytest.raises(ValueError, match="2 rows for 3"):
        ops.selection_attention(many.inputs, many.workspace, counters, output, few.table)


@pytest.mark.parametrize(
    ("most", "change", "message"),
    [
        (4, {}, "5 query tokens are more than the workspace's 4"),
        (5, {"appended": (torch.zeros(12, 2, 64),) * 3}, "of several query tokens must be in the cache"),
        (5, {"rule": SelectionRule(16, 1, 1)}, "1 recent pages of 16 may not hold 5 query tokens"),
        (5, {"rule": SelectionRule(1, 4, 1)}, "4 recent pages of 1 may not hold 5 query tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_several_query_tokens_is_refused(most: int, change: dict, message: str) -> None:
    batch = GPUBatch(Batch.random(Case((70, 40), query_lens=(5, 5), recent_pages=2, dtype=DTYPE)))
    batch.make_schedule()
    workspace = dataclasses.replace(batch.workspace, max_query_len=most)
    inputs = dataclasses.replace(batch.inputs, **change)
    counters, output = torch.zeros(5, dtype=torch.int64, device=DEVICE), torch.empty_like(batch.query)
    with pytest.raises(ValueError, match=message):
        ops.sparse_attention(inputs, workspace, counters, output, batch.table, same_blocks=True)


# KV heads, query heads of each, head size, page size, pages of a block, type
SHAPES = [
    (1, 1, 64, 16, 2, torch.float16),
    (2, 6, 128, 16, 1, torch.bfloat16),
    (4, 7, 128, 16, 1, torch.bfloat16),
    (8, 4, 128, 32, 4, torch.bfloat16),
    (1, 16, 128, 8, 2, torch.bfloat16),
    (2, 3, 64, 64, 1, torch.float16),
    (4, 1, 96, 16, 4, torch.bfloat16),
    (2, 5, 192, 128, 1, torch.bfloat16),
    (1, 8, 256, 16, 1, torch.float16),
    (3, 2, 128, 1, 16, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_random_batches(index: int) -> None:
    """1,000 batches in all, of 1 to 20k tokens, mixed and padded, with a budget for each row.

    In more than half of them rows have several query tokens, in some the table names pages behind the end.
    """
    kv_heads, queries, head_size, page_size, pages_per_block, dtype = SHAPES[index]
    generator = torch.Generator().manual_seed(index)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(100):
        exponents = torch.rand(pick(1, 2, 3, 5, 8, 16), generator=generator) * 4.301
        lengths = [0 if pick(0, 1, 1, 1, 1) == 0 else int(10**exponent) for exponent in exponents.tolist()]
        lengths[0] = max(lengths[0], 1)
        recent, sink = pick(0, 1, max(1, 128 // page_size)), pick(0, 1)
        most, query_lens = pick(1, 1, 1, 2, 5, 8, 16), ()
        if most > 1:
            recent = max(recent, -(-(most - 1) // page_size) + 1)
            query_lens = tuple(pick(1, most // 2, most, most) for _ in lengths)
            lengths = [length and length + most - 1 for length in lengths]
        budgets = [max(3 + recent, tokens // page_size) for tokens in (256, 1024, 2048)]
        case = Case(
            tuple(lengths),
            query_lens=query_lens,
            following_pages=pick(0, 0, 2),
            num_heads=kv_heads * queries,
            num_kv_heads=kv_heads,
            head_size=head_size,
            page_size=page_size,
            block_size=page_size * pages_per_block,
            kept_pages=tuple(pick(*budgets, ALL_PAGES) for _ in lengths),
            recent_pages=recent,
            sink_pages=sink,
            dtype=dtype,
            logit_tokens=pick(0, 1 << 13, 1 << 19, 1 << 19),
            seed=seed,
        )
        try:
            check_case(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


class Captured:
    """A graph of a full, a selection and a sparse layer, captured for one batch and replayed over others."""

    def __init__(self, first: Batch, side: SideStream | None = None) -> None:
        self.gpu = gpu = GPUBatch(first)
        self.capacity = first.kv_cache.shape[0]
        gpu.make_schedule()
        for kind in ("full", "selection"):
            gpu.run(kind)
        size = gpu.query.shape
        self.outputs = [torch.full(size, NAN, dtype=first.case.dtype, device=DEVICE) for _ in range(3)]
        self.counters = torch.zeros(3, 5, dtype=torch.int64, device=DEVICE)
        self.graph = torch.cuda.CUDAGraph()
        arguments = gpu.inputs, gpu.workspace
        launches = torch.zeros(1, device=DEVICE)
        with torch.cuda.graph(self.graph):
            gpu.make_schedule()
            ops.full_attention(*arguments, self.counters[0], self.outputs[0], just_scheduled=True)
            launches.add_(1)  # a launch between layers, as there is in a model
            ops.selection_attention(*arguments, self.counters[1], self.outputs[1], gpu.table, side=side)
            launches.add_(1)
            joined = side is not None and side.join()
            ops.sparse_attention(
                *arguments,
                self.counters[2],
                self.outputs[2],
                gpu.table,
                same_blocks=True,
                just_scheduled=joined,
            )

    def replay(self, batch: Batch) -> Results:
        """What the graph gives for another batch of as many rows, and blocks or fewer."""
        gpu = self.gpu
        gpu.case = batch.case
        blocks, width = batch.kv_cache.shape[0], batch.block_table.shape[1]
        gpu.kv_cache[:blocks].copy_(batch.kv_cache.to(DEVICE))
        gpu.block_table[:, :width].copy_(batch.block_table)
        tokens = len(batch.query)
        gpu.query[:tokens].copy_(batch.query)
        for part in dataclasses.fields(DecodeRows):
            own = getattr(gpu.rows, part.name)
            if isinstance(own, torch.Tensor):
                own.copy_(getattr(batch.rows, part.name))
        for output in self.outputs:
            output.fill_(NAN)
        self.counters.zero_()
        gpu.poison_table()
        self.graph.replay()
        counters = self.counters.tolist()
        return Results(
            *(output[:tokens].cpu() for output in self.outputs),
            gpu.pages(),
            *(counts[:3] for counts in counters),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("beside", [False, True])
def test_captured_graph_runs_with_other_batches(beside: bool) -> None:
    """A graph captured for one batch, replayed over others of as many rows."""
    side = SideStream(torch.device(DEVICE)) if beside else None
    case = Case((5000,) * 4, head_size=128, kept_pages=32, logit_tokens=1 << 14, dtype=DTYPE)
    captured = Captured(Batch.random(case), side)
    for seed, lengths in enumerate([(3000, 17, 4096, 900), (0, 4096, 1, 2100), (5000, 5000, 0, 0)]):
        batch = Batch.random(dataclasses.replace(case, lengths=lengths, seed=seed))
        check(batch, captured.replay(batch), TRITON.precision)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(14, 2), (8, 2), (16, 1)], ids=str)
def test_captured_graph_follows_query_tokens(heads: tuple[int, int]) -> None:
    """A graph captured for rows of 8 tokens, replayed over rows that have fewer."""
    options = {"head_size": 128, "kept_pages": 32, "recent_pages": 2, "following_pages": 1}
    case = Case((5000,) * 4, *heads, query_lens=(8,) * 4, logit_tokens=1 << 14, dtype=DTYPE, **options)
    captured = Captured(Batch.random(case))
    for seed, (lengths, query_lens) in enumerate(
        [
            ((3000, 17, 4096, 900), (8, 8, 8, 8)),
            ((0, 4096, 1, 2100), (1, 3, 1, 8)),
            ((4990, 4990, 0, 0), (5, 1, 8, 1)),
        ]
    ):
        batch = Batch.random(dataclasses.replace(case, lengths=lengths, query_lens=query_lens, seed=seed))
        check(batch, captured.replay(batch), TRITON.precision)


#: 32 budgets, everything among them
BUDGETS = tuple(ALL_PAGES if row == 5 else 3 + 4 * row for row in range(32))


@pytest.mark.gpu
@pytest.mark.parametrize("beside", [False, True])
def test_a_budget_for_each_row_of_a_replayed_graph(beside: bool) -> None:
    """32 rows with 32 budgets in one graph: each gets what it gets alone, and what its budget says."""
    side = SideStream(torch.device(DEVICE)) if beside else None
    lengths = tuple(600 + 97 * row for row in range(32))
    case = Case((4000,) * 32, head_size=128, num_heads=8, kept_pages=128, dtype=DTYPE)
    captured = Captured(Batch.random(case), side)
    for seed, budgets in enumerate((BUDGETS, BUDGETS[::-1])):
        batch = Batch.random(dataclasses.replace(case, lengths=lengths, kept_pages=budgets, seed=seed))
        results = captured.replay(batch)
        check(batch, results, TRITON.precision)
        for row in range(32):
            rows = dataclasses.replace(
                batch.rows, lengths=torch.where(torch.arange(32) == row, batch.rows.lengths, 0)
            )
            only = dataclasses.replace(
                case, lengths=tuple(rows.lengths.tolist()), kept_pages=budgets, seed=seed
            )
            alone = captured.replay(dataclasses.replace(batch, case=only, rows=rows))
            token = int(batch.rows.tokens[row])
            for together, by_itself in ((results.sparse, alone.sparse), (results.full, alone.full)):
                torch.testing.assert_close(together[token], by_itself[token], atol=0.01, rtol=0.01)
            if alone.pages[row] is not None:
                shared = set(results.pages[row].tolist()) & set(alone.pages[row].tolist())
                assert len(shared) >= len(alone.pages[row]) - 1, "but for one whose score is as good as equal"
