"""The layers of vLLM's GPU backend, with or without a GPU: what they make of a step."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract import Batch, Case, masked_probabilities, row_tensors, weighted_sum
from gpu_batch import DEVICE, DTYPE, GPUBatch
from rival_masks import Budget
from rival_rows import settings
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from vllm_delta.integration.cuda.builder import DeltaCUDAMetadataBuilder
from vllm_delta.integration.cuda.layer import DeltaCUDAImpl, decode
from vllm_delta.integration.cuda.metadata import DeltaCUDAMetadata, Launch, LayerGroup
from vllm_delta.integration.cuda.state import LOGITS_SHARE, CUDAState, _logit_tokens
from vllm_delta.integration.probe import Probe
from vllm_delta.integration.settings import settings_of
from vllm_delta.integration.speculation import verified_tokens
from vllm_delta.integration.worker_methods import DeltaWorkerMethods
from vllm_delta.integration.worker_state import WrittenTable
from vllm_delta.kernels.gpu import attention, combine, scores, select
from vllm_delta.kernels.gpu.schedule import Schedule
from vllm_delta.kernels.gpu.workspace import LOGIT_BYTES, launch_rows
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.counters import Counters
from vllm_delta.method.plan import SELF_SELECTING, Plan, Role
from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.plain.probe import PERIOD, causal_attention
from vllm_delta.plain.rivals import COMPARISONS, make_policy
from vllm_delta.plain.rows import Layer, row_indices

BUDGET = Budget(budget=64, recent=16, sink=16, page=16)
#: the last token of a prompt stands in row 3
KEPT = (4, 4, 4, ALL_PAGES, 4)
LENGTHS = (200, 0, 40, 150, 97)


class Step:
    """A worker with one batch of decode rows, and a step with them."""

    def __init__(self, case: Case, config: DeltaConfig, *, roles: dict[int, Role], **options: bool) -> None:
        self.batch = Batch.random(case)
        self.gpu = gpu = GPUBatch(self.batch)
        counters = Counters(DEVICE)
        # Triton's interpreter runs on the CPU, where Counters has fewer columns than a GPU's kernels fill.
        counters._by_role = {role: torch.zeros(5, dtype=torch.int64, device=DEVICE) for role in Role}
        plan = Plan(roles, "settings", config.policy)
        self.state = CUDAState(
            config=config,
            plan=plan,
            counters=counters,
            table=WrittenTable(gpu.table),
            itemsize=case.dtype.itemsize,
            workspace=gpu.workspace,
            requests=gpu.rows.requests,
            kept_pages=gpu.rows.kept_pages,
            query_lens=torch.full_like(gpu.rows.kept_pages, 4),
            max_query_len=4,
            schedules={gpu.shape: [gpu.schedule]},
        )
        self.group = LayerGroup(tuple(sorted(roles)), gpu.shape)
        # vLLM's own part of the metadata is not read here, but for the table and the slots.
        own = {part.name for part in dataclasses.fields(DeltaCUDAMetadata)}
        inherited = own - set(DeltaCUDAMetadata.__annotations__)
        self.metadata = DeltaCUDAMetadata(
            **dict.fromkeys(inherited) | {"block_table": gpu.block_table},
            group=self.group,
            plan=plan,
            step=self.state.begin_step(self.group, has_rows=True),
            launches=self.state.cut(gpu.rows, gpu.shape),
            **options,
        )

    def watch(self, *, recall: bool = True) -> None:
        """Let Python read the rows, and measure recall."""
        self.metadata.row_indices = row_indices(self.gpu.rows)
        self.state.aside.recall.active = recall

    def decode(self, index: int) -> torch.Tensor:
        """The output of a layer, NaN where nothing was written."""
        gpu = self.gpu
        output = torch.full(gpu.query.shape, math.nan, dtype=gpu.case.dtype, device=DEVICE)
        layer = Layer(gpu.query, gpu.kv_cache, gpu.block_table, gpu.parameters)
        decode(self.state, self.metadata, index, self.metadata.plan.roles[index], layer, output)
        return output

    def exact(self, row: int) -> torch.Tensor:
        """Full attention of a row, in float64; of the pages that it keeps if `sparse`."""
        query, keys, values, sinks = row_tensors(self.batch, row)
        mask = torch.ones(keys.shape[1], dtype=torch.bool)
        return weighted_sum(masked_probabilities(self.batch.case, query, keys, sinks, mask), values)

    def exact_of_kept(self, row: int) -> torch.Tensor:
        """The attention of a row over the pages that the table keeps for it, in float64."""
        query, keys, values, sinks = row_tensors(self.batch, row)
        kept = self.gpu.pages()[row]
        mask = torch.ones(keys.shape[1], dtype=torch.bool)
        if kept is not None:
            mask = torch.isin(torch.arange(keys.shape[1]) // 16, kept)
        return weighted_sum(masked_probabilities(self.batch.case, query, keys, sinks, mask), values)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("policy", COMPARISONS)
def test_rivals_in_cuda_layers(policy, fp8):
    config = settings(BUDGET, policy)
    case = Case(LENGTHS, kept_pages=KEPT, fp8=fp8, sinks=True, softcap=20.0, dtype=DTYPE)
    step = Step(case, config, roles={4: Role.SELECTION, 5: Role.SPARSE})
    step.watch()
    if policy not in SELF_SELECTING:
        step.decode(4)
    output, counts = step.decode(5), step.state.counters.as_dict()
    gpu = step.gpu
    layer = Layer(gpu.query, gpu.kv_cache, gpu.block_table, gpu.parameters)
    for number, index in enumerate(step.metadata.row_indices):
        if not index.length:
            continue
        if number in (0, 4):
            rows = layer.rows([index])
            expected = rows.attend(make_policy(config).choose(rows))[0]
        else:
            expected = step.exact(number).float()
        torch.testing.assert_close(output[index.token].float(), expected, atol=0.01, rtol=0.01)
    assert counts["layers"]["sparse"]["rows"] == 4
    assert counts["layers"]["sparse"]["context_tokens"] == sum(LENGTHS)
    assert (counts["dense_rows"]["within_budget"], counts["dense_rows"]["prefill"]) == (1, 1)
    assert counts["recall"][5]["rows"] == 3


DELTA = settings(BUDGET, "delta")


def test_recall_of_cuda_layers():
    step = Step(Case(LENGTHS, kept_pages=KEPT, dtype=DTYPE), DELTA, roles={4: Role.SELECTION, 5: Role.SPARSE})
    step.gpu.make_schedule()
    step.watch()
    step.decode(4)
    step.decode(5)
    gpu = step.gpu
    layer = Layer(gpu.query, gpu.kv_cache, gpu.block_table, gpu.parameters)
    expected = 1.0  # of the row that fits
    for number in (0, 4):
        index = step.metadata.row_indices[number]
        probabilities = layer.rows([index]).probabilities()[0]
        pages = torch.arange(index.length, device=DEVICE) // 16
        kept = torch.isin(pages, gpu.pages()[number].to(DEVICE))
        expected += probabilities[:, kept].sum(-1).mean().item()
    counts = step.state.counters.as_dict()
    assert counts["recall"] == {5: {"rows": 3, "mass": pytest.approx(expected)}}


def test_several_launches_of_cuda_layers():
    """More rows than a launch takes: in two launches they attend and choose as in one."""
    outputs, tables = [], []
    for cuts in ([0, 5], [0, 2, 5]):
        step = Step(
            Case(LENGTHS, kept_pages=KEPT, dtype=DTYPE), DELTA, roles={4: Role.SELECTION, 5: Role.SPARSE}
        )
        gpu = step.gpu
        step.metadata.launches = [
            Launch(
                gpu.rows[begin:end],
                Schedule.allocate(gpu.workspace.max_rows, gpu.case.num_kv_heads, DEVICE),
            )
            for begin, end in pairwise(cuts)
        ]
        step.state.make_schedules(step.metadata.launches, gpu.shape, 2)
        selected = step.decode(4)
        tables.append([None if pages is None else pages.tolist() for pages in gpu.pages()])
        outputs.append(torch.stack([selected, step.decode(5)])[:, gpu.rows.tokens[[0, 2, 3, 4]].long()])
        counts = step.state.counters.as_dict()["layers"]
        assert counts["sparse"]["rows"] == 4
        assert counts["full"]["rows"] == 2 * 4
    assert tables[0] == tables[1]
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.01, rtol=0.01)


def test_a_sparse_layer_needs_a_selection_of_its_step():
    step = Step(Case(LENGTHS, kept_pages=KEPT, dtype=DTYPE), DELTA, roles={4: Role.SELECTION, 5: Role.SPARSE})
    step.gpu.make_schedule()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="before any selection layer of the same step"):
            step.decode(5)
        step.decode(4)
        step.decode(5)
        step.metadata.step = step.state.begin_step(step.group, has_rows=True)


#: layers of all kinds, the first of which is the group's first
ROLES = {2: Role.FULL, 3: Role.FULL, 4: Role.SELECTION, 5: Role.SPARSE, 7: Role.SELECTION, 8: Role.SPARSE}


def make_impl(state: CUDAState, index: int) -> DeltaCUDAImpl:
    """A layer without vLLM's part of its construction, which needs a GPU."""
    impl = object.__new__(DeltaCUDAImpl)
    impl.state, impl.layer_index, impl.kv_cache_dtype = state, index, "auto"
    impl.scale, impl.logits_soft_cap, impl.sinks = 64**-0.5, 0.0, None
    impl.kv_sharing_target_layer_name = None
    return impl


