"""What the layers of one GPU worker share.

The buffers are allocated in vLLM's profiling run, when it measures what is left for the KV cache, and keep
their addresses, which CUDA graphs hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_delta.integration.cuda.metadata import DeltaCUDAMetadata, Launch, LayerGroup
from vllm_delta.integration.layers import LocalLayers, find_state, local_layers
from vllm_delta.integration.settings import settings_of
from vllm_delta.integration.speculation import verified_tokens
from vllm_delta.integration.worker_state import Drafting, WorkerState, WrittenTable
from vllm_delta.kernels.gpu.device import SideStream
from vllm_delta.kernels.gpu.drafts import DraftBuffers
from vllm_delta.kernels.gpu.l2 import set_aside_l2
from vllm_delta.kernels.gpu.schedule import Schedule, make_schedule
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.kernels.gpu.workspace import LOGIT_BYTES, Workspace, launch_rows
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.counters import Counters
from vllm_delta.method.drafts import DraftPlans, PageChoice, most_choosing
from vllm_delta.method.plan import Plan, Role
from vllm_delta.method.rows import ALL_PAGES, DecodeRows
from vllm_delta.plain.rows import row_indices

logger = init_logger(f"vllm.{__name__}")

#: The logits of selection layers take at most this share of the memory that is left for the KV cache.
LOGITS_SHARE = 0.008


@dataclass
class CUDADrafting(Drafting):
    """What lossless speculation adds to a GPU worker; rows are requests, in the batch's order."""

    buffers: DraftBuffers

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return super().nbytes + self.buffers.nbytes


