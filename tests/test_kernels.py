"""The CPU kernels beside the contract: instruction sets, random shapes, equal bits in any batch, refusals."""

import dataclasses

import pytest
import torch
from contract import NAN, Batch, Case, check
from cpu_cache import pack, pack_amx, pack_by_vllm, pack_cache, vllm_packs
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS

from vllm_delta.kernels.cpu import ops
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method import reference
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import ALL_PAGES, DecodeRows, SelectionRule

ops.load_library()
CPP = IMPLEMENTATIONS["cpp"]
LENGTHS = (1, 15, 16, 17, 127, 512, 513, 700, 1500, 2100)


def check_case(case):
    batch = Batch.random(case)
    check(batch, CPP.run(batch), CPP.precision)


SHAPES = [
    # heads, kv heads, head size, page size, block size, layout, dtype
    (8, 2, 64, 16, 128, "vec", torch.float32),
    (8, 2, 64, 16, 128, "vec", torch.bfloat16),
    (8, 2, 64, 128, 128, "vec", torch.float16),
    (7, 1, 128, 64, 64, "vec", torch.bfloat16),
    (16, 1, 256, 16, 32, "vec", torch.float32),
    (6, 6, 80, 16, 16, "vec16", torch.float32),
    (8, 2, 64, 16, 128, "amx", torch.bfloat16),
    (12, 4, 128, 64, 64, "amx", torch.float16),
]  # fmt: skip
SHAPE_IDS = ["-".join(map(str, shape)).replace("torch.", "") for shape in SHAPES]


@pytest.fixture(params=[2, 1, 0], ids=["avx512", "avx2", "generic"])
def instruction_level(request):
    previous = torch.ops.vllm_delta.set_instruction_level(request.param)
    yield request.param
    torch.ops.vllm_delta.set_instruction_level(previous)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_every_instruction_set(shape, instruction_level):
    *sizes, layout, dtype = shape
    check_case(Case(LENGTHS, *sizes, kept_pages=6, recent_pages=2, dtype=dtype, layout=layout))


@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap, sinks, instruction_level):
    options = {"softcap": softcap, "sinks": sinks, "dtype": torch.float32, "layout": "vec", "block_size": 32}
    check_case(Case(LENGTHS, kept_pages=6, recent_pages=2, **options))


@pytest.mark.parametrize("seed", range(30))
def test_random_batches(seed):
    """Lengths up to 20k, a budget for each row, and every other dimension drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[torch.randint(len(options), (), generator=generator)]

    layout = pick(["vec", "vec", "amx"])
    dtype = torch.bfloat16 if layout == "amx" else pick([torch.float32, torch.bfloat16, torch.float16])
    num_kv_heads, num_queries = pick([1, 2, 4]), pick([1, 2, 3, 7])
    lengths = torch.randint(1, pick([600, 3000, 20000]), (pick([1, 2, 5]),), generator=generator).tolist()
    sinks = pick([0, 1])
    check_case(
        Case(
            tuple(lengths),
            num_kv_heads * num_queries,
            num_kv_heads,
            head_size=pick([32, 64, 96, 128]),
            page_size=pick([16, 32, 64, 128]),
            block_size=pick([128, 256]),
            kept_pages=tuple(pick([1 + sinks, 8, 32, ALL_PAGES]) for _ in lengths),
            recent_pages=1,
            sink_pages=sinks,
            dtype=dtype,
            layout=layout,
            seed=seed,
        )
    )


@pytest.mark.skipif(not vllm_packs("amx"), reason="vLLM's build for this processor lacks the layout")
def test_amx_layout_is_vllms():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 75, 2, 64).bfloat16()
    arguments = keys, values, torch.randperm(5 * 32)[:75], 5, 32, "amx"
    assert torch.equal(pack_amx(*arguments).nan_to_num(9), pack_by_vllm(*arguments).nan_to_num(9))


def test_equal_pages_tie_to_the_lower_index():
    """Pages with the same keys have the same score to the last bit, wherever they lie."""
    torch.manual_seed(3)
    keys = torch.randn(16, 2, 64).repeat(40, 1, 1)
    cache = pack(keys, torch.randn_like(keys), torch.arange(640), 5, 128, "vec")
    query, output = torch.randn(1, 8, 64), torch.empty(1, 8, 64)
    row = DecodeRows(*torch.tensor([[0], [0], [640], [10]], dtype=torch.int32))
    table = SelectionTable.allocate(1, 10)
    ops.selection_attention(
        query,
        cache,
        torch.arange(5, dtype=torch.int32)[None],
        row,
        AttentionParameters(0.125, layout="vec"),
        SelectionRule(16, 2, 1),
        ops.allocate_workspace(640, 8, 64),
        torch.zeros(3, dtype=torch.int64),
        output,
        table,
    )
    assert table.pages[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 38, 39]


class Calls:
    """The kernels' calls on a batch."""

    def __init__(self, case):
        self.batch = Batch.random(case)
        self.cache = pack_cache(self.batch)

    def arguments(self, rows, *, with_rule=True):
        batch, shape = self.batch, self.batch.query.shape
        inputs = batch.query, self.cache, batch.block_table, rows, batch.parameters
        workspace = ops.allocate_workspace(max(batch.case.lengths), *shape[1:]).fill_(NAN)
        counters, output = torch.zeros(3, dtype=torch.int64), torch.full_like(batch.query, NAN)
        return *inputs, *((batch.rule,) if with_rule else ()), workspace, counters, output

    def run(self, rows):
        """The outputs of a selection and a sparse layer, and the table."""
        table = SelectionTable.allocate(len(rows), self.batch.case.most_pages)
        selection, sparse = self.arguments(rows), self.arguments(rows)
        ops.selection_attention(*selection, table)
        ops.sparse_attention(*sparse, table)
        return selection[-1], sparse[-1], table