@pytest.mark.parametrize("appends", [True, False])
def test_steps_of_single_tokens(monkeypatch, appends):
    """The group's first layer schedules for all, and until it runs lengths may change, as in a graph."""
    case = Case(LENGTHS, kept_pages=KEPT, dtype=DTYPE)
    step = Step(case, DELTA, roles=ROLES, appends=appends, runs_full_layers=appends)
    gpu, state, metadata = step.gpu, step.state, step.metadata
    whole, (keys, values, slots) = gpu.kv_cache.clone(), gpu.take_last_tokens()
    metadata.slot_mapping = slots
    dependent = []  # of the launches since the last layer: whether it may begin before the one ahead ends
    for module in (attention, combine, scores, select):
        monkeypatch.setattr(
            module, "dependent_launch", lambda device, is_so=True: dependent.append(is_so) or {"PDL": False}
        )
    for index, role in ROLES.items():
        impl = make_impl(state, index)
        impl.do_kv_cache_update = lambda *_: gpu.kv_cache.copy_(whole)  # vLLM's kernel needs a GPU
        dependent.clear()
        gpu.take_last_tokens()
        output = torch.full(gpu.query.shape, math.nan, dtype=case.dtype, device=DEVICE)
        layer = SimpleNamespace(layer_name=f"model.layers.{index}.attn")
        if role is Role.FULL and not appends:  # FlashAttention's, but the schedule is made
            if metadata.schedules_before(index):
                impl._make_schedules(metadata)
            continue
        impl.forward(layer, gpu.query, keys, values, gpu.kv_cache, metadata, output)
        assert dependent[0] is (index != 2)
        assert torch.equal(gpu.kv_cache.float().nan_to_num(9), whole.float().nan_to_num(9))
        for row in case.real_rows:
            exact = step.exact_of_kept(row) if role is Role.SPARSE else step.exact(row)
            actual = output[int(gpu.rows.tokens[row])].to(exact.device)
            torch.testing.assert_close(actual.double(), exact, atol=0.01, rtol=0.01)
    assert state.counters.as_dict()["layers"]["full"]["rows"] == 4 * 2


