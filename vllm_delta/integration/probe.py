"""Attention of a worker's layers while a probe runs, without a KV cache, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_delta.method.attention import AttentionParameters
from vllm_delta.plain.probe import causal_attention


@dataclass
class Probe:
    """Attention of layers without a KV cache, and how often their heads hit."""

    #: names of the layers whose keys and values others read
    read_by_others: Set[str]
    #: by eligible layer, float32 ``[H]``: the sum over sequences
    hits: dict[int, Tensor] = field(default_factory=dict)
    #: keys and values of these
    shared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, impl: Any, layer: Any, query: Tensor, key: Tensor | None, value: Tensor | None, output: Tensor
    ) -> Tensor:
        """The attention of one sequence, as vLLM hands it to `impl`; written into `output`."""
        if impl.kv_sharing_target_layer_name is not None:
            key, value = self.shared[impl.kv_sharing_target_layer_name]
        assert key is not None and value is not None
        if layer.layer_name in self.read_by_others:
            self.shared[layer.layer_name] = key, value
        if query.dtype.itemsize == 1:  # quantised for an fp8 cache
            query = query.float() * layer._q_scale
        query, key, value = (part.view(len(query), -1, impl.head_size) for part in (query, key, value))
        parameters = AttentionParameters(impl.scale, float(impl.logits_soft_cap or 0), impl.sinks)
        attended, hits = causal_attention(query, key, value, parameters, window_of(impl))
        output.view_as(attended).copy_(attended)
        if impl.layer_index is not None:
            self.hits[impl.layer_index] = self.hits.get(impl.layer_index, 0) + hits
        return output


def window_of(impl: Any) -> int | None:
    """Tokens that a layer sees, in the ways of both platforms; None: all."""
    window = impl.sliding_window
    if isinstance(window, tuple):
        return None if window[0] < 0 else window[0] + 1
    return None if window < 0 else window
