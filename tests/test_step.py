"""Splitting a batch into decode rows and prefill tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_delta.method.rows import DecodeRows
from vllm_delta.method.step import split_step


def split(requests, most=1):
    """`requests`: (query length, sequence length, prompt length) each."""
    query_lens = [query for query, _, _ in requests]
    return split_step(
        torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
        torch.tensor([length for _, length, _ in requests], dtype=torch.int32),
        torch.tensor([prompt for _, _, prompt in requests], dtype=torch.int32),
        torch.arange(len(requests), dtype=torch.int32) + 100,
        most,
    )


def rows_of(step):
    rows = step.rows
    assert rows.kept_pages.tolist() == (rows.requests + 100).tolist()
    return list(zip(rows.tokens.tolist(), rows.requests.tolist(), rows.lengths.tolist(), strict=True))


def test_decode_only():
    step = split([(1, 11, 10), (1, 500, 20)])
    assert rows_of(step) == [(0, 0, 11), (1, 1, 500)]
    assert step.prefill is None
    assert step.num_prefill_tokens == 0


def test_prefill_only():
    step = split([(8, 8, 8), (4, 20, 30)])
    assert step.rows is None
    assert step.prefill is None
    assert step.num_prefill_tokens == 12


def test_last_prompt_token_alone_is_prefill():
    """After a prefix hit one token of the prompt may be left: a query of length 1 that is no decode."""
    step = split([(1, 10, 10)])
    assert step.rows is None
    assert step.num_prefill_tokens == 1


def test_mixed():
    step = split([(1, 40, 30), (3, 3, 5), (1, 9, 8), (2, 12, 12)])
    assert rows_of(step) == [(0, 0, 40), (4, 2, 9)]
    prefill = step.prefill
    assert prefill.tokens.tolist() == [1, 2, 3, 5, 6]
    assert prefill.requests.tolist() == [1, 3]
    assert prefill.query_start_loc.tolist() == [0, 3, 5]
    assert prefill.seq_lens.tolist() == [3, 12]
    assert (prefill.max_query_len, prefill.max_seq_len) == (3, 12)


def test_recomputed_tokens_become_rows():
    """A preempted request: the rest of its prompt is prefill, its generated tokens are rows again."""
    step = split([(6, 13, 10)])
    assert step.prefill.tokens.tolist() == [0, 1, 2]
    assert step.prefill.seq_lens.tolist() == [10]
    assert rows_of(step) == [(3, 0, 11), (4, 0, 12), (5, 0, 13)]


def test_a_token_and_its_drafts_are_one_row():
    """Behind a prompt, if they are no more than a row has; what is computed again is not."""
    step = split([(4, 24, 10), (2, 32, 30), (0, 0, 0), (5, 25, 10), (3, 11, 10), (4, 10, 10)], most=4)
    rows = step.rows
    assert rows_of(step) == [
        (0, 0, 24),
        (4, 1, 32),
        *((6 + index, 3, 21 + index) for index in range(5)),
        (13, 4, 11),
    ]
    assert rows.query_lens.tolist() == [4, 2, *[1] * 5, 1]
    assert rows.max_query_len == 4
    assert step.prefill.requests.tolist() == [4, 5]
    assert step.prefill.tokens.tolist() == [11, 12, *range(14, 18)]
    pages = torch.full_like(rows.kept_pages, 2)
    within = DecodeRows(rows.tokens, rows.requests, rows.lengths, pages, rows.query_lens, 4)
    assert within.num_within_budget(12) == 4 + 4 + 1, "query tokens, up to 24"


def test_padding_requests_are_left_out():
    step = split([(1, 5, 4), (0, 0, 0)])
    assert rows_of(step) == [(0, 0, 5)]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=6))
def test_every_token_goes_to_one_side(requests):
    requests = [(query, query + computed, prompt) for query, computed, prompt in requests]
    step = split(requests)
    expected, token = {}, 0
    for request, (query, length, prompt) in enumerate(requests):
        for position in range(length - query, length):
            expected[token] = (request, position, position >= prompt)
            token += 1
    decoded = {} if step.rows is None else {t: (r, n - 1, True) for t, r, n in rows_of(step)}
    assert decoded == {token: entry for token, entry in expected.items() if entry[2]}
    assert step.num_prefill_tokens == len(expected) - len(decoded)
    if step.prefill is not None:
        tokens = step.prefill.tokens.tolist()
        assert tokens == [token for token, entry in expected.items() if not entry[2]]
        starts = step.prefill.query_start_loc.tolist()
        for i, request in enumerate(step.prefill.requests.tolist()):
            own = tokens[starts[i] : starts[i + 1]]
            assert [expected[token][0] for token in own] == [request] * len(own)
            assert step.prefill.seq_lens[i] == expected[own[-1]][1] + 1