def test_current_values_of_weights_are_used():
    """Sinks and scales may be loaded into a running engine, and replaced."""
    state = Step(Case((40,), dtype=DTYPE), DELTA, roles={4: Role.SELECTION}).state
    impl = make_impl(state, 4)
    impl.kv_cache_dtype = "fp8"
    output = torch.zeros(1, 4, 64, dtype=DTYPE)
    for value in (1.0, 2.0):
        impl.sinks = torch.full((4,), value)
        layer = SimpleNamespace(
            _q_scale=torch.tensor(value), _k_scale=torch.tensor(2 * value), _v_scale=torch.tensor(3 * value)
        )
        quantised = impl._parameters(layer, torch.zeros(1, 4, 64, dtype=torch.float8_e4m3fn), output)
        assert [float(scale) for scale in quantised.scales] == [value, 2 * value, 3 * value]
        assert float(quantised.sinks[0]) == value
        assert [float(s) for s in impl._parameters(layer, output, output).scales] == [1, 2 * value, 3 * value]


def test_no_operation_is_fused_into_attention():
    """vLLM's passes ask the layers what they can do beside attention; ours do nothing beside it."""
    impl = make_impl(Step(Case((40,), dtype=DTYPE), DELTA, roles=ROLES).state, 4)
    asked = [name for name in dir(impl) if name.startswith("fused_") and name.endswith("_supported")]
    assert "fused_rope_kvcache_supported" in asked
    for name in asked:
        arguments = ["any"] if name == "fused_output_quant_supported" else []
        assert not getattr(impl, name)(*arguments), name


