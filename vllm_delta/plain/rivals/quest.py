"""Quest: pages by a bound on their keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta.plain.rivals.policy import Policy, best_pages
from vllm_delta.plain.rows import RequestRows


@dataclass(frozen=True)
class Quest(Policy):
    """Quest (https://arxiv.org/abs/2406.10774): every layer chooses pages by an upper bound on q . k.

    Of each page of keys k, the elementwise minimum m and maximum M are known. For a query head q,

        ``bound(q, page) = sum over dimensions i of max(q[i] * m[i], q[i] * M[i])``

    is at least q . k for each of the page's keys. The pages with the highest bounds are attended to, as
    many as the budget has. The last page is always among them, as in the authors' kernels.

    The authors' experiments leave the first two layers dense: `full_layers`.

    Adapted:

    - The paper chooses for each head, with models that have a KV head for every query head. Where several
      query heads share a KV head, its pages are chosen by the maximum of their bounds, and all of them attend
      to these, so that the budget is what is read. (The authors' evaluation code repeats the keys for each
      query head, which may read as many times the budget as query heads share a KV head.)
    - The last `recent_tokens` and the first `sink_tokens` are kept within the budget, as in DELTA. The
      paper's setting is 0 for both.
    """

    def choose(self, rows: RequestRows) -> Tensor:
        """A set of pages for each KV head."""
        return best_pages(rows, self.bounds(rows), self.config, max(self.config.recent_pages, 1))

    def bounds(self, rows: RequestRows) -> Tensor:
        """The bound of each page, the maximum over a KV head's query heads, ``[R, KV, pages]``.

        Of a row's last page, which is kept whatever its bound, later rows' keys may be in it.
        """
        keys, page_size = rows.keys, self.config.page_size
        # The last page, where it is partial, is filled up with its last key, which changes nothing.
        keys = torch.cat([keys, keys[-1:].expand(-keys.shape[0] % page_size, -1, -1)])
        pages = keys.reshape(-1, page_size, *keys.shape[1:]).transpose(0, 2)  # [KV, page_size, pages, D]
        minima, maxima = pages.amin(1), pages.amax(1)
        queries = rows.by_kv_head(rows.queries)
        # max(q m, q M) is q M where q is positive, else q m.
        bounds = queries.clamp(min=0) @ maxima.mT + queries.clamp(max=0) @ minima.mT
        return bounds.amax(2)

    def tokens_read_to_choose(self, length: int) -> int:
        """A page's minima and maxima are as much as one token's key and value."""
        return -(-length // self.config.page_size)
