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
#: Rows of several query tokens, some of whose first tokens do not see the last split, vector or page.
MULTI_LENGTHS, MULTI_QUERY_LENS = (16, 17, 127, 512, 513, 520, 1500, 2100), (16, 3, 8, 8, 2, 9, 16, 5)


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


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_several_query_tokens_on_every_instruction_set(shape, instruction_level):
    *sizes, layout, dtype = shape
    options = {"kept_pages": 6, "recent_pages": 2, "following_pages": 3, "dtype": dtype, "layout": layout}
    check_case(Case(MULTI_LENGTHS, *sizes, query_lens=MULTI_QUERY_LENS, **options))


@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap, sinks, instruction_level):
    options = {"softcap": softcap, "sinks": sinks, "dtype": torch.float32, "layout": "vec", "block_size": 32}
    check_case(Case(LENGTHS, kept_pages=6, recent_pages=2, **options))


@pytest.mark.parametrize("most_tokens", [1, 16])
@pytest.mark.parametrize("seed", range(30))
def test_random_batches(seed, most_tokens):
    """Lengths up to 20k, a budget and query tokens for each row, and every other dimension at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[torch.randint(len(options), (), generator=generator)]

    layout = pick(["vec", "vec", "amx"])
    dtype = torch.bfloat16 if layout == "amx" else pick([torch.float32, torch.bfloat16, torch.float16])
    num_kv_heads, num_queries = pick([1, 2, 4]), pick([1, 2, 3, 7])
    lengths = torch.randint(1, pick([600, 3000, 20000]), (pick([1, 2, 5]),), generator=generator).tolist()
    sinks, recent = pick([0, 1]), 1 if most_tokens == 1 else 2
    query_lens = [min(length, pick([1, 2, 5, 8, 16])) for length in lengths] if most_tokens > 1 else []
    check_case(
        Case(
            tuple(lengths),
            num_kv_heads * num_queries,
            num_kv_heads,
            head_size=pick([32, 64, 96, 128]),
            page_size=pick([16, 32, 64, 128]),
            block_size=pick([128, 256]),
            kept_pages=tuple(pick([recent + sinks, 8, 32, ALL_PAGES]) for _ in lengths),
            recent_pages=recent,
            sink_pages=sinks,
            query_lens=tuple(query_lens),
            following_pages=pick([0, 1, 5]) if query_lens else 0,
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
        sizes = max(batch.case.lengths), *shape[1:]
        workspace = ops.allocate_workspace(*sizes, max_query_len=rows.max_query_len).fill_(NAN)
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


def tokens_of(batch, row):
    """A row's query tokens, as a slice of the query and the output."""
    first = int(batch.rows.tokens[row])
    return slice(first, first + batch.case.tokens_of(row))


@pytest.mark.parametrize("query_lens", [(), (8, 2, 5, 3, 1, 16)], ids=["single", "several"])
def test_result_does_not_depend_on_batch_budgets_or_threads(query_lens):
    """The same bits alone, in a batch of other budgets that takes several rounds, and with one thread."""
    lengths, budgets = (20000, 17, 30000, 3000, 513, 9000), (16, 4, 40, ALL_PAGES, 8, 3)
    sizes = {"num_heads": 8, "block_size": 128, "dtype": torch.bfloat16, "layout": "vec"}
    calls = Calls(Case(lengths, kept_pages=budgets, recent_pages=2, query_lens=query_lens, **sizes))
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
        tokens = tokens_of(calls.batch, row)
        assert torch.equal(alone[tokens], whole[tokens])
        assert torch.equal(alone_sparse[tokens], whole_sparse[tokens])
        if budget != ALL_PAGES:
            assert torch.equal(table.pages[0, :budget], whole_table.pages[row, :budget])


def test_many_threads_among_many_short_rows():
    """Rows that are computed at the same time keep what they have not yet combined apart."""
    lengths, query_lens = tuple(range(530, 1030, 10)), (16, 1, 7, 2, 12) * 10
    sizes = {"num_heads": 8, "block_size": 128, "dtype": torch.bfloat16, "layout": "vec"}
    calls = Calls(Case(lengths, kept_pages=40, recent_pages=2, query_lens=query_lens, **sizes))
    results, threads = [], torch.get_num_threads()
    for count in (1, 8, 8, 8):
        torch.set_num_threads(count)
        selection, sparse, table = calls.run(calls.batch.rows)
        results.append((selection.nan_to_num(9), sparse.nan_to_num(9), table.pages))
    torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(part, expected) for part, expected in zip(found, results[0], strict=True))