def test_which_layers_the_kernels_run():
    metadata = Step(Case((40,), dtype=DTYPE), DELTA, roles=ROLES).metadata
    for runs_full_layers in (False, True):
        metadata.runs_full_layers = runs_full_layers
        assert metadata.role_of(2) is (Role.FULL if runs_full_layers else None)
        assert (metadata.role_of(4), metadata.role_of(5)) == (Role.SELECTION, Role.SPARSE)
        assert metadata.role_of(None) is None
    assert metadata.schedules_before(2) and not metadata.schedules_before(4)
    metadata.launches = []
    assert metadata.role_of(4) is None and not metadata.schedules_before(2)


def test_prompt_rows_of_single_token_steps_keep_everything(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    step = Step(Case((40, 50, 60, 70), dtype=DTYPE), DELTA, roles=ROLES)
    lengths = torch.tensor([40, 50, 60, 0], dtype=torch.int32)
    common = SimpleNamespace(
        num_reqs=4,
        max_query_len=1,
        query_start_loc=torch.arange(5, dtype=torch.int32, device=DEVICE),
        seq_lens=lengths.to(DEVICE),
        seq_lens_cpu_upper_bound=lengths,
    )
    for prompt_lens, expected in (
        ([40, 10, 80, 0], [ALL_PAGES, 4, ALL_PAGES, 4]),
        ([10, 50, 10, 0], [4, ALL_PAGES, 4, 4]),
        ([10, 10, 10, 0], [4, 4, 4, 4]),
    ):
        rows = step.state.uniform_rows(common, torch.tensor(prompt_lens))
        assert rows.kept_pages.tolist() == expected and rows.query_lens is None
    # With four tokens each, what begins in a prompt does: the first of 50 tokens stands behind 46 others.
    common.max_query_len, common.query_start_loc = 4, 4 * common.query_start_loc
    rows = step.state.uniform_rows(common, torch.tensor([36, 47, 60, 0]))
    assert rows.kept_pages.tolist() == [4, ALL_PAGES, ALL_PAGES, 4]
    assert (rows.query_lens.tolist(), rows.max_query_len) == ([4] * 4, 4)
    assert rows.tokens.tolist() == [0, 4, 8, 12]
    step.state.use(dataclasses.replace(DELTA, budget_tokens=128), step.state.plan)
    assert step.state.uniform_rows(common, torch.tensor([10] * 4)).kept_pages.tolist() == [8] * 4


@pytest.mark.parametrize(
    ("delta", "drafts", "support"),
    [
        ({}, None, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"policy": "quest"}, 3, AttentionCGSupport.NEVER),
        ({"recall_sample_steps": 50}, None, AttentionCGSupport.NEVER),
        ({}, 3, AttentionCGSupport.UNIFORM_BATCH),
        ({"recent_tokens": 16}, 3, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"lossless": True}, 7, AttentionCGSupport.UNIFORM_BATCH),
    ],
)
def test_what_graphs_hold(delta, drafts, support):
    vllm_config = vllm_config_of(delta, drafts)
    assert DeltaCUDAMetadataBuilder.get_cudagraph_support(vllm_config, None) is support


