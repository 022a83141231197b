"""The policies that DELTA is compared with, and live recall: against masks that are made another way."""

import dataclasses
import math
import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_fresh_process
from dense_mask import logprobs_with_choices
from engines import start_engine
from gpu_cases import DEVICE, Batch, Case, expect, expect_sparse
from policy_masks import MASKS, Budget, MaskRow
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_delta.config import POLICIES, DeltaConfig
from vllm_delta.counters import Counters, difference, total
from vllm_delta.gpu import ops
from vllm_delta.integration.cuda import (
    DeltaCUDAImpl,
    DeltaCUDAMetadata,
    DeltaCUDAMetadataBuilder,
    _on_host,
    _plain_layer,
)
from vllm_delta.integration.cuda_state import CudaState
from vllm_delta.integration.layers import find_state
from vllm_delta.plan import SELF_SELECTING, Plan, Role, make_plan
from vllm_delta.policies import COMPARISONS, make_policy
from vllm_delta.policies.rows import Layer, RowIndex, Rows, together
from vllm_delta.policies.run import Chosen, decode_rows
from vllm_delta.recall import RecallSampler, kept_mass, table_mass

BUDGETS = [
    Budget(budget=64, recent=32, sink=16, page=16),
    Budget(budget=64, recent=0, sink=0, page=16),
    Budget(budget=32, recent=16, sink=16, page=16),
    Budget(budget=48, recent=8, sink=16, page=8),
    Budget(budget=21, recent=5, sink=7, page=1),
]
#: query heads, KV heads, head size, soft cap, sinks
SHAPES = [(6, 2, 16, 0.0, False), (4, 4, 8, 0.0, False), (5, 1, 16, 3.0, True), (4, 2, 8, 0.0, True)]
LENGTHS = [65, 128, 203]


def settings(budget, policy, **others):
    return DeltaConfig(
        policy=policy,
        budget_tokens=budget.budget,
        recent_tokens=budget.recent,
        sink_tokens=budget.sink,
        page_size=budget.page,
        **others,
    )


def random_rows(lengths, heads, kv_heads, size, softcap, sinks):
    """Rows of one request that see so many tokens."""
    shapes = (len(lengths), heads, size), *[(max(lengths), kv_heads, size)] * 2
    queries, keys, values = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    sinks = 2 * torch.randn(heads).double() if sinks else None
    return Rows(2 * queries, keys, values, torch.tensor(lengths), size**-0.5, softcap, sinks)


def mask_row(rows, number=0):
    """One of them for the masks, with probabilities of its own."""
    length, groups = int(rows.lengths[number]), rows.queries.shape[1] // rows.num_kv_heads
    keys = rows.keys[:length].transpose(0, 1).repeat_interleave(groups, 0).numpy()
    query = rows.queries[number].numpy()
    logits = np.stack([key @ one for key, one in zip(keys, query, strict=True)]) * rows.scale
    if rows.softcap:
        logits = rows.softcap * np.tanh(logits / rows.softcap)
    weights = np.exp(logits)
    rest = 0 if rows.sinks is None else np.exp(rows.sinks.numpy())
    probabilities = weights / (weights.sum(axis=1) + rest)[:, None]
    return MaskRow(query, keys, logits, probabilities, groups)


def as_mask(rows, tokens, number=0):
    """A row's tokens as a mask ``[heads, tokens]`` of those that it sees; it attends to no other."""
    length, groups = int(rows.lengths[number]), rows.queries.shape[1] // rows.num_kv_heads
    mask = tokens[number].expand(rows.num_kv_heads, -1).repeat_interleave(groups, 0)
    assert not mask[:, length:].any()
    return mask[:, :length].numpy()