def token_by_token(rows):
    """The same query tokens as rows of their own, and the row that each is of."""
    counts = rows.query_lens.tolist()
    parts = [(row, index) for row, count in enumerate(counts) for index in range(count)]
    which = torch.tensor([row for row, _ in parts])
    index = torch.tensor([index for _, index in parts], dtype=torch.int32)
    lengths = rows.lengths[which] - rows.query_lens[which] + 1 + index
    single = DecodeRows(rows.tokens[which] + index, rows.requests[which], lengths, rows.kept_pages[which])
    return single, which


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_result_does_not_depend_on_neighbours_in_a_row(shape, instruction_level):
    """The same bits where each query token is a row of its own: outputs, scores, and counters."""
    *sizes, layout, dtype = shape
    options = {"kept_pages": 6, "recent_pages": 2, "dtype": dtype, "layout": layout}
    calls = Calls(Case(MULTI_LENGTHS, *sizes, query_lens=MULTI_QUERY_LENS, **options))
    rows, page_size = calls.batch.rows, calls.batch.rule.page_size
    single, row_of = token_by_token(rows)

    def run(layer, rows, *more):
        arguments = calls.arguments(rows)
        layer(*arguments, *more)
        return arguments[-1].nan_to_num(9), arguments[-2].tolist()

    num_pages = -(-max(MULTI_LENGTHS) // page_size)
    tables = [SelectionTable.allocate(len(part), 6) for part in (rows, single)]
    scores = [torch.zeros(len(part), num_pages) for part in (rows, single)]
    layer = ops.selection_attention
    several, own = (run(layer, *args) for args in zip((rows, single), tables, scores, strict=True))
    assert torch.equal(several[0], own[0]) and several[1] == own[1]
    firsts = rows.query_lens.cumsum(0) - rows.query_lens
    assert torch.equal(scores[0], scores[1][firsts])

    # The table of a row, cut to the pages that the token sees; where it would see everything as a row of its
    # own it sees no page that was left out.
    table = SelectionTable(tables[0].pages[row_of])
    kept = (table.pages * page_size < single.lengths[:, None]).sum(1).int()
    fits = rows.lengths[row_of] <= 6 * page_size
    single = dataclasses.replace(single, kept_pages=torch.where(fits, ALL_PAGES, kept))
    several, own = run(ops.sparse_attention, rows, tables[0]), run(ops.sparse_attention, single, table)
    assert torch.equal(several[0], own[0]) and several[1] == own[1]


def test_tokens_do_not_see_what_follows(instruction_level):
    """Not even if it is infinite or no number at all, in a vector that the row's last token sees."""
    options = {"query_lens": (6, 6), "recent_pages": 2, "block_size": 32, "dtype": torch.bfloat16}
    for layout in ("vec", "amx"):
        calls = Calls(Case((523, 86), 6, 2, layout=layout, **options))
        expected = calls.run(calls.batch.rows)
        for row, length in enumerate((523, 86)):
            blocks = calls.batch.block_table[int(calls.batch.rows.requests[row])]
            for token, value in ((length - 3, float("inf")), (length - 1, NAN)):
                calls.batch.kv_cache[blocks[token // 32], :, token % 32] = value
        calls.cache = pack_cache(calls.batch)
        found = calls.run(calls.batch.rows)
        assert torch.equal(found[2].pages, expected[2].pages)
        for row in range(2):
            first = int(calls.batch.rows.tokens[row])
            for output, sound in zip(found[:2], expected[:2], strict=True):
                assert torch.equal(output[first : first + 3], sound[first : first + 3])
                assert not output[first + 3 : first + 6].isfinite().all()


def test_grown_rows_read_the_pages_that_follow():
    """Chosen at 150 and 130 tokens, read at 190 and 131; the second has begun no page."""
    case = Case(
        (190, 131), query_lens=(3, 2), recent_pages=2, block_size=32, dtype=torch.float32, layout="vec"
    )
    calls, rule = Calls(case), SelectionRule(16, 2, 1, following_pages=4)
    calls.batch.rule, rows = rule, calls.batch.rows
    table = SelectionTable.allocate(2, 8)
    chosen = torch.tensor([150, 130], dtype=torch.int32)
    ops.selection_attention(*calls.arguments(dataclasses.replace(rows, lengths=chosen)), table)
    assert table.pages[0, 4:].tolist() == [10, 11, 12, 13] and table.pages[1, 4:].tolist() == [9, 10, 11, 12]

    grown = dataclasses.replace(rows, kept_pages=torch.tensor([6, 4], dtype=torch.int32))
    arguments = calls.arguments(grown)
    ops.sparse_attention(*arguments, table)
    batch = calls.batch
    pages = [table.pages[0, :6], table.pages[1, :4]]
    exact = reference.sparse_attention(
        batch.query, batch.kv_cache, batch.block_table, grown, batch.parameters, rule, pages
    )
    found = torch.cat([arguments[-1][tokens_of(batch, row)] for row in range(2)])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_a_token_that_sees_no_kept_page_has_an_output_of_zero():
    case = Case((66, 300), query_lens=(4, 2), kept_pages=1, sink_pages=0, block_size=32, dtype=torch.float32)
    calls = Calls(dataclasses.replace(case, layout="vec"))
    _, sparse, table = calls.run(calls.batch.rows)
    assert table.pages[:, 0].tolist() == [4, 18]
    output = sparse[tokens_of(calls.batch, 0)].flatten(1)
    assert output.any(1).tolist() == [False, False, True, True]


def test_workspace_grows_with_the_query_tokens():
    floats = [ops.allocate_workspace(40000, 32, 128, 16, most).numel() for most in (1, 8)]
    splits = 79
    assert floats == [splits * (32 * (530 + most * 130) + 3 * 32) for most in (1, 8)]


@settings(deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0]), min_size=2, max_size=60),
    recent_pages=st.integers(0, 5),
    sink_pages=st.integers(0, 5),
    others=st.integers(0, 30),
    following_pages=st.integers(0, 3),
)
def test_selection_table_properties(scores, recent_pages, sink_pages, others, following_pages):
    """Few distinct scores, so that most comparisons are ties."""
    kept_pages, num_pages = max(1, recent_pages + sink_pages + others), len(scores)
    scores = torch.tensor(scores)
    if kept_pages >= num_pages:
        with pytest.raises(RuntimeError, match="fewer than scores"):
            ops.select_pages(scores, kept_pages, recent_pages, sink_pages)
        return
    rule = kept_pages, recent_pages, sink_pages, following_pages
    pages = ops.select_pages(scores, *rule).tolist()
    assert pages == reference.select_pages(scores, *rule).tolist()
    assert pages[kept_pages:] == list(range(num_pages, num_pages + following_pages))
    pages = pages[:kept_pages]
    assert pages == sorted(set(pages)) and len(pages) == kept_pages
    forced = {*range(sink_pages), *range(num_pages - recent_pages, num_pages)}
    assert forced <= set(pages)
    for kept in set(pages) - forced:
        for left_out in set(range(num_pages)) - set(pages):
            assert (scores[kept], -kept) > (scores[left_out], -left_out)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_lens": [0]}, "0 query tokens are not between 1 and 2"),
        ({"query_lens": [3]}, "3 query tokens are not between 1 and 2"),
        ({"query_lens": [2], "tokens": [3]}, "token index out of range"),
        ({"query_lens": [2], "lengths": [1]}, "length 1 is not between 2 and 384"),
        ({"query_lens": [1, 1]}, "must have the same length"),
        ({"query_lens": [1.0]}, "row_query_lens must be an int32 tensor"),
        ({"max_query_len": 0}, "max_query_len must be positive"),
        # of a workspace that was made for fewer query tokens
        ({"max_query_len": 1 << 20}, "length 40 is not between 1 and 0"),
    ],
)
def test_bad_query_lens_are_refused(small, changes, message):
    values = {"tokens": [0], "requests": [0], "lengths": [40], "kept_pages": [4], **changes}
    most = values.pop("max_query_len", 2)
    columns = {name: torch.tensor(value) for name, value in values.items()}
    columns = {name: part if part.is_floating_point() else part.int() for name, part in columns.items()}
    arguments = list(small.arguments(DecodeRows(**columns, max_query_len=2), with_rule=False))
    arguments[3] = DecodeRows(**columns, max_query_len=most)
    with pytest.raises(RuntimeError, match=message):
        ops.full_attention(*arguments)


@pytest.mark.parametrize(
    ("following_pages", "message"),
    [(1, "its budget of 4 pages is not between 2 and 3"), (-1, "must not be negative")],
)
def test_following_pages_that_do_not_fit_are_refused(small, following_pages, message):
    small.batch.rule = SelectionRule(16, 1, 1, following_pages)
    with pytest.raises(RuntimeError, match=message):
        ops.selection_attention(*small.arguments(small.batch.rows), SelectionTable.allocate(2, 4))


def test_wrong_page_size_is_refused(small):
    small.batch.rule = SelectionRule(24, 1, 1)
    with pytest.raises(RuntimeError, match="page_size must be 16, 32, 64 or 128"):
        ops.sparse_attention(*small.arguments(small.batch.rows), SelectionTable.allocate(2, 4))
