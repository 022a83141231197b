"""The Triton kernels against the reference: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from gpu_cases import DEVICE, Batch, Case, eager_error, expect, expect_sparse

from vllm_delta import reference
from vllm_delta.gpu import ops
from vllm_delta.gpu.l2 import set_aside_l2
from vllm_delta.gpu.tuning import MIN_TILE, Tuning, choose_tuning
from vllm_delta.integration import validation

MIXED = (1, 300, 0, 64, 65, 17, 129)

CASES = {
    "mixed lengths": Case(MIXED),
    "float16": Case(MIXED, dtype=torch.float16),
    "one row": Case((500,), budget_tokens=128),
    "one kv head per head": Case((130, 260), num_heads=3, num_kv_heads=3),
    "16 heads a kv head": Case((130, 260), num_heads=16, num_kv_heads=1),
    "7 heads a kv head": Case((130, 260), num_heads=14, num_kv_heads=2, head_size=128),
    "head size 96": Case((200, 77), head_size=96),
    "head size 192": Case((200, 77), head_size=192),
    "head size 256": Case((200, 77), head_size=256),
    "page 1": Case((200, 64, 65), page_size=1, recent_tokens=5, sink_tokens=3),
    "page 8": Case((200, 64, 65), page_size=8),
    "page 32 in 32": Case(
        (400, 129), page_size=32, block_size=32, budget_tokens=128, recent_tokens=32, sink_tokens=0
    ),
    "page 16 in 64": Case((400, 129), block_size=64),
    "page 128": Case(
        (900, 129), page_size=128, block_size=128, budget_tokens=512, recent_tokens=128, sink_tokens=128
    ),
    "recent only": Case((400,), recent_tokens=64, sink_tokens=0),
    "budget of forced pages": Case((400,), recent_tokens=32, sink_tokens=32),
    "soft cap": Case((200, 90), softcap=5.0),
    "sinks": Case((200, 90), sinks=True),
    "fp8 cache": Case((200, 90), fp8=True),
    "a prompt's last token": Case((200, 150), dense_rows=(1,)),
    "no room for logits": Case(MIXED, logit_tokens=0),
    "room for some logits": Case((300, 300, 300), logit_tokens=600),
    "no room, fp8, soft cap": Case((200, 90), fp8=True, softcap=5.0, logit_tokens=0),
}


def check_batch(batch: Batch) -> None:
    """A selection and a sparse layer, every row; raises AssertionError with the row."""
    case = batch.case
    batch.make_schedule()
    whole_cache = batch.kv_cache.clone()
    logits = batch.workspace.logits.clone()
    alone, alone_counts = batch.run(full=True, append=not case.fp8)
    assert torch.equal(batch.workspace.logits, logits), "a full layer stored logits"
    full, full_counts = batch.run(append=not case.fp8)
    assert case.fp8 or torch.equal(batch.kv_cache, whole_cache)
    assert torch.equal(alone.nan_to_num(9), full.nan_to_num(9)) and torch.equal(alone_counts, full_counts)
    sparse, sparse_counts = batch.run(sparse=True)
    from_pages, _ = batch.run(sparse=True, same_blocks=False, append=not case.fp8)
    assert case.fp8 or torch.equal(batch.kv_cache, whole_cache)
    assert torch.equal(sparse.nan_to_num(9), from_pages.nan_to_num(9))
    assert not bool(batch.workspace.arrived.any())
    attended = 0
    for row, length in enumerate(case.lengths):
        if length == 0:
            continue
        token = int(batch.rows.tokens[row])
        exact = expect(batch, row)
        tolerance = 2 * eager_error(batch, row, exact.full) + 2e-3 * exact.full.abs().max().item()
        assert (full[token].double() - exact.full).abs().max() <= tolerance, f"row {row}"
        pages = batch.kept(row)
        attended += int((reference.kept_tokens(pages, case.page_size, length) >= 0).sum())
        if row not in case.dense_rows:
            check_selection(pages, exact.scores.cpu(), exact.pages.cpu(), row)
        expected = expect_sparse(batch, row, pages)
        assert (sparse[token].double() - expected).abs().max() <= tolerance, f"row {row}"
    written = torch.zeros(len(full), dtype=torch.bool)
    written[[int(batch.rows.tokens[row]) for row, length in enumerate(case.lengths) if length]] = True
    for output in (full, sparse):
        assert bool(output[written].isfinite().all()), "not everything was written"
        assert bool(output[~written].isnan().all()), "padding was written"
    real = [length for length in case.lengths if length]
    assert full_counts[:3].tolist() == [len(real), sum(real), sum(real)]
    assert sparse_counts[:3].tolist() == [len(real), attended, sum(real)]
    budget_pages = batch.selection.budget_pages
    within = [-(-length // case.page_size) <= budget_pages for length in case.lengths]
    short = [
        row for row, fits in enumerate(within) if fits and case.lengths[row] and row not in case.dense_rows
    ]
    assert sparse_counts[3:].tolist() == [len(case.dense_rows), len(short)]


def check_selection(pages: torch.Tensor, scores: torch.Tensor, expected: torch.Tensor, row: int) -> None:
    """The same pages, but for those whose scores differ by less than the logits are rounded."""
    assert bool((pages.diff() > 0).all()), f"row {row}: pages are not ascending"
    if torch.equal(pages, expected):
        return
    assert len(pages) == len(expected), f"row {row}"
    chosen, missed = set(pages.tolist()), set(expected.tolist())
    extra, missing = sorted(chosen - missed), sorted(missed - chosen)
    gap = scores[missing].max() - scores[extra].min()
    # Either score may be off by 0.035%, where all of a page's tokens are 2^-7 of their tile's largest.
    assert gap <= 7e-4 * scores[missing].max(), f"row {row}: {extra} kept in place of {missing}, {gap} worse"


def test_page_sizes_are_those_that_settings_may_name() -> None:
    assert validation.GPU_PAGE_SIZES == ops.PAGE_SIZES


def test_tiles_fit_the_shared_memory() -> None:
    for key_bytes, units, shared_memory, sparse in itertools.product(
        (128, 256, 512, 1024), (1, 1000), (232448, 166912, 101376), (False, True)
    ):
        if key_bytes == 1024 and shared_memory == 101376:
            continue
        tuning = choose_tuning(key_bytes, units, shared_memory, 132, sparse=sparse)
        assert tuning.num_stages * tuning.tile * 2 * key_bytes < shared_memory
        assert tuning.tile >= MIN_TILE and tuning.num_stages >= 2
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
    def most(shape: ops.LayerShape, itemsize: int = 2, *, hopper: bool = True) -> int:
        with (
            mock.patch.object(ops, "_has_dependent_launch", lambda device: hopper),
            mock.patch.object(ops, "_multiprocessors", lambda device: 132),
        ):
            return ops.most_full_rows(shape, itemsize, torch.device(DEVICE))

    shape = ops.LayerShape(28, 4, 128)
    assert most(shape) == 16
    assert most(ops.LayerShape(12, 2, 128)) == 33
    assert most(dataclasses.replace(shape, quantized=True)) == 0
    for not_measured in (most(dataclasses.replace(shape, head_size=64)), most(shape, 4)):
        assert not_measured == 0
    assert most(shape, hopper=False) == 0


@pytest.mark.parametrize("name", CASES)
def test_layers_equal_reference(name: str) -> None:
    check_batch(Batch(CASES[name]))


@pytest.mark.parametrize("multiprocessors", [11, 6])
@pytest.mark.parametrize(
    "options", [{"dense_rows": (1,)}, {"sinks": True, "softcap": 5.0}, {"page_size": 1}], ids=str
)
def test_whole_rows(multiprocessors: int, options: dict) -> None:
    """Rows that fill a GPU of so many multiprocessors, but for those that are much longer than others."""
    lengths = (100, 700, 90, 0, 120)
    case = Case(lengths, head_size=128, budget_tokens=512, **options)
    with mock.patch.object(ops, "_multiprocessors", lambda device: multiprocessors):
        batch = Batch(case)
        assert ops._tunings(batch.shape, 2, len(lengths), torch.device(DEVICE))[1].whole
        check_batch(batch)
    pieces = batch.schedule.row_pieces[1, :, 1].tolist()
    assert 1 in pieces and max(pieces) > 1, "rows of one piece and of several"


class MainStream(ops.SideStream):
    """Stands in for a side stream where there is no GPU."""

    def __init__(self) -> None:
        self.forks = 0

    @contextmanager
    def fork(self):
        self.forks += 1
        yield


@pytest.mark.parametrize("logit_tokens", [1 << 16, 600, 0])
def test_a_side_stream_chooses_the_same_pages(logit_tokens: int) -> None:
    side = MainStream() if DEVICE == "cpu" else ops.SideStream(torch.device(DEVICE))
    batch = Batch(Case((300, 40, 300, 0, 300), logit_tokens=logit_tokens))
    batch.make_schedule()
    expected, _ = batch.run()
    kept = [batch.kept(row) for row in range(5)]
    batch.table.pages.fill_(1 << 30)
    output, _ = batch.run(side=side)
    if isinstance(side, MainStream):
        assert side.forks == 1
    else:
        assert side.join() and not side.join()
    assert torch.equal(output.nan_to_num(9), expected.nan_to_num(9))
    assert all(torch.equal(batch.kept(row), pages) for row, pages in enumerate(kept))


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
    batch = Batch(Case((200, 40, 97)))
    batch.make_schedule()
    batch.run()
    keys, values, slots = batch.take_last_tokens()
    slots[batch.rows.tokens[1]] = -1
    before = batch.kv_cache.clone()
    inputs = dataclasses.replace(batch.inputs, appended=(keys, values, slots))
    output, counters = torch.empty_like(batch.query), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    arguments = inputs, batch.workspace, batch.selection, counters, output, batch.table
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


@pytest.mark.parametrize("num_pages", [4, 5, 300, 2049, 5000, 9000])
def test_select_pages(num_pages: int) -> None:
    """Also rows of which too many pages are left when they are thinned out: of 9000 with ties, a third."""
    generator = torch.Generator().manual_seed(num_pages)
    rows = 3
    scores = torch.rand(rows, num_pages, generator=generator)
    scores[1] = torch.randint(3, (num_pages,), generator=generator) / 4  # ties, zeros among them
    scores[2] *= 1e-30
    selection = ops.Selection(page_size=16, budget_tokens=64, recent_tokens=16, sink_tokens=16)
    lengths = torch.full((rows,), num_pages * 16 - 3, dtype=torch.int32)
    index = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    blocks = -(-num_pages // 2)
    block_table = torch.randperm(rows * blocks, generator=generator).int().view(rows, -1)
    table = ops.SelectionTable.allocate(rows, 4, DEVICE)
    decode_rows = ops.DecodeRows(index, index, lengths.to(DEVICE), torch.zeros_like(index))
    listed = torch.full((rows, ops.SELECT_CHUNK), 1 << 30, dtype=torch.int32, device=DEVICE)
    ops.select_pages(scores.to(DEVICE), listed, decode_rows, block_table.to(DEVICE), 32, selection, table)
    for row in range(rows):
        expected = reference.select_pages(scores[row], 4, 1, 1)
        assert table.pages[row].tolist() == expected.tolist()
        assert table.frames[row].tolist() == (block_table[row][expected // 2] * 2 + expected % 2).tolist()


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
    batch = Batch(Case(lengths, num_heads=1, num_kv_heads=1, head_size=16))
    batch.make_schedule()
    kept = [_kept_length(length, batch.selection) for length in lengths]
    for sparse, tokens in enumerate((list(lengths), kept)):
        pieces = batch.schedule.pieces[sparse].tolist()
        row_pieces = batch.schedule.row_pieces[sparse].tolist()
        covered = [0] * len(lengths)
        for index, (row, begin, end, *_) in enumerate(pieces):
            if row < 0:
                continue
            first, count = row_pieces[row][:2]
            assert first <= index < first + count
            assert begin == covered[row] < end, "pieces of a row follow one another and are not empty"
            covered[row] = end
        assert covered == tokens
    tuning, _ = ops._tunings(batch.shape, 2, len(lengths), torch.device(DEVICE))
    programs = ops._programs(len(lengths), 1, tuning, torch.device(DEVICE))
    used = [piece for piece in batch.schedule.pieces[0].tolist() if piece[0] >= 0]
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


def _kept_length(length: int, selection: ops.Selection) -> int:
    pages = -(-length // selection.page_size)
    return length - max(0, pages - selection.budget_pages) * selection.page_size


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
    """1,000 batches in all, of 1 to 20k tokens, mixed and padded."""
    kv_heads, group, head_size, page_size, pages_per_block, dtype = SHAPES[index]
    generator = torch.Generator().manual_seed(index)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(100):
        exponents = torch.rand(pick(1, 2, 3, 5, 8, 16), generator=generator) * 4.301
        lengths = [0 if pick(0, 1, 1, 1, 1) == 0 else int(10**exponent) for exponent in exponents.tolist()]
        lengths[0] = max(lengths[0], 1)
        recent = max(page_size, pick(32, 128))
        case = Case(
            tuple(lengths),
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            head_size=head_size,
            page_size=page_size,
            block_size=page_size * pages_per_block,
            budget_tokens=max(3 * page_size, pick(256, 1024, 2048)),
            recent_tokens=recent,
            sink_tokens=pick(0, page_size),
            dtype=dtype,
            dense_rows=(0,) if pick(0, 0, 0, 1) else (),
            logit_tokens=pick(0, 1 << 13, 1 << 19, 1 << 19),
            seed=seed,
        )
        try:
            check_batch(Batch(case))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.gpu
@pytest.mark.parametrize("beside", [False, True])
def test_captured_graph_serves_other_batches(beside: bool) -> None:
    """A graph captured for one batch, replayed over others of the same size, equals eager runs."""
    side = ops.SideStream(torch.device(DEVICE)) if beside else None
    lengths = [(3000, 17, 4096, 900), (0, 4096, 1, 2100), (5000, 5000, 0, 0)]
    first = Batch(Case(tuple([5000] * 4), head_size=128, budget_tokens=512, logit_tokens=1 << 14))
    first.make_schedule()
    first.run()
    output = torch.full_like(first.query, float("nan"))
    counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    arguments = first.inputs, first.workspace, first.selection, counters
    sparse_output = output.clone()
    full_output = output.clone()
    with torch.cuda.graph(graph):
        ops.full_attention(*arguments, full_output)
        counters.add_(1)  # a launch between layers, as there is in a model
        ops.selection_attention(*arguments, output, first.table, side=side)
        counters.add_(1)
        joined = side is not None and side.join()
        ops.sparse_attention(*arguments, sparse_output, first.table, same_blocks=True, just_scheduled=joined)
    for seed, other in enumerate(lengths):
        case = dataclasses.replace(first.case, lengths=other, seed=seed)
        batch = Batch(dataclasses.replace(case, lengths=(*other[:3], 5000)))  # the same sizes of buffers
        batch.case = case
        for name in ("query", "kv_cache", "block_table"):
            getattr(first, name).copy_(getattr(batch, name))
        for name in ("tokens", "requests", "dense"):
            getattr(first.rows, name).copy_(getattr(batch.rows, name))
        new = torch.tensor(other, dtype=torch.int32, device=DEVICE)
        first.rows.lengths.copy_(new)
        batch.rows.lengths.copy_(new)
        first.make_schedule()
        batch.make_schedule()
        for result in (full_output, output, sparse_output):
            result.fill_(float("nan"))
        first.table.pages.fill_(1 << 30)
        first.table.frames.fill_(1 << 30)
        graph.replay()
        full, _ = batch.run()
        sparse, _ = batch.run(sparse=True)
        for result in (full_output, output):
            assert torch.equal(result.nan_to_num(9), full.nan_to_num(9))
        assert torch.equal(sparse_output.nan_to_num(9), sparse.nan_to_num(9))
        assert bool(output.isfinite().any())