@dataclass(kw_only=True)
class CUDAState(WorkerState[LayerGroup]):
    """One per worker, with the kernels' buffers and those of uniform steps.

    These have one row of each request: of a token, or of as many as a request has where drafts are verified.
    """

    #: bytes of an element as the kernels compute it
    itemsize: int
    #: None where this worker has no layer that may be sparse
    workspace: Workspace | None
    #: int32: 0, 1, 2, ...: the requests of a uniform step's rows
    requests: Tensor
    #: int32: their budgets in pages
    kept_pages: Tensor
    #: int32: query tokens of the rows of a step that verifies drafts of all requests
    query_lens: Tensor
    #: by layer shape, one for each launch of a step
    schedules: dict[LayerShape, list[Schedule]]
    drafting: CUDADrafting | None = None
    #: where selection layers choose pages, while the model goes on; None without a GPU
    side: SideStream | None = None
    _marked: bool = field(default=False)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that DELTA holds."""
        schedules = sum(schedule.nbytes for of_shape in self.schedules.values() for schedule in of_shape)
        workspace = 0 if self.workspace is None else self.workspace.nbytes
        uniform = self.requests.nbytes + self.kept_pages.nbytes + self.query_lens.nbytes
        return super().nbytes + workspace + schedules + uniform

    def use(self, config: DeltaConfig, plan: Plan) -> None:
        """As for any worker; the budget of uniform steps follows."""
        super().use(config, plan)
        self.kept_pages.fill_(config.budget_pages)

    def renew(self, metadata: DeltaCUDAMetadata) -> None:
        """As for any worker; rows have the budget of now, and schedules are the worker's own."""
        super().renew(metadata)
        shape, launched = metadata.group.shape, [launch.rows for launch in metadata.launches]
        assert shape is not None
        for rows in launched:
            rows.kept_pages.fill_(self.config.budget_pages)
        metadata.launches = [Launch(rows, self.schedule(shape, index)) for index, rows in enumerate(launched)]
        needs_rows = self.aside.is_needed(self.config)
        metadata.row_indices = [row for rows in launched for row in row_indices(rows)] if needs_rows else []

    def uniform_rows(self, common: CommonAttentionMetadata, prompt_lens: Tensor) -> DecodeRows:
        """One row per request, of all its tokens, in buffers whose addresses a graph may keep."""
        self._mark_prompt_rows(prompt_lens, common)
        if common.max_query_len == 1:
            return self._row_of_each(common, self.kept_pages)
        return self.verification_rows(common)

    def verification_rows(self, common: CommonAttentionMetadata) -> DecodeRows:
        """The same, of a step in which requests have `max_query_len` tokens, all behind their prompts."""
        return replace(
            self._row_of_each(common, self.kept_pages),
            query_lens=self.query_lens[: common.num_reqs],
            max_query_len=self.max_query_len,
        )

    def draft_rows(self, common: CommonAttentionMetadata) -> DecodeRows:
        """One row per request, of the token that is drafted from, in such buffers."""
        assert self.drafting is not None
        return self._row_of_each(common, self.drafting.buffers.kept_pages)

    def _row_of_each(self, common: CommonAttentionMetadata, kept_pages: Tensor) -> DecodeRows:
        count = common.num_reqs
        return DecodeRows(
            tokens=common.query_start_loc[:count],
            requests=self.requests[:count],
            lengths=common.seq_lens[:count],
            kept_pages=kept_pages[:count],
        )

    def _mark_prompt_rows(self, prompt_lens: Tensor, common: CommonAttentionMetadata) -> None:
        """Let rows that begin in a prompt attend to everything."""
        # In NumPy, whose calls take a fraction of PyTorch's: every step of a server waits for this.
        count = len(prompt_lens)
        lengths = common.seq_lens_cpu_upper_bound[:count].numpy()
        marks = (lengths < prompt_lens.numpy() + common.max_query_len) & (lengths > 0)
        budget_pages = self.config.budget_pages
        if not marks.any():
            if self._marked:
                self.kept_pages.fill_(budget_pages)
                self._marked = False
            return
        self.kept_pages.fill_(budget_pages)
        kept_pages = torch.full((count,), budget_pages, dtype=torch.int32)
        kept_pages[torch.from_numpy(marks)] = ALL_PAGES
        self.kept_pages[:count].copy_(kept_pages.pin_memory(), non_blocking=True)
        self._marked = True

    def cut(self, rows: DecodeRows, shape: LayerShape) -> list[Launch]:
        """Rows in launches, each with its schedule, which is not made yet."""
        assert self.workspace is not None
        most = self.workspace.max_rows
        return [
            Launch(rows[begin : min(begin + most, len(rows))], self.schedule(shape, index))
            for index, begin in enumerate(range(0, len(rows), most))
        ]

    def schedule(self, shape: LayerShape, index: int) -> Schedule:
        """The schedule of a step's launch; those of uniform steps are allocated from the start."""
        assert self.workspace is not None
        of_shape = self.schedules[shape]
        while len(of_shape) <= index:
            of_shape.append(
                Schedule.allocate(self.workspace.max_rows, shape.num_kv_heads, self.requests.device)
            )
        return of_shape[index]

    def make_schedules(self, launches: list[Launch], shape: LayerShape, full_layers: int) -> None:
        """Cut a step's rows into splits, for all layers of a group; `full_layers` run elsewhere."""
        assert self.workspace is not None
        for launch in launches:
            make_schedule(
                launch.schedule,
                launch.rows,
                shape,
                self.itemsize,
                self.workspace,
                self.rule,
                self.counters.of(Role.FULL),
                full_layers,
            )


def set_up(vllm_config: VllmConfig, device: torch.device) -> CUDAState:
    """The worker's state; made, and handed to all its layers, by whoever asks first."""
    state = find_state(vllm_config)
    if state is not None:
        assert isinstance(state, CUDAState)
        return state
    config = settings_of(vllm_config)
    layers = local_layers(config, vllm_config)
    with torch.inference_mode(False):  # else steps could not write into what a profiling run allocates
        state = _allocate(vllm_config, config, layers, device)
    layers.share(state)
    if device.type == "cuda" and layers.eligible:
        logger.info("DELTA: %d bytes of the L2 cache set aside for logits", set_aside_l2(device))
    return state


