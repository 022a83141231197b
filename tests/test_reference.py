"""The reference against the definition, worked out by hand or with PyTorch's own attention."""

import pytest
import torch

from vllm_delta.method import reference
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import ALL_PAGES, DecodeRows, SelectionRule


def one_row(length, kept_pages=2):
    """A row of one request and one token."""
    return DecodeRows(*torch.tensor([[0], [0], [length], [kept_pages]], dtype=torch.int32))


def test_page_scores_by_hand():
    """Max over the heads, then sum over the page; the last page is partial."""
    probabilities = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.2], [0.1, 0.3, 0.2, 0.3, 0.1]])
    scores = reference.page_scores(probabilities, page_size=2)
    torch.testing.assert_close(scores, torch.tensor([0.8, 0.5, 0.2]))


@pytest.mark.parametrize(
    ("scores", "budget", "recent", "sink", "kept"),
    [
        ([9, 1, 5, 3, 0, 0], 3, 1, 1, [0, 2, 5]),
        ([1, 1, 1, 1, 1, 1], 4, 1, 1, [0, 1, 2, 5]),  # ties go to the lower index
        ([0, 9, 8, 7, 6, 5], 3, 1, 0, [1, 2, 5]),
        ([9, 9, 9, 0, 0, 0], 3, 2, 1, [0, 4, 5]),
        ([1, 2, 3], 3, 1, 1, [0, 1, 2]),  # fits the budget
        ([1, 2], 3, 1, 1, [0, 1]),
        ([1, 5, 3, 2], 2, 0, 0, [1, 2]),
        ([1, 5, 3, 2], ALL_PAGES, 1, 1, [0, 1, 2, 3]),
    ],
)
def test_select_pages_by_hand(scores, budget, recent, sink, kept):
    pages = reference.select_pages(torch.tensor(scores, dtype=torch.float64), budget, recent, sink)
    assert pages.tolist() == kept


def test_following_pages_stand_behind_the_kept_ones():
    scores = torch.tensor([1, 5, 3, 2], dtype=torch.float64)
    assert reference.select_pages(scores, 3, 1, 1, following_pages=2).tolist() == [0, 1, 3, 4, 5]
    assert reference.select_pages(scores, 4, 1, 1, following_pages=2).tolist() == [0, 1, 2, 3]


def test_kept_tokens_of_a_partial_page():
    assert reference.kept_tokens(torch.tensor([0, 2]), page_size=4, length=10).tolist() == [
        0, 1, 2, 3, 8, 9,
    ]  # fmt: skip


def test_full_attention_equals_pytorch():
    torch.manual_seed(0)
    heads, kv_heads, head_size, block_size, length = 6, 2, 16, 16, 70
    cache = torch.randn(9, kv_heads, block_size, 2 * head_size, dtype=torch.float64)
    table = torch.tensor([[7, 2, 5, 0, 8]])
    query = torch.randn(1, heads, head_size, dtype=torch.float64)
    output, _, _ = reference.selection_attention(
        query, cache, table, one_row(length), AttentionParameters(0.3), SelectionRule(16, 1, 1)
    )
    tokens = cache[table[0]].permute(1, 0, 2, 3).reshape(kv_heads, -1, 2 * head_size)[:, :length]
    keys, values = tokens.repeat_interleave(heads // kv_heads, dim=0).chunk(2, dim=-1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys, values, scale=0.3
    )
    torch.testing.assert_close(output, expected.transpose(0, 1))


def test_sparse_attention_equals_masked_attention():
    torch.manual_seed(1)
    cache = torch.randn(8, 2, 32, 32, dtype=torch.float64)
    query = torch.randn(1, 4, 16, dtype=torch.float64)
    table = torch.randperm(8)[None]
    pages = [torch.tensor([0, 3, 9])]
    rule, parameters = SelectionRule(16, 0, 0), AttentionParameters(0.25)
    output = reference.sparse_attention(query, cache, table, one_row(150), parameters, rule, pages)
    keys, values = reference.gather_sequence(cache, table[0], 150)
    mask = torch.zeros(150, dtype=torch.bool)
    mask[reference.kept_tokens(pages[0], 16, 150)] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.transpose(0, 1).repeat_interleave(2, dim=0),
        values.transpose(0, 1).repeat_interleave(2, dim=0),
        attn_mask=mask[None, None],
        scale=0.25,
    )
    torch.testing.assert_close(output, expected.transpose(0, 1))


def test_sinks_take_probability_away():
    query, keys = torch.zeros(2, 16), torch.zeros(3, 1, 16)
    parameters = AttentionParameters(1.0, sinks=torch.zeros(2))
    probabilities = reference.attention_probabilities(query, keys, parameters)
    torch.testing.assert_close(probabilities, torch.full((2, 3), 0.25))
