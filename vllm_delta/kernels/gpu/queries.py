"""The query tokens of a row: in which order they come, what they see, and loading their queries.

A row of q query tokens that ends at token n has them at n - q to n - 1 (`DecodeRows`). The j-th sees n - (q -
1 - j) tokens, and so one less for each token behind it: of a row's kept tokens, too, as all that not every
query token sees lies in the row's recent pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: In place of the largest logit of tokens that are all unseen: finite, and less than any logit.
LOWEST_LOGIT = tl.constexpr(-1e30)


@triton.jit
def ordered_token(index, query_len):
    """Query tokens of a row in the order of programs, the one that chooses its pages before all others.

    It is the first. ``query_len - 1 - index`` would let the last one choose.
    """
    return index


@triton.jit
def seen_tokens(total, query_len, query_token):
    """Tokens that a query token of a row sees, where the last one sees `total`."""
    return total - (query_len - 1 - query_token)


@triton.jit
def all_seen_tokens(total, query_len):
    """The same, summed up over the row's query tokens."""
    return query_len * total - query_len * (query_len - 1) // 2


@triton.jit
def load_queries(query_row_ptr, offset, has_head, dim, has_dim):
    """The queries at these offsets from the row's first, ``[D_PAD, columns]``, zero where there is none."""
    return tl.load(
        query_row_ptr + offset[None, :] + dim[:, None],
        mask=has_head[None, :] & has_dim[:, None],
        other=0.0,
    )
