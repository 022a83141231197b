"""Plans of the two parts of a step, budgets that grow, and the choice between two ways to draft."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.drafts import DraftPlans, PageChoice, grown_budgets, most_choosing
from vllm_delta.method.payoff import ON_CPUS, ON_GPUS, DraftPayoff
from vllm_delta.method.plan import Role, make_plan
from vllm_delta.method.rows import ALL_PAGES
from vllm_delta.method.step import split_verification

ELIGIBLE = [0, 1, 3, 4, 6, 7]


def plans(**settings: object) -> DraftPlans:
    config = DeltaConfig(lossless=True, full_layers=1, selection_layers=(1, 6), **settings)
    plan = make_plan(config, ELIGIBLE, 8)
    assert len(DraftPlans.of(config, plan).choosing) <= most_choosing(config, plan)
    return DraftPlans.of(config, plan)


def test_every_layer_chooses_its_own_pages() -> None:
    own = plans(draft_pages="own", draft_full_layers=2)
    assert own.choosing == [3, 4, 6, 7]
    assert own.verify.layers(Role.FULL) == own.frozen.layers(Role.FULL) == [0, 1]
    assert own.frozen.layers(Role.SPARSE) == [3, 4, 6, 7]
    assert own.frozen.choosers == {layer: layer for layer in (3, 4, 6, 7)}
    assert own.fresh is None
    assert own.describe() == (
        "drafts: each sparse layer reads its own pages, 2 full layers; full attention verifies them"
    )


def test_selection_layers_choose_for_the_others() -> None:
    """Layers before the first one read its pages, too."""
    shared = plans(draft_pages="shared")
    assert shared.choosing == [1, 6]
    assert shared.verify.layers(Role.FULL) == [0, 3, 4, 7]
    assert shared.frozen.choosers == {0: 1, 1: 1, 3: 1, 4: 1, 6: 6, 7: 6}


def test_fresh_drafts_are_ordinary_decoding() -> None:
    fresh = plans(draft_pages="fresh")
    assert fresh.verify.layers(Role.FULL) == ELIGIBLE
    assert fresh.frozen is None
    assert fresh.draft(fresh=True).layers(Role.SELECTION) == [1, 6]
    both = plans(draft_pages="auto")
    assert both.draft(fresh=True) == fresh.fresh
    assert both.draft(fresh=False) == plans(draft_pages="own").frozen
    assert both.describe() == (
        "drafts: each sparse layer reads its own pages, or 1 full 0, 2 selection 1, 6, 3 sparse 3-4, 7 "
        "(selection layers from settings); full attention verifies them"
    )


def test_budgets_grow_by_the_pages_that_have_begun() -> None:
    chosen = torch.tensor([100, 100, 96, 0], dtype=torch.int32)
    lengths = torch.tensor([112, 113, 97, 50], dtype=torch.int32)
    assert grown_budgets(4, chosen, lengths, 16).tolist() == [4, 5, 5, ALL_PAGES]
    # Of a row whose last tokens were rejected, the last page may have gone.
    assert grown_budgets(4, torch.tensor([97]).int(), torch.tensor([96]).int(), 16).tolist() == [3]


def test_rows_of_a_verification() -> None:
    """Drafts together; the last token of a prompt, or of what is computed again; nothing in a prompt."""
    requests = [(8, 108, 50), (5, 50, 50), (30, 90, 50), (6, 20, 40), (1, 51, 50), (3, 53, 50)]
    starts = torch.tensor([0, 8, 13, 43, 49, 50, 53], dtype=torch.int32)
    lengths, prompts = (torch.tensor([request[index] for request in requests]).int() for index in (1, 2))
    step = split_verification(starts, lengths, prompts, torch.full((6,), 7).int(), 8)
    assert step.rows.requests.tolist() == [0, 1, 2, 4, 5]
    assert step.rows.tokens.tolist() == [0, 12, 42, 49, 50]
    assert step.rows.query_lens.tolist() == [8, 1, 1, 1, 3]
    assert step.rows.lengths.tolist() == [108, 50, 90, 51, 53]
    assert step.rows.max_query_len == 8
    assert step.prefill.requests.tolist() == [1, 2, 3]
    assert step.prefill.seq_lens.tolist() == [49, 89, 20]
    assert step.prefill.tokens.tolist() == [*range(8, 12), *range(13, 42), *range(43, 49)]


def test_choice_of_pages_follows_what_is_accepted() -> None:
    choice = PageChoice(draft_tokens=7)
    choice.observe(fresh=False, rows=64, accepted=64 * 6)
    assert not choice.fresh, "frozen pages do well"
    for _ in range(100):
        choice.observe(fresh=choice.fresh, rows=64, accepted=64 * (7 if choice.fresh else 1))
    assert choice.fresh, "frozen pages fail, fresh ones do well"
    tries = 0
    for _ in range(400):
        tries += not choice.fresh
        choice.observe(fresh=choice.fresh, rows=64, accepted=64 * (7 if choice.fresh else 1))
    assert 0 < tries < 20, "frozen pages are tried again, rarely"
    for _ in range(400):
        choice.observe(fresh=choice.fresh, rows=64, accepted=64 * 6)
    assert not choice.fresh, "frozen pages cost less"


def test_neither_way_does_well() -> None:
    """Where nothing is accepted, the cheaper one is used most of the time."""
    choice, fresh = PageChoice(draft_tokens=7), 0
    for _ in range(1000):
        fresh += choice.fresh
        choice.observe(fresh=choice.fresh, rows=16, accepted=0)
    assert fresh < 20


def test_drafts_pay_in_long_contexts() -> None:
    """A model of 7 billion parameters, whose weights take as long as 265,000 tokens of its cache."""
    payoff = DraftPayoff(draft_tokens=7, budget_tokens=2048, fixed_tokens=265_000, costs=ON_GPUS)
    assert payoff.pays([32768] * 24)
    assert payoff.pays([131072])
    assert not payoff.pays([2048] * 32), "all is within the budget"
    assert not payoff.pays([1024])
    assert dataclasses.replace(payoff, always=True).pays([1024])
    on_cpu = dataclasses.replace(payoff, costs=ON_CPUS)
    assert on_cpu.least_context() > 4 * payoff.least_context()
    least = payoff.least_context()
    assert payoff.pays([least]) and not payoff.pays([least - 100])


def test_drafts_that_are_not_accepted_do_not_pay() -> None:
    payoff = DraftPayoff(draft_tokens=7, budget_tokens=2048, fixed_tokens=265_000, costs=ON_GPUS)
    batch = [32768] * 24
    for _ in range(2000):
        payoff.observe(1)
    assert not payoff.pays(batch)
    steps = next(step for step in range(100_000) if payoff.pays(batch))
    assert 100 < steps < 10_000, "they are tried again"


@pytest.mark.parametrize(
    ("change", "inner"),
    [
        ({}, 8960),
        ({"intermediate_size": None}, 4 * 1536),
        ({"intermediate_size": [8960, None, 4480, 4480]}, 17920 / 3),
        ({"moe_intermediate_size": 768, "num_experts_per_tok": 8}, 768 * 8),
        ({"num_attention_heads": None}, 8960),
        ({"num_attention_heads": [12] * 28}, 8960),
    ],
    ids=str,
)
def test_fixed_cost_is_read_from_every_kind_of_model_config(change: dict[str, object], inner: float) -> None:
    """By hand: Qwen2.5-1.5B, 28 layers of 12 query and 2 key heads of 128, in 2 bytes."""
    from vllm_delta.integration.lossless import payoff_of

    sizes = {"num_attention_heads": 12, "intermediate_size": 8960, **change}
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(**sizes),
        dtype=torch.bfloat16,
        get_hidden_size=lambda: 1536,
        get_total_num_hidden_layers=lambda: 28,
        get_head_size=lambda: 128,
        get_total_num_kv_heads=lambda: 2,
        get_vocab_size=lambda: 151936,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device_type="cuda"),
        additional_config={"delta": {"lossless": True}},
    )
    weights = 28 * (1536 * 128 * 28 + 3 * 1536 * inner) + 1536 * 151936
    kv_token = 2 * 28 * 2 * 128
    assert payoff_of(config).fixed_tokens == pytest.approx(weights / kv_token)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossless": 1}, "delta.lossless must be true or false, not 1"),
        ({"draft_pages": "mine"}, "delta.draft_pages must be one of auto, own, shared, fresh, not 'mine'"),
        ({"draft_sampling": "beam"}, "delta.draft_sampling must be one of probabilistic, greedy, not 'beam'"),
        ({"draft_tokens": 16}, "delta.draft_tokens must be at most 15, not 16"),
        ({"draft_tokens": 0}, "delta.draft_tokens must be an integer of at least 1"),
        ({"lossless": True, "policy": "quest"}, "delta.policy does not go with delta.lossless"),
        ({"lossless": True, "recall_sample_steps": 5}, "delta.recall_sample_steps does not go with"),
        ({"lossless": True, "recent_tokens": 16}, r"delta.recent_tokens must be at least .* \(23\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DeltaConfigError, match=message):
        DeltaConfig.from_additional_config({"delta": settings})


# --- the kernels between passes ------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("frozen", [False, True])
def test_passes_begin_and_advance(frozen: bool) -> None:
    """Against the same in plain PyTorch: requests in their prompt, rejected drafts, the context's end."""
    from vllm_delta.kernels.gpu.drafts import DraftBuffers, advance_drafts, begin_drafts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    growth = {"most_length": 120, "budget_pages": 4, "page_size": 16, "frozen": frozen}
    buffers = DraftBuffers.allocate(200, 3, device)
    buffers.chosen_lengths[:5] = torch.tensor([100, 0, 64, 118, 97])
    verified = torch.tensor([100, 50, 64, 118, 97], dtype=torch.int32, device=device)
    slots = torch.tensor([7, 3, 0, 5, 2], device=device)
    sampled = torch.tensor([1, 0, 4, 1, 1], dtype=torch.int32, device=device)
    rejected = torch.tensor([3, 0, 0, 0, 2], dtype=torch.int32, device=device)
    last = torch.arange(10, 20, device=device)
    begin_drafts(buffers, last, slots, sampled, rejected, verified, **growth)
    lengths = [98, 0, 65, 119, 96]

    def check(tokens: list[int], lengths: list[int]) -> None:
        budgets = torch.full((5,), 4)
        if frozen:
            chosen = torch.tensor([100, 0, 64, 118, 97]).int()
            budgets = grown_budgets(4, chosen, torch.tensor(lengths).int(), 16)
        drafting = [0, 2, 3, 4]
        assert buffers.lengths.tolist()[:5] == lengths
        assert not buffers.lengths[5:].any()
        assert buffers.positions.tolist()[:5] == [max(0, length - 1) for length in lengths]
        assert [buffers.input_ids.tolist()[row] for row in drafting] == [tokens[row] for row in drafting]
        assert buffers.kept_pages[:5][drafting].tolist() == budgets[drafting].tolist()

    assert buffers.slots.tolist() == [7, -1, 0, 5, 2, *[-1] * 195]
    check([17, 0, 10, 15, 12], lengths)
    for step in range(3):
        tokens = [30 + step, 0, 40 + step, 50 + step, 60 + step]
        advance_drafts(buffers, torch.tensor(tokens, device=device), step, **growth)
        lengths = [min(length + 1, 120) if length else 0 for length in lengths]
        check(tokens, lengths)
    assert buffers.tokens[0].tolist() == [30, 31, 32]
    assert buffers.tokens[4].tolist() == [60, 61, 62]
