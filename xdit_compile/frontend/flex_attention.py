"""``flex_attention`` as what it means: attention with a mask, or softmax of modified scores.

As PyTorch's own eager kernel computes it (``math_attention``): the functions of (batch, head, query, key) are
evaluated for all of them, and blocks of a block mask only say where not to look, which is no matter of meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx

FLEX = torch.ops.higher_order.flex_attention


def lifted(function: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of the operator, and the tensors that it closes over, which the result takes after its own arguments:
    the operator knows of no others."""
    cells = [cell for cell in _cells(function, set()) if isinstance(cell.cell_contents, Tensor)]

    def call(*args: Any) -> Any:
        own, given = args[: len(args) - len(cells)], args[len(args) - len(cells) :]
        before = [cell.cell_contents for cell in cells]
        try:
            for cell, tensor in zip(cells, given, strict=True):
                cell.cell_contents = tensor
            return function(*own)
        finally:
            for cell, tensor in zip(cells, before, strict=True):
                cell.cell_contents = tensor

    return (call, tuple(cell.cell_contents for cell in cells)) if cells else (function, ())


def _cells(function: Any, seen: set[int]) -> Iterator[CellType]:
    """The variables that a function closes over, and those of functions among them, that have a value."""
    if isinstance(function, partial):
        for inner in (function.func, *function.args, *function.keywords.values()):
            yield from _cells(inner, seen)
    elif isinstance(function, MethodType):
        yield from _cells(function.__func__, seen)
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not yet
                continue
            if id(cell) not in seen:
                seen.add(id(cell))
                yield cell
                yield from _cells(held, seen)


def is_plain(score_mod: fx.GraphModule) -> bool:
    """Whether it returns the scores as they are."""
    (result,), (score, *_) = score_mod.graph.output_node().all_input_nodes, score_mod.graph.nodes
    return result is score


def is_open(mask_mod: fx.GraphModule) -> bool:
    """Whether it hides nothing: it makes ones and looks at no index."""
    made = [n for n in mask_mod.graph.nodes if n.op == "call_function"]
    return all(n.target in (torch.ops.aten.new_ones.default, torch.ops.aten.ones.default) for n in made) and bool(made)


def dense_mask(mask_mod: fx.GraphModule, q: Tensor, k: Tensor, *buffers: Tensor) -> Tensor:
    """Where q (B, H, M, D) may look at k (B, h, N, D): boolean, (B, H, M, N) or ones where all are alike."""
    return _over(mask_mod, (*q.shape[:3], k.shape[2]), q.device, buffers)


def modified_attention(score_mod: fx.GraphModule, mask_mod: fx.GraphModule, scale: float, split: int, q: Tensor,
                       k: Tensor, v: Tensor, *buffers: Tensor) -> Tensor:
    """Attention with modified scores, in full: no attention kernel takes any function. The first ``split`` of the
    buffers are read by ``score_mod``, the others by ``mask_mod``."""
    hidden = ~dense_mask(mask_mod, q, k, *buffers[split:])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.float().transpose(-2, -1)) * scale
    scores = _over(score_mod, scores.shape, q.device, buffers[:split], scores)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype) @ v


def _over(function: fx.GraphModule, shape: Sequence[int], device: torch.device, buffers: Sequence[Tensor],
          scores: Tensor | None = None) -> Tensor:
    """``function`` for every index; dimensions that it does not look at have size 1."""
    holders = function.graph.find_nodes(op="placeholder")[0 if scores is None else 1 :][:4]
    used = [bool(h.users) or scores is not None for h in holders]
    indices = [torch.arange(n if u else 1, device=device) for n, u in zip(shape, used, strict=True)]
    first: list[Any] = [] if scores is None else [0]
    mapped: Callable[..., Any] = function
    for at in (3, 2, 1, 0):
        places = [0 if i == at else None for i in range(4)]
        mapped = torch.vmap(mapped, in_dims=(*first, *places, *[None] * len(buffers)))
    return mapped(*([] if scores is None else [scores]), *indices, *buffers)
