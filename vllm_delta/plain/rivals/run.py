"""A layer's decode rows under a policy; the same code on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vllm_delta.method.counters import Counters
from vllm_delta.method.plan import SELF_SELECTING, Role
from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.plain.recall import kept_mass
from vllm_delta.plain.rivals.policy import Policy
from vllm_delta.plain.rows import Layer, RequestRows, RowIndex, together


@dataclass
class Chosen:
    """What the nearest earlier selection layer of a step chose."""

    #: masks of the rows that are computed together
    tokens: list[Tensor] = field(default_factory=list)
    #: the rows that it chose for
    rows: Sequence[RowIndex] = ()


def decode_rows(
    policy: Policy,
    role: Role,
    layer: Layer,
    rows: Sequence[RowIndex],
    chosen: Chosen,
    counters: Counters,
    output: Tensor,
    recall_layer: int | None = None,
) -> None:
    """Attention of decode rows at a selection layer or a sparse one.

    Args:
        policy: what chooses.
        role: selection layers attend to everything and choose for the sparse layers after them. Where every
            layer chooses for itself (`vllm_delta.method.plan.SELF_SELECTING`), all are sparse.
        layer: what the rows are read from.
        rows: of the step, in an order that is the same at every layer.
        chosen: written by selection layers, read by sparse ones.
        counters: to which rows, attended and context tokens, and dense rows of sparse layers are added.
        output: ``[tokens, H, D]``; the rows' tokens are written.
        recall_layer: index of a layer whose recall is measured, or None.

    Raises:
        RuntimeError: no selection layer has chosen for these rows.
    """
    rows = [index for index in rows if index.length]
    selects, self_selecting = role is Role.SELECTION, policy.config.policy in SELF_SELECTING
    if selects:
        chosen.tokens, chosen.rows = [], rows
    elif not self_selecting and chosen.rows != rows:
        raise RuntimeError("a sparse layer ran before any selection layer of the same step")
    attended = 0
    for number, part in enumerate(together(rows, layer.query.shape[1])):
        these = layer.rows(part)
        tokens = _choose(policy, these, part) if selects or self_selecting else chosen.tokens[number]
        if selects:
            chosen.tokens.append(tokens)
            tokens = these.visible
        output[[index.token for index in part]] = these.attend(tokens).to(output.dtype)
        attended += int(tokens[:, 0].sum())
        if not selects:
            dense = [_is_dense(policy, index) for index in part]
            attended += sum(
                policy.tokens_read_to_choose(index.length)
                for index, is_dense in zip(part, dense, strict=True)
                if not is_dense
            )
            of_prompts = sum(index.kept_pages == ALL_PAGES for index in part)
            counters.add_dense_rows("prefill", of_prompts)
            counters.add_dense_rows("within_budget", sum(dense) - of_prompts)
            if recall_layer is not None:
                mass = kept_mass(these, tokens)
                measured = [
                    float(share)
                    for share, index in zip(mass, part, strict=True)
                    if index.kept_pages != ALL_PAGES
                ]
                counters.add_recall(recall_layer, len(measured), sum(measured))
    counters.add_rows(role, len(rows), attended, sum(index.length for index in rows))


def _is_dense(policy: Policy, index: RowIndex) -> bool:
    return index.kept_pages == ALL_PAGES or index.length <= policy.config.budget_tokens


def _choose(policy: Policy, rows: RequestRows, indices: Sequence[RowIndex]) -> Tensor:
    """The policy's tokens of rows that exceed the budget, everything of the others."""
    sparse = rows.lengths.new_tensor([not _is_dense(policy, index) for index in indices]).bool()
    if bool(sparse.all()):
        return policy.choose(rows)
    if not bool(sparse.any()):
        return rows.visible
    tokens = policy.choose(rows.take(sparse))
    whole = rows.visible.expand(-1, tokens.shape[1], -1).clone()
    whole[sparse] = tokens
    return whole