def vllm_config_of(delta, drafts, *, v2=True, device_type="cuda"):
    return SimpleNamespace(
        additional_config={"delta": delta},
        speculative_config=None if drafts is None else SimpleNamespace(num_speculative_tokens=drafts),
        device_config=SimpleNamespace(device_type=device_type),
        use_v2_model_runner=v2,
    )


@pytest.mark.parametrize(
    ("delta", "drafts", "options", "tokens"),
    [
        ({}, None, {}, 1),
        ({}, 3, {}, 4),
        ({}, 15, {}, 16),
        ({}, 16, {}, 1),
        ({}, 3, {"v2": False}, 1),
        ({}, 3, {"v2": False, "device_type": "cpu"}, 4),
        ({"recent_tokens": 32}, 15, {}, 16),
        ({"recent_tokens": 16}, 3, {}, 1),
        ({"recent_tokens": 4, "page_size": 1}, 3, {}, 4),
        ({"recent_tokens": 4, "page_size": 1}, 4, {}, 1),
        ({"lossless": True, "draft_tokens": 5}, 5, {}, 6),
    ],
)
def test_how_many_tokens_are_verified_together(delta, drafts, options, tokens):
    vllm_config = vllm_config_of(delta, drafts, **options)
    assert verified_tokens(settings_of(vllm_config), vllm_config) == tokens


@pytest.mark.parametrize("query_lens", [(4,) * 5, (4, 1, 3, 1, 4)])
def test_steps_that_verify_drafts(query_lens):
    """Rows of a token and its drafts: the pages of the first one, and all that came since."""
    lengths = (200, 0, 40, 150, 97)
    case = Case(lengths, kept_pages=KEPT, query_lens=query_lens, recent_pages=2, dtype=DTYPE)
    step = Step(case, settings(Budget(64, 32, 16, 16), "delta"), roles=ROLES)
    gpu = step.gpu
    step.state.make_schedules(step.metadata.launches, gpu.shape, 2)
    outputs = {index: step.decode(index) for index in (4, 5, 7, 8)}
    for row in case.real_rows:
        kept = gpu.pages()[row]
        for token in range(query_lens[row]):
            query, keys, values, sinks = row_tensors(step.batch, row, token)
            for index, output in outputs.items():
                position = torch.arange(keys.shape[1])
                mask = position <= lengths[row] - query_lens[row] + token
                if kept is not None and ROLES[index] is Role.SPARSE:
                    mask &= torch.isin(position // 16, kept)
                exact = weighted_sum(masked_probabilities(case, query, keys, sinks, mask), values)
                actual = output[int(gpu.rows.tokens[row]) + token].to(exact.device)
                torch.testing.assert_close(actual.double(), exact, atol=0.01, rtol=0.01)
    assert step.state.counters.as_dict()["layers"]["sparse"]["rows"] == 2 * sum(
        query_lens[row] for row in case.real_rows
    )


GIB = 1 << 30
TOTAL, FREE = 100 * GIB, 70 * GIB


@pytest.mark.parametrize(
    ("kv_cache_memory_bytes", "left"),
    [(None, 60 * GIB), (2 * GIB, 2 * GIB)],
    ids=["what the utilization leaves", "what is said to be the cache's"],
)
def test_logits_follow_the_memory_of_the_cache(monkeypatch, kv_cache_memory_bytes, left):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, TOTAL))
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1 << 20, dtype=torch.bfloat16),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes, gpu_memory_utilization=0.9),
    )
    impl = SimpleNamespace(num_heads=32, num_kv_heads=8, head_size=128, kv_cache_dtype="auto")
    tokens = _logit_tokens(config, [SimpleNamespace(impl=impl)], 1024, torch.device("cuda"))
    assert tokens * LOGIT_BYTES * 32 == pytest.approx(LOGITS_SHARE * left, rel=1e-3)


