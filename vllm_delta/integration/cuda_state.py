"""What the layers of one GPU worker share: plan, selection table, workspace, counters.

The buffers are allocated in vLLM's profiling run, when it measures what is left for the KV cache, and keep
their addresses, which CUDA graphs hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_delta.config import DeltaConfig
from vllm_delta.counters import Counters
from vllm_delta.gpu import ops
from vllm_delta.gpu.l2 import set_aside_l2
from vllm_delta.integration.layers import LocalLayers, find_state, local_layers
from vllm_delta.plan import Plan, Role
from vllm_delta.policies.rows import Layer, RowIndex
from vllm_delta.policies.run import Chosen
from vllm_delta.recall import RecallSampler

logger = init_logger(f"vllm.{__name__}")

#: The logits of selection layers take at most this share of the memory that is left for the KV cache.
LOGITS_SHARE = 0.008


@dataclass
class CudaState:
    """One per worker. Layers run one after another, so one table and one workspace serve them all."""

    config: DeltaConfig
    plan: Plan
    selection: ops.Selection
    workspace: ops.Workspace
    counters: Counters
    #: of all rows of a step
    table: ops.SelectionTable
    #: int32: 0, 1, 2, ...
    requests: Tensor
    #: int32: 1 for rows of single-token steps that belong to a prompt
    dense: Tensor
    #: by layer shape, one for each chunk of a step
    schedules: dict[ops.LayerShape, list[ops.Schedule]]
    #: where selection layers choose pages, while the model goes on; None without a GPU
    side: ops.SideStream | None = None
    #: tokens of each prompt of a batch, int ``[requests]``, or None if unknown; set by DELTA's worker
    prompt_lens: Callable[[CommonAttentionMetadata], Tensor | None] | None = None
    #: whose layers' block table the selection table's page frames are of
    table_group: object = None
    #: what selection layers chose, under policies other than DELTA
    chosen: Chosen = field(default_factory=Chosen)
    recall: RecallSampler = field(default_factory=RecallSampler)
    #: is shown what selection layers attend to; set by a calibration
    observer: Callable[[int, Layer, Sequence[RowIndex]], None] | None = None
    #: first layer of the KV cache group whose builder counts the steps for it
    step_layer: str | None = None
    _marked: bool = field(default=False)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that DELTA holds."""
        schedules = sum(schedule.nbytes for group in self.schedules.values() for schedule in group)
        tensors = self.table.nbytes + self.requests.nbytes + self.dense.nbytes
        return self.workspace.nbytes + schedules + tensors

    def schedule(self, shape: ops.LayerShape, index: int) -> ops.Schedule:
        """The schedule of a step's chunk; those of single-token steps are allocated from the start."""
        group = self.schedules[shape]
        while len(group) <= index:
            group.append(
                ops.Schedule.allocate(self.workspace.max_rows, shape.num_kv_heads, self.requests.device)
            )
        return group[index]

    def mark_prompt_rows(self, prompt_lens: Tensor, common: CommonAttentionMetadata) -> None:
        """Mark the rows of a single-token step that are the last token of a prompt: they attend in full."""
        # In NumPy, whose calls take a fraction of PyTorch's: every step of a server waits for this.
        count = len(prompt_lens)
        lengths = common.seq_lens_cpu_upper_bound[:count].numpy()
        marks = (lengths <= prompt_lens.numpy()) & (lengths > 0)
        if not marks.any():
            if self._marked:
                self.dense.zero_()
                self._marked = False
            return
        self.dense.zero_()
        self.dense[:count].copy_(torch.from_numpy(marks).int().pin_memory(), non_blocking=True)
        self._marked = True


def set_up(vllm_config: VllmConfig, device: torch.device) -> CudaState:
    """The worker's state; made, and handed to all its layers, by whoever asks first."""
    state: CudaState | None = find_state(vllm_config)
    if state is not None:
        return state
    from vllm_delta.integration.cuda import DeltaCUDAImpl

    config = DeltaConfig.from_additional_config(vllm_config.additional_config)
    layers = local_layers(config, vllm_config, DeltaCUDAImpl)
    with torch.inference_mode(False):  # else steps could not write into what a profiling run allocates
        state = _allocate(vllm_config, config, layers, device)
    layers.share(state)
    if device.type == "cuda":
        logger.info("DELTA: %d bytes of the L2 cache set aside for logits", set_aside_l2(device))
    _tell_order(layers)
    return state


def _tell_order(layers: LocalLayers) -> None:
    """Tell each layer whether the next one will wait for the pages that it chooses."""
    for index, following in pairwise(sorted(layers.eligible)):
        layers.eligible[index].impl.precedes_sparse = layers.plan.roles.get(following) is Role.SPARSE


def _allocate(
    vllm_config: VllmConfig, config: DeltaConfig, layers: LocalLayers, device: torch.device
) -> CudaState:
    eligible = list(layers.eligible.values())
    shapes = {layer_shape(layer.impl) for layer in eligible}
    scheduler = vllm_config.scheduler_config
    max_length = vllm_config.model_config.max_model_len
    graph_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    single_token_rows = max(scheduler.max_num_seqs, graph_rows)
    max_rows = ops.chunk_rows(single_token_rows, max_length, config.page_size)
    state = CudaState(
        config=config,
        plan=layers.plan,
        selection=ops.Selection(
            config.page_size, config.budget_tokens, config.recent_tokens, config.sink_tokens
        ),
        workspace=ops.Workspace.allocate(
            shapes,
            max_rows=max_rows,
            max_length=max_length,
            page_size=config.page_size,
            logit_tokens=_logit_tokens(vllm_config, eligible, max_rows, device),
            device=device,
        ),
        counters=Counters(device),
        table=ops.SelectionTable.allocate(
            max(single_token_rows, scheduler.max_num_batched_tokens), config.budget_pages, device
        ),
        requests=torch.arange(single_token_rows, dtype=torch.int32, device=device),
        dense=torch.zeros(single_token_rows, dtype=torch.int32, device=device),
        schedules={shape: [] for shape in shapes},
        side=ops.SideStream(device) if device.type == "cuda" else None,
    )
    for shape in shapes:
        state.schedule(shape, math.ceil(single_token_rows / max_rows) - 1)
    return state


def layer_shape(impl: Any) -> ops.LayerShape:
    """The shape of the layer whose attention `impl` is."""
    quantized = is_quantized_kv_cache(impl.kv_cache_dtype)
    return ops.LayerShape(impl.num_heads, impl.num_kv_heads, impl.head_size, quantized)


def _logit_tokens(
    vllm_config: VllmConfig, layers: list[Attention], max_rows: int, device: torch.device
) -> int:
    """Tokens of a chunk whose logits are kept.

    All that the KV cache will hold, if `LOGITS_SHARE` of the memory left for it suffices. Sequences that
    share a prefix may be longer together; `vllm_delta.gpu.scores` reads the keys of what has no room again.
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
    logit_bytes = ops.LOGIT_BYTES * max(shape.padded_heads for shape in shapes)
    return min(most, left // token_bytes, int(left * LOGITS_SHARE / logit_bytes))
