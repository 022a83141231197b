"""The CPU kernels against the reference, in every layout, dtype and shape that they take.

The cache is packed by vLLM's own operator, where it has the layout. Every other block and every token behind
a sequence holds NaN, and so do outputs and scratch memory: whatever reads or leaves out the wrong thing
shows.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from vllm_delta import ops, reference
from vllm_delta.ops import AttentionParameters, Rows, SelectionTable

current_platform.import_kernels()
ops.load_library()

NAN = float("nan")
LENGTHS = [1, 15, 16, 17, 127, 512, 513, 700, 1500, 2100]


@functools.cache
def vllm_packs(layout):
    """Whether vLLM's build for this processor knows the layout; without AVX-512 it lacks "amx"."""
    token = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    try:
        pack_by_vllm(token, token, torch.zeros(1, dtype=torch.int64), 1, 32, layout)
    except RuntimeError:
        return False
    return True


def pack(keys, values, slots, num_blocks, block_size, layout):
    """Write tokens ``[tokens, num_kv_heads, head_size]`` into an otherwise poisoned cache."""
    by_vllm = layout != "amx" or vllm_packs(layout)
    return (pack_by_vllm if by_vllm else pack_amx)(keys, values, slots, num_blocks, block_size, layout)


def pack_amx(keys, values, slots, num_blocks, block_size, layout):
    """What vLLM does for "amx": K [block / 16][size / 2][16][2], V [size / 16][block / 2][16][2]."""
    heads, size = keys.shape[1:]
    plain = torch.full((2, num_blocks * block_size, heads, size), NAN, dtype=keys.dtype)
    plain[:, slots] = torch.stack([keys, values])
    keys, values = plain.view(2, num_blocks, block_size, heads, size).transpose(2, 3)
    keys = keys.reshape(num_blocks, heads, block_size // 16, 16, size // 2, 2).transpose(3, 4)
    values = values.reshape(num_blocks, heads, block_size // 2, 2, size // 16, 16).permute(0, 1, 4, 2, 5, 3)
    packed = torch.stack([part.flatten(2) for part in (keys, values)], dim=2)
    return packed.view(num_blocks, heads, block_size, 2 * size)


def pack_by_vllm(keys, values, slots, num_blocks, block_size, layout):
    """The same by the operator of the engine."""
    num_kv_heads, head_size = keys.shape[1:]
    cache = torch.full((num_blocks, num_kv_heads, block_size, 2 * head_size), NAN, dtype=keys.dtype)
    key_cache, value_cache = cache.view(num_blocks, num_kv_heads, 2 * block_size, head_size).chunk(2, 2)
    vllm_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, layout, 1.0, 1.0, "auto")
    return cache


@dataclass
class Batch:
    """Sequences in a packed cache, and the same in plain order for the reference."""

    query: torch.Tensor
    cache: torch.Tensor
    plain_cache: torch.Tensor
    block_table: torch.Tensor
    lengths: list[int]
    parameters: AttentionParameters

    @classmethod
    def random(cls, lengths, num_heads, num_kv_heads, head_size, block_size, layout, dtype, **parameters):
        num_seqs, width = len(lengths), -(-max(lengths) // block_size)
        num_blocks = num_seqs * width + 1
        # Columns behind a sequence's blocks are stale in vLLM: here they point outside of the cache.
        block_table = torch.full((num_seqs, width), 1 << 30, dtype=torch.int32)
        free = iter(torch.randperm(num_blocks).tolist())
        slots = []
        for i, length in enumerate(lengths):
            blocks = [next(free) for _ in range(-(-length // block_size))]
            block_table[i, : len(blocks)] = torch.tensor(blocks)
            slots += [blocks[t // block_size] * block_size + t % block_size for t in range(length)]
        keys, values = torch.randn(2, len(slots), num_kv_heads, head_size).to(dtype)
        slots = torch.tensor(slots)
        plain = torch.full((num_blocks * block_size, num_kv_heads, 2 * head_size), NAN).double()
        plain[slots] = torch.cat([keys, values], dim=-1).double()
        return cls(
            query=(2 * torch.randn(num_seqs, num_heads, head_size)).to(dtype),
            cache=pack(keys, values, slots, num_blocks, block_size, layout),
            plain_cache=plain.view(num_blocks, block_size, num_kv_heads, -1).transpose(1, 2),
            block_table=block_table,
            lengths=lengths,
            parameters=AttentionParameters(head_size**-0.5, layout, **parameters),
        )

    def rows(self, order=None):
        order = torch.arange(len(self.lengths)) if order is None else order
        lengths = torch.tensor(self.lengths, dtype=torch.int32)[order]
        return Rows(order.int(), order.int(), lengths)

    def arguments(self, rows):
        _, num_heads, head_size = self.query.shape
        workspace = ops.allocate_workspace(max(self.lengths), num_heads, head_size).fill_(NAN)
        counters = torch.zeros(3, dtype=torch.int64)
        output = torch.full_like(self.query, NAN)
        return (self.query, self.cache, self.block_table, rows, self.parameters, workspace, counters, output)

    def reference_arguments(self):
        arguments = (self.query.double(), self.plain_cache, self.block_table, self.lengths)
        parameters = {
            "scale": self.parameters.scale,
            "softcap": self.parameters.softcap,
            "sinks": self.parameters.sinks,
        }
        return arguments, parameters


def assert_close(actual, expected):
    """Within one rounding to the output's dtype, and float32's error in the sums before it."""
    error = (actual.double() - expected).abs()
    rounding = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2
    assert not actual.isnan().any()
    assert (error <= 1e-5 + rounding * expected.abs()).all(), f"error {error.max():.2e}"


SHAPES = [
    # heads, kv heads, head size, block size, layout, dtype, page size
    (8, 2, 64, 128, "vec", torch.float32, 16),
    (8, 2, 64, 128, "vec", torch.bfloat16, 16),
    (8, 2, 64, 128, "vec", torch.float16, 128),
    (4, 4, 32, 32, "vec", torch.float32, 32),
    (7, 1, 128, 64, "vec", torch.bfloat16, 64),
    (28, 4, 128, 128, "vec", torch.float16, 32),
    (16, 1, 256, 32, "vec", torch.float32, 16),
    (20, 2, 512, 32, "vec", torch.bfloat16, 32),
    (6, 6, 80, 16, "vec16", torch.float32, 16),
    (6, 3, 112, 128, "vec16", torch.bfloat16, 64),
    (5, 1, 80, 48, "vec16", torch.float16, 16),
    (8, 2, 64, 128, "amx", torch.bfloat16, 16),
    (3, 1, 96, 32, "amx", torch.bfloat16, 32),
    (12, 4, 128, 64, "amx", torch.float16, 64),
]  # fmt: skip
SHAPE_IDS = ["-".join(map(str, shape)).replace("torch.", "") for shape in SHAPES]


@pytest.fixture(params=[2, 1, 0], ids=["avx512", "avx2", "generic"])
def instruction_level(request):
    previous = torch.ops.vllm_delta.set_instruction_level(request.param)
    yield request.param
    torch.ops.vllm_delta.set_instruction_level(previous)


def check_batch(batch, page_size, budget_pages, recent_pages, sink_pages):
    """All three operators, in a shuffled order of rows, against the reference."""
    order = torch.randperm(len(batch.lengths))
    rows = batch.rows(order)
    arguments, parameters = batch.reference_arguments()
    selection = {"budget_pages": budget_pages, "recent_pages": recent_pages, "sink_pages": sink_pages}
    expected, expected_scores, expected_pages = reference.selection_attention(
        *arguments, **parameters, page_size=page_size, **selection
    )

    full = batch.arguments(rows)
    ops.full_attention(*full)
    assert_close(full[-1], expected)

    with_scores = batch.arguments(rows)
    table = SelectionTable.allocate(len(rows), budget_pages)
    scores = torch.full((len(rows), -(-max(batch.lengths) // page_size)), NAN)
    ops.selection_attention(*with_scores, table, page_size=page_size, **selection, scores=scores)
    assert torch.equal(with_scores[-1], full[-1])
    for i, row in enumerate(order.tolist()):
        wanted = expected_scores[row]
        torch.testing.assert_close(scores[i, : len(wanted)].double(), wanted, rtol=1e-5, atol=1e-12)
        assert table.pages[i, : table.counts[i]].tolist() == expected_pages[row].tolist()

    # Without asking for the scores, rows that fit the budget take a shorter way.
    selecting = batch.arguments(rows)
    again = SelectionTable.allocate(len(rows), budget_pages)
    ops.selection_attention(*selecting, again, page_size=page_size, **selection)
    assert torch.equal(selecting[-1], full[-1])
    for i in range(len(rows)):
        count = table.counts[i]
        assert torch.equal(again.pages[i, :count], table.pages[i, :count])

    sparse = batch.arguments(rows)
    ops.sparse_attention(*sparse, table, page_size=page_size)
    expected = reference.sparse_attention(*arguments, expected_pages, **parameters, page_size=page_size)
    assert_close(sparse[-1], expected)

    attended = sum(
        len(reference.kept_tokens(expected_pages[i], page_size, length))
        for i, length in enumerate(batch.lengths)
    )
    total = sum(batch.lengths)
    assert full[-2].tolist() == [len(rows), total, total]
    assert selecting[-2].tolist() == [len(rows), total, total]
    assert sparse[-2].tolist() == [len(rows), attended, total]


@pytest.mark.skipif(not vllm_packs("amx"), reason="vLLM's build for this processor lacks the layout")
def test_amx_layout_is_vllms():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 75, 2, 64).bfloat16()
    arguments = keys, values, torch.randperm(5 * 32)[:75], 5, 32, "amx"
    assert torch.equal(pack_amx(*arguments).nan_to_num(9), pack_by_vllm(*arguments).nan_to_num(9))


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_against_reference(shape, instruction_level):
    torch.manual_seed(0)
    *dimensions, page_size = shape
    batch = Batch.random(LENGTHS, *dimensions)
    check_batch(batch, page_size, budget_pages=6, recent_pages=2, sink_pages=1)


@pytest.mark.parametrize(
    ("budget_pages", "recent_pages", "sink_pages"), [(1, 0, 0), (3, 0, 3), (5, 5, 0), (40, 8, 1)]
)
def test_budgets(budget_pages, recent_pages, sink_pages):
    torch.manual_seed(1)
    batch = Batch.random(LENGTHS, 8, 2, 64, 128, "vec", torch.float32)
    check_batch(batch, 16, budget_pages, recent_pages, sink_pages)


@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_softcap_and_sinks(softcap, has_sinks, instruction_level):
    torch.manual_seed(2)
    sinks = torch.randn(8) if has_sinks else None
    batch = Batch.random(LENGTHS, 8, 2, 64, 128, "vec", torch.float32, softcap=softcap, sinks=sinks)
    check_batch(batch, 16, budget_pages=6, recent_pages=2, sink_pages=1)


@pytest.mark.parametrize("seed", range(30))
def test_random_batches(seed):
    """Lengths up to 20k, and every other dimension drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[torch.randint(len(options), (), generator=generator)]

    torch.manual_seed(seed)
    layout = pick(["vec", "vec", "amx"])
    dtype = torch.bfloat16 if layout == "amx" else pick([torch.float32, torch.bfloat16, torch.float16])
    num_kv_heads, group, head_size = pick([1, 2, 4]), pick([1, 2, 3, 7]), pick([32, 64, 96, 128])
    page_size = pick([16, 32, 64, 128])
    longest = pick([600, 3000, 20000])
    lengths = torch.randint(1, longest, (pick([1, 2, 5]),), generator=generator).tolist()
    batch = Batch.random(
        lengths, num_kv_heads * group, num_kv_heads, head_size, pick([128, 256]), layout, dtype
    )
    budget_pages = pick([2, 8, 32])
    check_batch(batch, page_size, budget_pages, recent_pages=1, sink_pages=pick([0, 1]))


def test_equal_pages_tie_to_the_lower_index():
    """Pages with the same keys have the same score to the last bit, wherever they lie."""
    torch.manual_seed(3)
    keys = torch.randn(16, 2, 64).repeat(40, 1, 1)
    cache = pack(keys, torch.randn_like(keys), torch.arange(640), 5, 128, "vec")
    query, output = torch.randn(1, 8, 64), torch.empty(1, 8, 64)
    row = Rows(*torch.tensor([[0], [0], [640]], dtype=torch.int32))
    table = SelectionTable.allocate(1, 10)
    ops.selection_attention(
        query,
        cache,
        torch.arange(5, dtype=torch.int32)[None],
        row,
        AttentionParameters(0.125, "vec"),
        ops.allocate_workspace(640, 8, 64),
        torch.zeros(3, dtype=torch.int64),
        output,
        table,
        page_size=16,
        budget_pages=10,
        recent_pages=2,
        sink_pages=1,
    )
    assert table.pages[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 38, 39]


def test_result_does_not_depend_on_batch_or_threads():
    """The same bits alone, in a batch that takes several waves, and with one thread."""
    torch.manual_seed(4)
    lengths = [20000, 17, 30000, 3000, 513, 9000]
    batch = Batch.random(lengths, 8, 2, 64, 128, "vec", torch.bfloat16)
    selection = {"page_size": 16, "budget_pages": 16, "recent_pages": 2, "sink_pages": 1}

    def run(rows):
        arguments = batch.arguments(rows)
        table = SelectionTable.allocate(len(rows), 16)
        ops.selection_attention(*arguments, table, **selection)
        sparse = batch.arguments(rows)
        ops.sparse_attention(*sparse, table, page_size=16)
        return arguments[-1], sparse[-1], table

    whole, whole_sparse, whole_table = run(batch.rows())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single, single_sparse, _ = run(batch.rows())
    torch.set_num_threads(threads)
    assert torch.equal(single, whole)
    assert torch.equal(single_sparse, whole_sparse)
    for i in range(len(lengths)):
        alone, alone_sparse, table = run(batch.rows(torch.tensor([i])))
        assert torch.equal(alone[i], whole[i])
        assert torch.equal(alone_sparse[i], whole_sparse[i])
        assert torch.equal(table.pages[0, : table.counts[0]], whole_table.pages[i, : table.counts[0]])


@settings(deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0]), min_size=1, max_size=60),
    recent_pages=st.integers(0, 5),
    sink_pages=st.integers(0, 5),
    others=st.integers(0, 30),
)
def test_selection_table_properties(scores, recent_pages, sink_pages, others):
    """Few distinct scores, so that most comparisons are ties."""
    budget_pages = max(1, recent_pages + sink_pages + others)
    scores = torch.tensor(scores)
    pages = ops.select_pages(scores, budget_pages, recent_pages, sink_pages).tolist()
    num_pages = len(scores)
    assert pages == sorted(set(pages))
    assert len(pages) == min(num_pages, budget_pages)
    assert set(range(num_pages)[:sink_pages]) <= set(pages)
    assert set(range(num_pages)[num_pages - min(recent_pages, num_pages) :]) <= set(pages)
    forced = {*range(sink_pages), *range(num_pages - recent_pages, num_pages)}
    for kept in set(pages) - forced:
        for left_out in set(range(num_pages)) - set(pages):
            assert (scores[kept], -kept) > (scores[left_out], -left_out)
    assert pages == reference.select_pages(scores, budget_pages, recent_pages, sink_pages).tolist()


@pytest.fixture
def small_batch():
    torch.manual_seed(5)
    return Batch.random([40, 200], 4, 2, 32, 128, "vec", torch.float32)


def test_no_rows_is_no_work(small_batch):
    empty = torch.empty(0, dtype=torch.int32)
    arguments = small_batch.arguments(Rows(empty, empty, empty))
    ops.full_attention(*arguments)
    assert arguments[-1].isnan().all()
    assert arguments[-2].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "requests", "lengths", "message"),
    [
        ([2], [0], [40], "token index out of range"),
        ([0], [-1], [40], "request index out of range"),
        ([0], [0], [0], "length 0 is not between 1 and 256"),
        ([0], [0], [257], "length 257 is not between 1 and 256"),
        ([0, 1], [0], [40], "must have the same length"),
    ],
)
def test_bad_rows_are_refused(small_batch, tokens, requests, lengths, message):
    rows = Rows(*(torch.tensor(values, dtype=torch.int32) for values in (tokens, requests, lengths)))
    with pytest.raises(RuntimeError, match=message):
        ops.full_attention(*small_batch.arguments(rows))


def test_stale_table_is_refused(small_batch):
    """A table that was written for longer sequences would read blocks of somebody else."""
    table = SelectionTable.allocate(2, 4)
    table.pages[:, 1] = 9
    table.counts.fill_(2)
    with pytest.raises(RuntimeError, match="names a page outside of the sequence"):
        ops.sparse_attention(*small_batch.arguments(small_batch.rows()), table, page_size=16)


def test_wrong_page_size_is_refused(small_batch):
    table = SelectionTable.allocate(2, 4)
    with pytest.raises(RuntimeError, match="page_size must be 16, 32, 64 or 128"):
        ops.sparse_attention(*small_batch.arguments(small_batch.rows()), table, page_size=24)