def test_prompts_of_either_runner_end_where_vllm_says():
    """V1 keeps a batch, V2 an array of all requests and which of them a batch has; a warm-up has none."""
    worker = DeltaWorkerMethods()
    worker.use_v2_model_runner = False
    lengths = torch.tensor([5, 7, 9])
    worker.model_runner = SimpleNamespace(input_batch=SimpleNamespace(num_prompt_tokens_cpu_tensor=lengths))
    common = SimpleNamespace(num_reqs=2, req_idx=np.array([2, 0]))
    assert worker._prompt_lens(common).tolist() == [5, 7]
    worker.use_v2_model_runner = True
    of_requests = SimpleNamespace(prompt_len=SimpleNamespace(np=lengths.numpy()))
    worker.model_runner = SimpleNamespace(req_states=of_requests)
    assert worker._prompt_lens(common).tolist() == [9, 5]
    assert worker._prompt_lens(SimpleNamespace(num_reqs=2, req_idx=None)) is None


@pytest.mark.parametrize(("sliding_window", "window"), [((-1, -1), None), ((69, 0), 70)])
def test_a_probe_attends_without_a_step(sliding_window, window):
    """In a layer of its own keys, and in one that shares them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2 * PERIOD, heads * 32, generator=generator) for heads in (4, 2, 2))
    probe = Probe({"layer 0"})
    impls = [object.__new__(DeltaCUDAImpl) for _ in range(2)]
    outputs = [torch.full_like(query, torch.nan) for _ in impls]
    for number, (impl, output) in enumerate(zip(impls, outputs, strict=True)):
        impl.probe, impl.layer_index, impl.head_size = probe, 3 + number, 32
        impl.scale, impl.logits_soft_cap, impl.sinks = 0.2, None, None
        impl.sliding_window, impl.kv_sharing_target_layer_name = sliding_window, "layer 0" if number else None
        layer = SimpleNamespace(layer_name=f"layer {number}")
        own = (key, value) if number == 0 else (None, None)
        DeltaCUDAImpl.forward(impl, layer, query, *own, None, None, output)
    heads = [part.view(2 * PERIOD, -1, 32) for part in (query, key, value)]
    expected, hits = causal_attention(*heads, AttentionParameters(0.2), window)
    for output in outputs:
        torch.testing.assert_close(output, expected.flatten(1))
    assert probe.hits.keys() == {3, 4}
    assert probe.shared.keys() == {"layer 0"}
    assert torch.equal(probe.hits[3], hits)


@pytest.mark.parametrize(
    ("sequences", "step_rows", "max_length", "page_size", "rows"),
    [
        pytest.param(1, 8192, 8192, 16, 512, id="one sequence has many rows when it is computed again"),
        pytest.param(1, 100, 100, 16, 100, id="steps have few rows"),
        pytest.param(600, 8192, 8192, 16, 600, id="many sequences"),
        pytest.param(4096, 8192, 8192, 16, 1024, id="more than a launch takes"),
        pytest.param(64, 8192, 1 << 24, 1, 2, id="page scores of few rows fill the memory"),
    ],
)
def test_rows_of_a_launch(sequences, step_rows, max_length, page_size, rows):
    assert launch_rows(sequences, step_rows, max_length, page_size) == rows


class StepBuilder:
    """DELTA's builder without vLLM's part, whose metadata is not read; a worker that verifies 3 drafts."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        own = {part.name for part in dataclasses.fields(DeltaCUDAMetadata)}
        inherited = own - set(DeltaCUDAMetadata.__annotations__)
        monkeypatch.setattr(
            FlashAttentionMetadataBuilder,
            "build",
            lambda self, prefix, common, fast_build=False: SimpleNamespace(
                **dict.fromkeys(inherited) | {"num_actual_tokens": common.num_actual_tokens}
            ),
        )
        step = Step(Case(LENGTHS, dtype=DTYPE), DELTA, roles=ROLES)
        self.state = step.state
        self.state.requests = torch.arange(len(LENGTHS), dtype=torch.int32, device=DEVICE)
        self.builder = object.__new__(DeltaCUDAMetadataBuilder)
        vars(self.builder).update(
            state=step.state,
            group=step.group,
            device=torch.device(DEVICE),
            _sliding=0,
            _not_eligible=0,
            _counted_plan=None,
            _full_layers=0,
            _most_full_rows=5,
        )

    def build(self, requests):
        """`requests`: (query length, sequence length, prompt length) each."""
        query_lens, lengths, prompts = (list(column) for column in zip(*requests, strict=True))
        starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
        lengths = torch.tensor(lengths, dtype=torch.int32)
        self.state.prompt_lens = lambda common: torch.tensor(prompts)
        common = Common(
            query_start_loc=starts.to(DEVICE),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(DEVICE),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(requests),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(query_lens),
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.zeros(len(requests), 20, dtype=torch.int32, device=DEVICE),
            slot_mapping=torch.arange(int(starts[-1]), device=DEVICE),
        )
        return self.builder.build(0, common)


