"""Merging attention over two sets of keys into attention over their union."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the same queries over the union of two disjoint sets of keys, exactly.

    With o = sum_j exp(s_j) v_j / exp(l) and l = log sum_j exp(s_j) over each set, the union has

        l = log(exp(l_a) + exp(l_b)),    o = exp(l_a - l) o_a + exp(l_b - l) o_b,

    which is the online softmax of FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1.1, algorithm 1)
    taken between devices as in Ring Attention (Liu et al. 2023, arXiv:2310.01889, section 3). It is plain
    tensor code, so that it can be traced into a graph.

    Args:
        out_a, out_b: (B, H, Sq, Dv), each of any floating dtype.
        lse_a, lse_b: (B, H, Sq), float32; -inf with out 0 where the set has no key for the row.

    Returns:
        out (B, H, Sq, Dv) in float32, to be merged again without rounding, and lse (B, H, Sq); where neither
        set has a key these are 0 and -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # exp(l_b - l) is sigmoid(l_b - l_a), which unlike it does not suffer from the rounding of a large l. In a
    # row without keys the difference is -inf - -inf = NaN, and any weight is right for its two zero outputs.
    weight_b = torch.sigmoid(lse_b - lse_a).masked_fill(lse == -math.inf, 0.0)
    # The weights sum to 1, so the sum is an interpolation: one pass over the outputs.
    return torch.lerp(out_a.float(), out_b.float(), weight_b.unsqueeze(-1)), lse