def masked_attention(rows, mask, number=0):
    """Attention of a row in NumPy, ``[heads, head size]``."""
    row = mask_row(rows, number)
    weights = row.probabilities * mask  # of the whole softmax: what is left out is taken out below
    sink = 0 if rows.sinks is None else 1 - row.probabilities.sum(axis=1)
    weights /= (weights.sum(axis=1) + sink)[:, None]
    values = rows.values[: weights.shape[1]].transpose(0, 1).repeat_interleave(row.groups, 0).numpy()
    return np.stack([weight @ value for weight, value in zip(weights, values, strict=True)])


def test_every_policy_has_a_class_and_a_mask():
    assert {"delta", *COMPARISONS} == set(POLICIES)
    assert set(MASKS) == set(COMPARISONS)


@pytest.mark.parametrize("policy", COMPARISONS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_choice_and_attention_equal_the_mask(policy, budget):
    torch.manual_seed(0)
    config = settings(budget, policy)
    for shape in SHAPES:
        rows = random_rows([130, budget.budget + 1, *LENGTHS], *shape)
        tokens = make_policy(config).choose(rows)
        attended = rows.attend(tokens).numpy()
        assert tokens.sum(-1).max() <= budget.budget
        for number in range(len(rows)):
            mask = MASKS[policy](mask_row(rows, number), budget)
            assert (as_mask(rows, tokens, number) == mask).all()
            np.testing.assert_allclose(attended[number], masked_attention(rows, mask, number), atol=1e-12)


@pytest.mark.parametrize("policy", COMPARISONS)
@pytest.mark.parametrize("budget", BUDGETS[1:], ids=str)
def test_ties_go_to_the_lower_index(policy, budget):
    """Small whole numbers, whose products are exact; the query of nothing ties everything."""
    torch.manual_seed(1)
    for scale in (0, 1):
        rows = random_rows([150], 4, 2, 8, 0.0, False)
        query, keys = scale * rows.queries.round().clamp(-1, 1), rows.keys.round().clamp(-1, 1)
        if policy == "oracle":
            query *= 0  # sums of other numbers depend on their order
        if policy == "tidal":
            query[:, 1::2] = query[:, ::2]  # and so does the softmax, between heads
        rows = Rows(query, keys, rows.values, rows.lengths, 1.0)
        mask = MASKS[policy](mask_row(rows), budget)
        assert (as_mask(rows, make_policy(settings(budget, policy)).choose(rows)) == mask).all()


def paged_layer(lengths, heads=4, kv_heads=2, size=16, block_size=16, **options):
    """A layer of random sequences, one a request, in blocks in any order, and their rows."""
    width = -(-max(lengths) // block_size)
    blocks = torch.randperm(len(lengths) * width).view(len(lengths), width)
    layer = Layer(
        query=2 * torch.randn(len(lengths), heads, size),
        kv_cache=torch.randn(len(lengths) * width, kv_heads, block_size, 2 * size),
        block_table=blocks.int(),
        scale=size**-0.5,
        softcap=0.0,
        sinks=None,
        **options,
    )
    order = torch.randperm(len(lengths)).tolist()
    return layer, [RowIndex(request, request, lengths[request]) for request in order]


def double_row(layer, index):
    rows = layer.rows([index])
    parts = (part.double() for part in (rows.queries, rows.keys, rows.values))
    return Rows(*parts, rows.lengths, rows.scale)


def test_rows_come_together_by_request_and_memory(monkeypatch):
    indices = [RowIndex(n, request, 10 + n) for n, request in enumerate([0, 0, 0, 1, 0, 2, 2])]
    assert [len(part) for part in together(indices, 4)] == [3, 1, 1, 2]
    monkeypatch.setattr("vllm_delta.policies.rows.TOGETHER", 2 * 4 * 11)
    parts = list(together(indices, 4))
    assert [len(part) for part in parts] == [2, 1, 1, 1, 1, 1]
    assert [index for part in parts for index in part] == indices


@pytest.mark.parametrize("policy", COMPARISONS)
def test_decode_rows(policy):
    """Rows of all kinds in one step; where layers share a choice, it is the selection layer's."""
    torch.manual_seed(2)
    budget, page = BUDGETS[0], BUDGETS[0].page
    lengths = [1, 64, 65, 200, 150, 63, 90]
    layer, rows = paged_layer(lengths)
    rows = [index._replace(dense=index.length == 90) for index in rows]  # a prompt's last token
    more = [RowIndex(number, 3, length) for number, length in enumerate([199, 60, 120], len(lengths))]
    rows[rows.index(next(index for index in rows if index.request == 3)) + 1 :] += more
    rows.sort(key=lambda index: (index.request, index.token))
    lengths += [index.length for index in more]
    layer = dataclasses.replace(layer, query=2 * torch.randn(len(lengths), *layer.query.shape[1:]))
    rows.insert(3, RowIndex(0, 0, 0))  # padding
    other = dataclasses.replace(layer, query=torch.randn_like(layer.query))
    config, counters, chosen = settings(budget, policy), Counters(), Chosen()
    arguments = rows, chosen, counters
    output = torch.full_like(layer.query, math.nan)
    if policy not in SELF_SELECTING:
        with pytest.raises(RuntimeError, match="before any selection layer"):
            decode_rows(make_policy(config), Role.SPARSE, layer, *arguments, output)
        decode_rows(make_policy(config), Role.SELECTION, other, *arguments, output)
        for index in rows:
            if index.length:
                row = double_row(other, index)
                np.testing.assert_allclose(
                    output[index.token].numpy(), masked_attention(row, True), atol=1e-5, rtol=1e-4
                )
    output.fill_(math.nan)
    decode_rows(make_policy(config), Role.SPARSE, layer, *arguments, output, recall_layer=3)

    attended, mass = 0, 0.0
    for index in rows:
        if not index.length:
            continue
        row = double_row(layer, index)
        chooser = row if policy in SELF_SELECTING else double_row(other, index)
        mask = np.ones((4, index.length), dtype=bool)
        if index.length > budget.budget and not index.dense:
            mask = MASKS[policy](mask_row(chooser), budget)
            attended += -(-index.length // page) if policy == "quest" else 0
        attended += mask[0].sum()
        mass += 0 if index.dense else (mask_row(row).probabilities * mask).sum() / 4
        np.testing.assert_allclose(
            output[index.token].numpy(), masked_attention(row, mask), atol=1e-5, rtol=1e-4
        )
    counts = counters.as_dict()
    assert counts["layers"]["sparse"] == {
        "rows": len(lengths),
        "attended_tokens": attended,
        "context_tokens": sum(lengths),
    }
    selecting = counts["layers"]["selection"]
    assert selecting["rows"] == (0 if policy in SELF_SELECTING else len(lengths))
    assert selecting["attended_tokens"] == selecting["context_tokens"]
    assert (counts["dense_rows"]["within_budget"], counts["dense_rows"]["prefill"]) == (4, 1)
    assert counts["recall"] == {3: {"rows": len(lengths) - 1, "mass": pytest.approx(mass, abs=1e-5)}}


@pytest.mark.parametrize("policy", COMPARISONS)
def test_budget_of_the_context_keeps_everything(policy):
    torch.manual_seed(6)
    budget = Budget(budget=208, recent=32, sink=16, page=16)
    layer, rows = paged_layer([1, 100, 208, 207])
    chosen, counters = Chosen(), Counters()
    roles = [Role.SPARSE] if policy in SELF_SELECTING else [Role.SELECTION, Role.SPARSE]
    for role in roles:
        output = torch.full_like(layer.query, math.nan)
        arguments = layer, rows, chosen, counters, output, 2
        decode_rows(make_policy(settings(budget, policy)), role, *arguments)
        for index in rows:
            expected = masked_attention(double_row(layer, index), True)
            np.testing.assert_allclose(output[index.token].numpy(), expected, atol=1e-5, rtol=1e-4)
    counts = counters.as_dict()
    assert counts["attended_tokens"] == counts["context_tokens"] == 516 * len(roles)
    assert counts["dense_rows"]["within_budget"] == 4
    assert counts["recall"] == {2: {"rows": 4, "mass": 4.0}}


def test_quantised_cache():
    """Keys, values and the query come with factors."""
    torch.manual_seed(3)
    layer, rows = paged_layer([40])
    scales = torch.tensor([0.5, 3.0, 0.25]).unbind()
    scaled = dataclasses.replace(layer, scales=scales).rows(rows)
    plain = layer.rows(rows)
    assert torch.equal(scaled.queries, plain.queries * 0.5)
    assert torch.equal(scaled.keys, plain.keys * 3.0)
    assert torch.equal(scaled.values, plain.values * 0.25)


def test_recall_by_delta_table():
    torch.manual_seed(4)
    lengths, page, budget_pages = [130, 20, 75, 90], 16, 3
    layer, rows = paged_layer(lengths)
    rows[0] = rows[0]._replace(dense=True)
    pages = torch.stack(
        [
            torch.randperm(-(-n // page))[:3].sort().values if n > 48 else torch.arange(3)
            for n in (i.length for i in rows)
        ]
    )
    expected = 0.0
    for index, kept in zip(rows[1:], pages[1:], strict=True):
        probabilities = mask_row(double_row(layer, index)).probabilities
        mask = np.isin(np.arange(index.length) // page, kept.numpy())
        expected += probabilities[:, mask].sum(axis=1).mean()
    count, mass = table_mass(layer, rows, pages.int(), page, budget_pages)
    assert count == 3
    assert mass == pytest.approx(expected, abs=1e-5)


def test_recall_leaves_sinks_out():
    torch.manual_seed(5)
    rows = random_rows([50, 30], 4, 2, 8, 0.0, True)
    assert kept_mass(rows, rows.visible).tolist() == pytest.approx([1.0, 1.0])
    assert rows.probabilities().sum() < 2 * 4


def test_recall_is_sampled():
    sampler = RecallSampler()
    steps = []
    for every in (0, 0, 0, 3, 3, 3, 3, 1):
        sampler.next_step(every)
        steps.append(sampler.active)
    assert steps == [False, False, False, False, False, True, False, True]


def test_recall_in_counters():
    counters = Counters()
    before = counters.as_dict()
    assert "recall" not in before
    counters.add_recall(7, 2, 1.5)
    counters.add_recall(3, 1, 0.5)
    first = counters.as_dict()
    counters.add_recall(7, 1, 0.25)
    after = counters.as_dict()
    assert difference(first, before)["recall"] == {3: {"rows": 1, "mass": 0.5}, 7: {"rows": 2, "mass": 1.5}}
    assert difference(after, first)["recall"][7] == {"rows": 1, "mass": 0.25}
    assert total([first, before, after])["recall"][7] == {"rows": 5, "mass": 3.25}
    counters.reset()
    assert counters.as_dict() == before


# --- the layers of vLLM's GPU backend, with or without a GPU ------------------------------------------


def cuda_layer(batch, config, role, chunks=None):
    """A layer of that role, and its call; all rows are one chunk if nothing else is said."""
    impl = object.__new__(DeltaCUDAImpl)
    counters = Counters(DEVICE)
    # Triton's interpreter runs on the CPU, where Counters has fewer columns than a GPU's kernels fill.
    counters._by_role = {role: torch.zeros(5, dtype=torch.int64, device=DEVICE) for role in Role}
    state = CudaState(
        config=config,
        plan=Plan({}, "settings"),
        workspace=batch.workspace,
        selection=batch.selection,
        counters=counters,
        table=batch.table,
        requests=batch.rows.requests,
        dense=batch.rows.dense,
        schedules={},
        recall=RecallSampler(active=True),
    )
    impl.delta, impl.role, impl.kv_cache_dtype = state, role, "fp8" if batch.case.fp8 else "auto"
    impl._parameters = batch.parameters
    chunks = [(batch.rows, batch.schedule)] if chunks is None else chunks
    cache = batch.kv_cache.view(torch.uint8) if batch.case.fp8 else batch.kv_cache
    metadata = SimpleNamespace(
        chunks=chunks,
        rows=_on_host(batch.rows),
        block_table=batch.block_table,
        group=None,
    )

    def run():
        output = torch.full(batch.query.shape, math.nan, dtype=batch.case.dtype, device=DEVICE)
        layer = SimpleNamespace(layer_name="model.layers.5.attn")
        impl._decode(layer, batch.query, cache, metadata, output, None)
        return output

    return impl, run


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("policy", COMPARISONS)
def test_policies_of_cuda_layers(policy, fp8):
    case = Case((200, 0, 40, 150, 97), dense_rows=(3,), fp8=fp8, sinks=True, softcap=20.0)
    batch = Batch(case)
    config = settings(Budget(64, 16, 16, 16), policy)
    impl, run = cuda_layer(batch, config, Role.SPARSE)
    if policy not in SELF_SELECTING:
        impl.role = Role.SELECTION
        run()
        impl.role = Role.SPARSE
    output, counts = run(), impl.delta.counters.as_dict()
    layer = _plain_layer(batch.query, batch.kv_cache, batch.block_table, batch.parameters)
    for number, index in enumerate(_on_host(batch.rows)):
        if not index.length:
            continue
        if number in (0, 4):
            rows = layer.rows([index])
            expected = rows.attend(make_policy(config).choose(rows))[0]
        else:
            expected = expect(batch, number).full.float().to(DEVICE)
        torch.testing.assert_close(output[index.token].float(), expected, atol=0.01, rtol=0.01)
    assert counts["layers"]["sparse"]["rows"] == 4
    assert counts["layers"]["sparse"]["context_tokens"] == sum(case.lengths)
    assert (counts["dense_rows"]["within_budget"], counts["dense_rows"]["prefill"]) == (1, 1)
    assert counts["recall"][5]["rows"] == 3


def test_recall_of_cuda_layers():
    batch = Batch(Case((200, 0, 40, 150, 97), dense_rows=(3,)))
    batch.make_schedule()
    impl, run = cuda_layer(batch, settings(Budget(64, 16, 16, 16), "delta"), Role.SELECTION)
    run()
    impl.role = Role.SPARSE
    run()
    layer = _plain_layer(batch.query, batch.kv_cache, batch.block_table, batch.parameters)
    expected = 1.0  # of the row that fits
    for number in (0, 4):
        index = _on_host(batch.rows)[number]
        probabilities = layer.rows([index]).probabilities()[0]
        pages = torch.arange(index.length, device=DEVICE) // 16
        expected += probabilities[:, torch.isin(pages, batch.kept(number).to(DEVICE))].sum(-1).mean().item()
    assert impl.delta.counters.as_dict()["recall"] == {5: {"rows": 3, "mass": pytest.approx(expected)}}


def test_chunks_of_cuda_layers():
    """More rows than a launch takes: in two chunks they attend and choose as in one."""
    outputs, tables = [], []
    for cuts in ([0, 5], [0, 2, 5]):
        torch.manual_seed(0)
        batch = Batch(Case((200, 40, 0, 150, 97), dense_rows=(3,)))
        chunks = []
        for begin, end in pairwise(cuts):
            rows = batch.rows.slice(begin, end)
            schedule = ops.Schedule.allocate(batch.workspace.max_rows, batch.case.num_kv_heads, DEVICE)
            sizes = batch.shape, batch.case.dtype.itemsize, batch.workspace, batch.selection
            ops.make_schedule(schedule, rows, *sizes, batch.full_counters, 2)
            chunks.append((rows, schedule))
        impl, run = cuda_layer(batch, settings(Budget(64, 16, 16, 16), "delta"), Role.SELECTION, chunks)
        impl.delta.recall.active = False
        selected = run()
        tables.append([batch.kept(number).tolist() for number in (0, 1, 3, 4)])
        impl.role = Role.SPARSE
        outputs.append(torch.stack([selected, run()])[:, batch.rows.tokens[[0, 1, 3, 4]].long()])
        assert impl.delta.counters.as_dict()["layers"]["sparse"]["rows"] == 4
    assert tables[0] == tables[1]
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.01, rtol=0.01)


@pytest.mark.parametrize("appends", [True, False])
def test_steps_of_single_tokens(monkeypatch, appends):
    """The first layer schedules for all, and until it runs lengths may change, as in a graph."""
    batch = Batch(Case((200, 40, 0, 150, 97), dense_rows=(3,)))
    config = settings(Budget(64, 16, 16, 16), "delta")
    impl, _ = cuda_layer(batch, config, Role.SELECTION)
    impl.kv_sharing_target_layer_name = None
    state = impl.delta
    state.schedules[batch.shape] = [batch.schedule]
    state.recall.active = False
    builder = object.__new__(DeltaCUDAMetadataBuilder)
    builder.delta, builder._shape, builder._eligible = state, batch.shape, [impl]
    builder.model_config = SimpleNamespace(dtype=batch.case.dtype)
    whole, (keys, values, slots) = batch.kv_cache.clone(), batch.take_last_tokens()
    lengths = batch.rows.lengths.clone()
    batch.rows.lengths.fill_(1)
    metadata = object.__new__(DeltaCUDAMetadata)
    metadata.chunks, metadata.prefill, metadata.group = builder._chunks(batch.rows), None, builder
    metadata.block_table, metadata.slot_mapping = batch.block_table, slots
    metadata.appends = metadata.runs_full_layers = appends
    batch.rows.lengths.copy_(lengths)
    dependent = []  # of the launches since the last layer: whether it may begin before the one ahead ends
    monkeypatch.setattr(
        ops, "_dependent_launch", lambda device, is_so=True: dependent.append(is_so) or {"PDL": False}
    )
    impl.do_kv_cache_update = lambda *_: batch.kv_cache.copy_(whole)  # vLLM's kernel needs a GPU
    layer = SimpleNamespace(layer_name="model.layers.5.attn")
    full = ((Role.FULL, True), (Role.FULL, False)) if appends else ()  # else it is FlashAttention's
    for role, impl.schedules in (
        *full,
        (Role.SELECTION, True),
        (Role.SELECTION, False),
        (Role.SPARSE, True),  # the first of a second group
        (Role.SPARSE, False),
    ):
        impl.role = role
        dependent.clear()
        batch.take_last_tokens()
        output = torch.full(batch.query.shape, math.nan, dtype=batch.case.dtype, device=DEVICE)
        impl.forward(layer, batch.query, keys, values, batch.kv_cache, metadata, output)
        assert dependent[0] is not impl.schedules
        assert torch.equal(batch.kv_cache, whole)
        for row in (0, 1, 3, 4):
            reads_all = role is not Role.SPARSE
            exact = expect(batch, row).full if reads_all else expect_sparse(batch, row, batch.kept(row))
            actual = output[int(batch.rows.tokens[row])]
            torch.testing.assert_close(actual.double(), exact, atol=0.01, rtol=0.01)
    assert state.counters.as_dict()["layers"]["full"]["rows"] == 4 * len(full)


@pytest.mark.parametrize(
    ("delta", "support"),
    [
        ({}, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"policy": "quest"}, AttentionCGSupport.NEVER),
        ({"recall_sample_steps": 50}, AttentionCGSupport.NEVER),
    ],
)
def test_what_needs_python_is_not_captured(delta, support):
    vllm_config = SimpleNamespace(additional_config={"delta": delta})
    assert DeltaCUDAMetadataBuilder.get_cudagraph_support(vllm_config, None) is support


# --- inside vLLM -----------------------------------------------------------------------------------

SMALL = Budget(budget=128, recent=32, sink=16, page=16)
FULL_LAYERS, SELECTION_LAYERS, LAYERS = 1, (1, 4), 8
PROMPTS, STEPS, SAMPLE_STEPS = (40, 600, 120), 14, 3


class PolicyMasks:
    """What `logprobs_with_choices` asks, and the mass that each sparse layer's rows keep."""

    def __init__(self, policy, prompt_len, length):
        self.policy, self.prompt_len, self.length = policy, prompt_len, length
        self.mask = None
        self.mass = {}  # (layer, row) to the mass

    def __call__(self, layer, query, key, probabilities):
        own = self.policy in SELF_SELECTING
        if layer < FULL_LAYERS:
            return None
        if own or layer in SELECTION_LAYERS:
            self.mask = torch.ones(len(query), self.length, self.length, dtype=torch.bool)
            for row in range(self.prompt_len, self.length):
                if row + 1 > SMALL.budget:
                    seen = key[:, : row + 1], probabilities[:, row, : row + 1]
                    self.mask[:, row, : row + 1] = self.choose(query[:, row], *seen)
            if not own:
                return None
        for row in range(self.prompt_len, self.length):
            self.mass[layer, row] = (probabilities[:, row] * self.mask[:, row]).sum(-1).mean().item()
        return self.mask

    def choose(self, query, key, probabilities):
        logits = (key @ query[:, :, None])[:, :, 0].numpy() * query.shape[1] ** -0.5
        row = MaskRow(query.numpy(), key.numpy(), logits, probabilities.numpy(), 2)
        masks = {**MASKS, "delta": MASKS["oracle"]}
        return torch.from_numpy(masks[self.policy](row, SMALL))


def delta_settings(policy, sample_steps):
    return {
        "policy": policy,
        "full_layers": FULL_LAYERS,
        "selection_layers": list(SELECTION_LAYERS),
        "budget_tokens": SMALL.budget,
        "recent_tokens": SMALL.recent,
        "sink_tokens": SMALL.sink,
        "recall_sample_steps": sample_steps,
    }


def generate(model, sample_steps, options):
    """Under every policy, answers and counters, from one engine: starting one takes most of the time."""
    options = {"enable_prefix_caching": False, **options}
    results = {}
    with start_engine(model, "DELTA", delta_settings("delta", sample_steps), **options) as engine:
        for policy in POLICIES:
            engine.llm.collective_rpc(use_policy, args=(policy,))
            results[policy] = engine.generate(make_prompts(), STEPS, logprobs=5), engine.counters()
    return results


def use_policy(worker, policy):
    """What a worker would have done if it had been started with this policy."""
    state = find_state(worker.vllm_config)
    state.config = dataclasses.replace(state.config, policy=policy)
    state.plan = make_plan(state.config, list(state.plan.roles), LAYERS)
    for name, layer in get_layers_from_vllm_config(worker.vllm_config, Attention).items():
        layer.impl.role = state.plan.roles[extract_layer_index(name)]
    state.counters.reset()
    state.recall.steps = 0


def make_prompts():
    generator = random.Random(0)
    return [[generator.randrange(10, 500) for _ in range(length)] for length in PROMPTS]


def sparse_layers(policy):
    own = policy in SELF_SELECTING
    return [layer for layer in range(FULL_LAYERS, LAYERS) if own or layer not in SELECTION_LAYERS]


def compare_with_masks(model, policy, answers):
    """The distances of log-probabilities from the masks', and each sparse layer's mass by step."""
    distances, mass = [], np.zeros((LAYERS, STEPS))
    for prompt, answer in zip(make_prompts(), answers, strict=True):
        masks = PolicyMasks(policy, len(prompt), len(prompt) + STEPS - 1)
        expected = logprobs_with_choices(model, prompt, answer.tokens, masks)
        for step, logprobs in enumerate(answer.logprobs):
            for token, logprob in logprobs.items():
                distances.append(abs(logprob - expected[step, token].item()))
        for (layer, row), kept in masks.mass.items():
            mass[layer, row - len(prompt) + 1] += kept
    return distances, mass


#: One process, so that `use_policy` can be called in it; and not this one, where vLLM is not to be set up.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def results(tiny_model):
    return in_fresh_process(generate, tiny_model, SAMPLE_STEPS, {}, **ONE_PROCESS)


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_recall_and_counters(tiny_model, results, policy):
    """Next-token log-probabilities equal those of dense attention with the policy's tokens as a mask."""
    answers, counts = results[policy]
    distances, mass = compare_with_masks(tiny_model, policy, answers)
    assert max(distances) < 1e-4
    sampled = range(SAMPLE_STEPS, STEPS, SAMPLE_STEPS)
    assert counts["recall"] == {
        layer: {
            "rows": len(sampled) * len(PROMPTS),
            "mass": pytest.approx(mass[layer, sampled].sum(), abs=1e-3),
        }
        for layer in sparse_layers(policy)
    }
    check_counters(policy, counts)


def test_policy_of_the_settings(tiny_model, results):
    """Started with a policy, an engine does what it does when it is told to use it."""
    with start_engine(tiny_model, "DELTA", delta_settings("quest", SAMPLE_STEPS)) as engine:
        answers, counts = engine.generate(make_prompts(), STEPS, logprobs=5), engine.counters()
    told, told_counts = results["quest"]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in told]
    recall, told_recall = counts.pop("recall"), told_counts["recall"]
    assert counts == {key: value for key, value in told_counts.items() if key != "recall"}
    assert recall == {layer: pytest.approx(sums) for layer, sums in told_recall.items()}


@pytest.fixture(scope="module")
def gpu_results(tiny_model):
    options = {"dtype": "float16", "enforce_eager": False, "kv_cache_memory_bytes": 1 << 28}
    return in_fresh_process(generate, tiny_model, 1, options, **ONE_PROCESS)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_recall_and_counters_on_a_gpu(tiny_model, gpu_results, policy):
    """The same in float16, with piecewise CUDA graphs; rounding moves a few choices."""
    answers, counts = gpu_results[policy]
    distances, mass = compare_with_masks(tiny_model, policy, answers)
    assert np.median(distances) < 0.05
    for layer in sparse_layers(policy):
        recall = counts["recall"][layer]
        assert recall["rows"] == (STEPS - 1) * len(PROMPTS)
        assert recall["mass"] == pytest.approx(mass[layer].sum(), rel=0.02)
    check_counters(policy, counts)


def check_counters(policy, counts):
    num_sparse = len(sparse_layers(policy))
    lengths = [length + step for length in PROMPTS for step in range(1, STEPS)]
    layers = counts["layers"]
    for role, number in (("full", 1), ("selection", LAYERS - 1 - num_sparse), ("sparse", num_sparse)):
        assert layers[role]["rows"] == number * len(lengths)
        assert layers[role]["context_tokens"] == number * sum(lengths)
        if role != "sparse":
            assert layers[role]["attended_tokens"] == layers[role]["context_tokens"]
    kept = 0
    for length in lengths:
        partial = -length % SMALL.page if policy in ("delta", "oracle", "quest") else 0
        kept += length if length <= SMALL.budget else SMALL.budget - partial
        kept += -(-length // SMALL.page) if policy == "quest" and length > SMALL.budget else 0
    assert layers["sparse"]["attended_tokens"] == num_sparse * kept
    short = sum(length <= SMALL.budget for length in lengths)
    assert counts["dense_rows"]["within_budget"] == num_sparse * short