@dataclasses.dataclass
class Common:
    """What the builder reads of vLLM's `CommonAttentionMetadata`."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor


def rows_in(metadata):
    found = []
    for launch in metadata.launches:
        rows = launch.rows
        query_lens = [1] * len(rows) if rows.query_lens is None else rows.query_lens.tolist()
        columns = rows.tokens, rows.requests, rows.lengths, rows.kept_pages
        found += zip(*(column.tolist() for column in columns), query_lens, strict=True)
    return found


def test_what_is_made_of_steps_with_drafts(monkeypatch):
    """Uniform steps are rows in buffers that graphs keep; others are split, prompts from drafts."""
    builder = StepBuilder(monkeypatch)
    of_drafts = builder.build([(4, 104, 50), (4, 24, 20), (4, 40, 60)])
    assert rows_in(of_drafts) == [(0, 0, 104, 4, 4), (4, 1, 24, 4, 4), (8, 2, 40, ALL_PAGES, 4)]
    (launch,) = of_drafts.launches
    assert launch.rows.kept_pages.data_ptr() == builder.state.kept_pages.data_ptr()
    assert launch.rows.query_lens.data_ptr() == builder.state.query_lens.data_ptr()
    assert not of_drafts.appends and not of_drafts.runs_full_layers and of_drafts.prefill is None

    mixed = builder.build([(4, 104, 50), (6, 6, 90), (2, 30, 20), (7, 27, 22)])
    assert rows_in(mixed) == [
        (0, 0, 104, 4, 4),
        (10, 2, 30, 4, 2),
        *((14 + index, 3, 23 + index, 4, 1) for index in range(5)),
    ]
    assert mixed.launches[0].rows.max_query_len == 4
    assert mixed.prefill.tokens.tolist() == [*range(4, 10), 12, 13]
    assert not mixed.appends

    single = builder.build([(1, 104, 50), (1, 20, 20)])
    assert rows_in(single) == [(0, 0, 104, 4, 1), (1, 1, 20, ALL_PAGES, 1)]
    assert single.appends and single.runs_full_layers

    builder.state.use(dataclasses.replace(DELTA, policy="quest"), builder.state.plan)
    alone = builder.build([(4, 104, 50), (4, 24, 20)])
    assert [row[2:] for row in rows_in(alone)] == [
        (length, 4, 1) for end in (104, 24) for length in range(end - 3, end + 1)
    ]