def some(rows, which):
    return rows[which]


def test_result_does_not_depend_on_batch_budgets_or_threads():
    """The same bits alone, in a batch of other budgets that takes several rounds, and with one thread."""
    lengths, budgets = (20000, 17, 30000, 3000, 513, 9000), (16, 4, 40, ALL_PAGES, 8, 3)
    sizes = {"num_heads": 8, "block_size": 128, "dtype": torch.bfloat16, "layout": "vec"}
    calls = Calls(Case(lengths, kept_pages=budgets, recent_pages=2, **sizes))
    rows = calls.batch.rows
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    whole, whole_sparse, whole_table = calls.run(rows)
    torch.set_num_threads(1)
    single, single_sparse, _ = calls.run(rows)
    torch.set_num_threads(threads)
    assert torch.equal(single.nan_to_num(9), whole.nan_to_num(9))
    assert torch.equal(single_sparse.nan_to_num(9), whole_sparse.nan_to_num(9))
    for row, budget in enumerate(budgets):
        alone, alone_sparse, table = calls.run(some(rows, [row]))
        token = int(rows.tokens[row])
        assert torch.equal(alone[token], whole[token])
        assert torch.equal(alone_sparse[token], whole_sparse[token])
        if budget != ALL_PAGES:
            assert torch.equal(table.pages[0, :budget], whole_table.pages[row, :budget])


@settings(deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0]), min_size=2, max_size=60),
    recent_pages=st.integers(0, 5),
    sink_pages=st.integers(0, 5),
    others=st.integers(0, 30),
)
def test_selection_table_properties(scores, recent_pages, sink_pages, others):
    """Few distinct scores, so that most comparisons are ties."""
    kept_pages, num_pages = max(1, recent_pages + sink_pages + others), len(scores)
    scores = torch.tensor(scores)
    if kept_pages >= num_pages:
        with pytest.raises(RuntimeError, match="fewer than scores"):
            ops.select_pages(scores, kept_pages, recent_pages, sink_pages)
        return
    pages = ops.select_pages(scores, kept_pages, recent_pages, sink_pages).tolist()
    assert pages == sorted(set(pages)) and len(pages) == kept_pages
    forced = {*range(sink_pages), *range(num_pages - recent_pages, num_pages)}
    assert forced <= set(pages)
    for kept in set(pages) - forced:
        for left_out in set(range(num_pages)) - set(pages):
            assert (scores[kept], -kept) > (scores[left_out], -left_out)
    assert pages == reference.select_pages(scores, kept_pages, recent_pages, sink_pages).tolist()


@pytest.fixture
def small():
    return Calls(Case((40, 200), head_size=32, block_size=128, dtype=torch.float32, layout="vec"))


def test_no_rows_is_no_work(small):
    arguments = small.arguments(some(small.batch.rows, []), with_rule=False)
    ops.full_attention(*arguments)
    assert arguments[-1].isnan().all()
    assert arguments[-2].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "requests", "lengths", "message"),
    [
        ([4], [0], [40], "token index out of range"),
        ([0], [-1], [40], "request index out of range"),
        ([0], [0], [0], "length 0 is not between 1 and 384"),
        ([0], [0], [385], "length 385 is not between 1 and 384"),
        ([0, 1], [0], [40], "must have the same length"),
    ],
)
def test_bad_rows_are_refused(small, tokens, requests, lengths, message):
    columns = (tokens, requests, lengths, [4] * len(tokens))
    rows = DecodeRows(*(torch.tensor(values, dtype=torch.int32) for values in columns))
    with pytest.raises(RuntimeError, match=message):
        ops.full_attention(*small.arguments(rows, with_rule=False))


@pytest.mark.parametrize("kept_pages", [-1, 0, 1, 5, 12])
def test_budgets_that_do_not_fit_are_refused(small, kept_pages):
    """The recent and the sink page have to fit in where pages are selected, and the table has to hold all."""
    rows = dataclasses.replace(small.batch.rows, kept_pages=torch.tensor([4, kept_pages]).int())
    row = int((small.batch.rows.lengths == 200).nonzero())
    for layer, least in ((ops.selection_attention, 2), (ops.sparse_attention, 1)):
        if kept_pages == least:
            continue
        message = f"row {row}: its budget of {kept_pages} pages is not between {least} and 4"
        table = SelectionTable.allocate(2, 4)
        table.pages[:] = torch.arange(4)
        with pytest.raises(RuntimeError, match=message):
            layer(*small.arguments(rows), table)


def test_stale_table_is_refused(small):
    """A table that was written for longer sequences would read blocks of somebody else."""
    table = SelectionTable.allocate(2, 4)
    table.pages[:, 1:] = 19
    with pytest.raises(RuntimeError, match="names a page outside of the sequence"):
        ops.sparse_attention(*small.arguments(small.batch.rows), table)


def test_wrong_page_size_is_refused(small):
    small.batch.rule = SelectionRule(24, 1, 1)
    with pytest.raises(RuntimeError, match="page_size must be 16, 32, 64 or 128"):
        ops.sparse_attention(*small.arguments(small.batch.rows), SelectionTable.allocate(2, 4))