def _allocate(
    vllm_config: VllmConfig, config: DeltaConfig, layers: LocalLayers, device: torch.device
) -> CUDAState:
    eligible = list(layers.eligible.values())
    shapes = {layer_shape(layer.impl) for layer in eligible}
    scheduler = vllm_config.scheduler_config
    max_length = vllm_config.model_config.max_model_len
    graph_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    uniform_rows = max(scheduler.max_num_seqs, graph_rows)
    # Every token of a step may be a decode row, but a sequence has no more than it may have.
    step_rows = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_length)
    query_len = verified_tokens(config, vllm_config)
    if config.lossless:  # rows are requests
        step_rows = uniform_rows
    max_rows = launch_rows(uniform_rows, step_rows, max_length, config.page_size)
    workspace = None
    if shapes:
        workspace = Workspace.allocate(
            shapes,
            max_rows=max_rows,
            max_length=max_length,
            page_size=config.page_size,
            logit_tokens=_logit_tokens(vllm_config, eligible, max_rows, device),
            device=device,
            max_query_len=1 if config.lossless and not config.freezes_pages else query_len,
        )
    state = CUDAState(
        config=config,
        plan=layers.plan,
        counters=Counters(device),
        itemsize=vllm_config.model_config.dtype.itemsize,
        workspace=workspace,
        requests=torch.arange(uniform_rows, dtype=torch.int32, device=device),
        kept_pages=torch.full((uniform_rows,), config.budget_pages, dtype=torch.int32, device=device),
        query_lens=torch.full((uniform_rows,), query_len, dtype=torch.int32, device=device),
        max_query_len=query_len,
        schedules={shape: [] for shape in shapes},
        side=SideStream(device) if device.type == "cuda" else None,
        table=None,
    )
    most_pages = config.most_kept_pages(max_length)
    if config.lossless:
        state.drafting = _allocate_drafts(config, layers.plan, uniform_rows, most_pages, device)
    if shapes and config.refreshes_pages:
        table = SelectionTable.allocate(max(uniform_rows, step_rows), most_pages, device, frames=True)
        state.table = WrittenTable(table)
    for shape in shapes:
        state.schedule(shape, math.ceil(uniform_rows / max_rows) - 1)
    return state


def _allocate_drafts(
    config: DeltaConfig, plan: Plan, rows: int, most_pages: int, device: torch.device
) -> CUDADrafting:
    tables: list[WrittenTable[LayerGroup]] = [
        WrittenTable(SelectionTable.allocate(rows, most_pages, device, frames=True))
        for _ in range(most_choosing(config, plan))
    ]
    return CUDADrafting(
        DraftPlans.of(config, plan),
        tables,
        PageChoice(config.draft_tokens),
        buffers=DraftBuffers.allocate(rows, config.draft_tokens, device),
    )


def layer_shape(impl: Any) -> LayerShape:
    """The shape of the layer whose attention `impl` is."""
    quantized = is_quantized_kv_cache(impl.kv_cache_dtype)
    return LayerShape(impl.num_heads, impl.num_kv_heads, impl.head_size, quantized)


def _logit_tokens(
    vllm_config: VllmConfig, layers: list[Attention], max_rows: int, device: torch.device
) -> int:
    """Tokens of a launch whose logits are kept.

    All that the KV cache will hold, if `LOGITS_SHARE` of the memory left for it suffices. Sequences that
    share a prefix may be longer together; `vllm_delta.kernels.gpu.scores` reads the keys of what has no room
    again.
    """
    most: int = max_rows * vllm_config.model_config.max_model_len
    if device.type != "cuda":
        return most
    left: int | None = vllm_config.cache_config.kv_cache_memory_bytes
    if left is None:
        free, total = torch.cuda.mem_get_info(device)
        left = max(0, free - int((1 - vllm_config.cache_config.gpu_memory_utilization) * total))
    shapes = [layer_shape(layer.impl) for layer in layers]
    itemsize = vllm_config.model_config.dtype.itemsize
    token_bytes = sum(
        2 * shape.num_kv_heads * shape.head_size * (1 if shape.quantized else itemsize) for shape in shapes
    )
    logit_bytes = LOGIT_BYTES * max(shape.padded_heads for shape in shapes)
    return min(most, left // token_bytes, int(left * LOGITS_SHARE / logit_bytes))
