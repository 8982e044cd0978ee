"""Values of the step before, kept for the patches that have not come yet (PipeFusion, arXiv 2405.14430, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def update_and_read(cache: torch.Tensor, fresh: torch.Tensor, dim: int,
                    spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """``cache`` with ``fresh`` written over the index ranges ``spans`` of dimension ``dim``, in their order.

    It is the cache itself: what is read from the result is read after the write, also where a compiler orders by
    dependence.
    """
    rows, (first, last) = len(spans), spans[0] if spans else (0, 0)
    period = cache.shape[dim] // max(rows, 1)
    if rows > 1 and last <= period and cache.shape[dim] % rows == 0 and all(
            span == (first + i * period, last + i * period) for i, span in enumerate(spans)):
        # The same columns of each row of a grid.
        grid = cache.unflatten(dim, (rows, period)).narrow(dim + 1, first, last - first)
        grid.copy_(fresh.unflatten(dim, (rows, last - first)))
        return cache
    at = 0
    for start, stop in spans:
        cache.narrow(dim, start, stop - start).copy_(fresh.narrow(dim, at, stop - start))
        at += stop - start
    return cache
