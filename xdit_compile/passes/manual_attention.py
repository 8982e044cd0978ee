"""Find softmax(scale * q k^T + mask) v written with matrix products, and put one attention node in its place.

Two functions, as in PyTorch's ``micro_pipeline_tp``: ``find`` returns typed matches and changes nothing,
``fuse_attention`` rewrites them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from xdit_compile.program import Note, drop_unused, module_of, source_of

aten = torch.ops.aten

PRODUCTS = {aten.bmm.default, aten.matmul.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
SHAPES = {aten.reshape.default, aten.expand.default}


@dataclass(frozen=True)
class ManualAttention:
    """``result`` = softmax(``scale`` * ``q`` @ ``k_t`` + ``mask``) @ ``v``, all of the same batch dimensions."""

    q: fx.Node
    k_t: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    result: fx.Node


def find(graph: fx.Graph) -> Iterator[ManualAttention]:
    for node in graph.nodes:
        if node.op == "call_function" and node.target in SOFTMAX and node.args[1] in (-1, _val(node).ndim - 1):
            match = _match(node)
            if match is not None:
                yield match


def _match(softmax: fx.Node) -> ManualAttention | None:
    weights, product = _down(softmax)
    if product is None or product.args[0] is not weights:
        return None
    scores, scale, mask = softmax.args[0], 1.0, None
    while scores.target not in PRODUCTS:
        if len(scores.users) != 1:
            return None
        if scores.target is aten.mul.Tensor and isinstance(scores.args[1], (int, float)):
            scale *= scores.args[1]
        elif scores.target is aten.div.Tensor and isinstance(scores.args[1], (int, float)):
            scale /= scores.args[1]
        elif scores.target is aten.add.Tensor and mask is None and scale == 1.0 and _is_mask(scores):
            mask = scores.args[1]
        elif not (scores.target in SHAPES and _keeps_rows(scores)):
            # A cast changes the precision of the scores, which is the author's choice: left as it is.
            return None
        scores = scores.args[0]
    if len(scores.users) != 1 or scores.target not in PRODUCTS:
        return None
    q, k_t, v = scores.args[0], scores.args[1], product.args[1]
    if not (_val(q).ndim == _val(k_t).ndim == _val(v).ndim and _val(q).shape[:-2] == _val(k_t).shape[:-2]
            == _val(v).shape[:-2]) or _val(q).ndim < 3:
        return None
    if mask is not None and _val(mask).ndim > 2 and _val(softmax).shape != _val(scores).shape:
        # The mask speaks of the scores' own batch dimensions, the products of merged ones.
        lead = _val(softmax).shape[:-2]
        return ManualAttention(q, k_t, v, mask, scale, product) if len(lead) >= 1 else None
    return ManualAttention(q, k_t, v, mask, scale, product)


def _down(softmax: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """From the softmax to the product with the values, through reshapes that keep rows."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in PRODUCTS:
            return node, user
        if not (user.target in SHAPES and _keeps_rows(user)):
            break
        node = user
    return node, None


def _is_mask(add: fx.Node) -> bool:
    return len(add.args) == 2 and not add.kwargs and isinstance(add.args[1], fx.Node) and (
        _val(add.args[0]).shape == _val(add).shape and _val(add.args[0]).dtype == _val(add.args[1]).dtype)


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a reshape or expansion leaves the two last dimensions and the element count alone."""
    before, after = _val(node.args[0]), _val(node)
    return before.shape[-2:] == after.shape[-2:] and before.numel() == after.numel()


def fuse_attention(graph: fx.Graph, function: str) -> list[Note]:
    """Replace every match by ``scaled_dot_product_attention``; returns a note for each."""
    notes = []
    for match in list(find(graph)):
        softmax_shape = next(n for n in _between(match) if n.target in SOFTMAX).meta["val"].shape
        with graph.inserting_before(match.result):
            def add(target, *args, like=match.result, **kwargs):
                node = graph.call_function(target, args, kwargs)
                node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
                values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
                node.meta["val"] = target(*values[0], **values[1])
                return node

            lead = list(softmax_shape[:-2])
            q, k, v = match.q, add(aten.transpose.int, match.k_t, -2, -1), match.v
            if len(lead) < 2:
                lead = [1, *lead]
            shaped = [add(aten.reshape.default, x, [*lead, *_val(x).shape[-2:]]) for x in (q, k, v)]
            out = add(aten.scaled_dot_product_attention.default, *shaped, match.mask, 0.0, False, scale=match.scale)
            out = add(aten.reshape.default, out, list(_val(match.result).shape))
        match.result.replace_all_uses_with(out)
        notes.append(Note("canonical", out.name, "softmax(q k^T) v written by hand is one attention",
                          module_of(match.result), source_of(match.result), function))
    drop_unused(graph)
    return notes


def _between(match: ManualAttention) -> Iterator[fx.Node]:
    node = match.result.args[0]
    while node.target not in PRODUCTS:
        yield node
        node = node.args[0]


def _val(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]
