"""Other methods of sparse decoding in the same engine, to compare DELTA with: right, not fast.

A policy says which tokens a layer attends to. Everything else is DELTA's: the same full layers, dense
prompts, sequences that fit the budget kept whole, budgets in tokens, counters. What differs between two runs
is the choice of tokens.

One file per method: `quest`, `lessismore`, `streaming`, `tidal`, `oracle`. They know tensors and the
settings, not vLLM. `rows` are query tokens of one request at one layer in plain PyTorch, `run` computes those
of a step.
"""

from __future__ import annotations

from vllm_delta.method.config import DeltaConfig
from vllm_delta.plain.rivals.lessismore import LessIsMore
from vllm_delta.plain.rivals.oracle import Oracle
from vllm_delta.plain.rivals.policy import Policy
from vllm_delta.plain.rivals.quest import Quest
from vllm_delta.plain.rivals.streaming import Streaming
from vllm_delta.plain.rivals.tidal import Tidal

#: By the name in the settings. DELTA itself is not among them: the kernels compute it.
COMPARISONS: dict[str, type[Policy]] = {
    "quest": Quest,
    "lessismore": LessIsMore,
    "streaming": Streaming,
    "tidal": Tidal,
    "oracle": Oracle,
}


def make_policy(config: DeltaConfig) -> Policy:
    """The policy that the settings name, which is not "delta"."""
    return COMPARISONS[config.policy](config)


__all__ = ["COMPARISONS", "Policy", "make_policy"]
