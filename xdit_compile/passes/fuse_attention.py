"""Find softmax(scale * q k^T + mask) v written with matrix products, and put one attention node in its place.

Two functions, as in PyTorch's ``micro_pipeline_tp``: ``find`` returns typed matches and changes nothing,
``fuse_attention`` rewrites them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from xdit_compile.ir.program import Note, drop_unused, module_of, source_of
from xdit_compile.passes.graph_editor import Editor, val

aten = torch.ops.aten

PRODUCTS = {aten.bmm.default, aten.matmul.default}
ADDED = aten.baddbmm.default
SOFTMAX = {aten.softmax.int, aten._softmax.default}
SHAPES = {aten.reshape.default, aten.expand.default, aten.permute.default}


@dataclass(frozen=True)
class ManualAttention:
    """``result`` = softmax(``scale`` * ``q`` @ ``k_t`` + ``mask``) @ ``v``, all of the same batch dimensions."""

    q: fx.Node
    k_t: fx.Node
    v: fx.Node
    mask: fx.Node | None
    """Added to the scores, or, of booleans, where they are filled with ``fill``."""
    fill: float | None
    scale: float
    factor: fx.Node | None
    """The product of the scores with a tensor: a learned scale, one per head."""
    batch: list[int]
    """The batch dimensions of the scores where the softmax sees them, of which the mask speaks."""
    result: fx.Node


def fold_softmax(graph: fx.Graph) -> None:
    """Put one softmax in the place of exp(x - max x) / sum exp(x - max x) over the last dimension."""
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        top, total = node.args
        if not isinstance(total, fx.Node) or top.target is not aten.exp.default or (
                total.target is not aten.sum.dim_IntList or total.args[0] is not top or not _last(total)):
            continue
        shifted = top.args[0]
        if shifted.target is aten.sub.Tensor and len(shifted.args) == 2 and not shifted.kwargs and (
                isinstance(shifted.args[1], fx.Node) and shifted.args[1].target is aten.amax.default
                and shifted.args[1].args[0] is shifted.args[0] and _last(shifted.args[1])):
            edit = Editor(node)
            edit.replace_with(edit.call(aten.softmax.int, shifted.args[0], -1))
    drop_unused(graph)


def _last(reduction: fx.Node) -> bool:
    """Whether a reduction is over the last dimension, which it keeps."""
    return len(reduction.args) == 3 and reduction.args[2] is True and not reduction.kwargs and (
        list(reduction.args[1]) in ([-1], [val(reduction).ndim - 1]))


def find(graph: fx.Graph) -> Iterator[ManualAttention]:
    for node in graph.nodes:
        if node.op == "call_function" and node.target in SOFTMAX and node.args[1] in (-1, val(node).ndim - 1):
            match = _match(node)
            if match is not None:
                yield match


def _match(softmax: fx.Node) -> ManualAttention | None:
    weights, product = _down(softmax)
    if product is None or product.args[0] is not weights:
        return None
    scores, scale, mask, fill, factor = softmax.args[0], 1.0, None, None, None
    while scores.target not in PRODUCTS and scores.target is not ADDED:
        if len(scores.users) != 1:
            return None
        if scores.target is aten.mul.Tensor and isinstance(scores.args[1], (int, float)):
            scale *= scores.args[1]
        elif scores.target is aten.div.Tensor and isinstance(scores.args[1], (int, float)):
            scale /= scores.args[1]
        elif scores.target is aten.mul.Tensor and factor is None and _is_factor(scores):
            factor = scores
        elif scores.target is aten.add.Tensor and mask is None and scale == 1.0 and not factor and _is_mask(scores):
            mask = scores.args[1]
        elif scores.target is aten.masked_fill.Scalar and not mask and scale == 1.0 and not factor and _hides(scores):
            mask, fill = scores.args[1:]
        elif not (scores.target in SHAPES and _keeps_rows(scores)):
            # A cast changes the precision of the scores, which is the author's choice: left as it is.
            return None
        scores = scores.args[0]
    if len(scores.users) != 1:
        return None
    (q, k_t), v = scores.args[-2:], product.args[1]
    if scores.target is ADDED:
        # baddbmm: beta * input + alpha * q k^T; with beta = 0 the input is not even read.
        scale *= scores.kwargs.get("alpha", 1)
        if scores.kwargs.get("beta", 1) == 1 and mask is None and not factor and (
                scale == scores.kwargs.get("alpha", 1)):
            mask = scores.args[0]
        elif scores.kwargs.get("beta", 1) != 0:
            return None
    if not (val(q).ndim == val(k_t).ndim == val(v).ndim and val(q).shape[:-2] == val(k_t).shape[:-2]
            == val(v).shape[:-2]) or val(q).ndim < 3:
        return None
    return ManualAttention(q, k_t, v, mask, fill, scale, factor, list(val(softmax).shape[:-2]), product)


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
        val(add.args[0]).shape == val(add).shape and val(add.args[0]).dtype == val(add.args[1]).dtype)


def _is_factor(mul: fx.Node) -> bool:
    """Whether a tensor scales all scores of a row and column alike, so that it may scale the queries instead."""
    return isinstance(mul.args[1], fx.Node) and val(mul.args[1]).shape[-2:] == (1, 1) and (
        val(mul.args[0]).shape == val(mul).shape)


def _hides(fill: fx.Node) -> bool:
    """Whether what is filled in is so low that adding it to any score gives it again."""
    return fill.args[2] <= torch.finfo(val(fill).dtype).min / 2 and val(fill.args[0]).shape == val(fill).shape


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a node leaves the two last dimensions and the element count alone."""
    before, after = val(node.args[0]), val(node)
    if node.target is aten.permute.default:
        return list(node.args[1]) == list(range(before.ndim))
    return before.shape[-2:] == after.shape[-2:] and before.numel() == after.numel()


def fuse_attention(graph: fx.Graph, function: str) -> list[Note]:
    """Replace every match by ``scaled_dot_product_attention``; returns a note for each."""
    notes = []
    for match in list(find(graph)):
        edit = Editor(match.result)
        lead = match.batch if len(match.batch) > 1 else [1, *match.batch]
        queries = match.q
        if match.factor is not None:
            shape = [*val(match.factor).shape[:-1], val(queries).shape[-1]]
            queries = edit.call(aten.mul.Tensor, edit.call(aten.reshape.default, queries, shape), match.factor.args[1])
        q, k, v = (edit.call(aten.reshape.default, x, [*lead, *val(x).shape[-2:]]) for x in (
            queries, edit.call(aten.transpose.int, match.k_t, -2, -1), match.v))
        mask = match.mask
        if match.fill is not None:
            zeros = edit.call(aten.zeros.default, list(val(mask).shape), dtype=val(q).dtype, device=val(q).device)
            mask = edit.call(aten.masked_fill.Scalar, zeros, mask, match.fill)
        out = edit.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=match.scale)
        out = edit.call(aten.reshape.default, out, list(val(match.result).shape))
        edit.replace_with(out)
        notes.append(Note("canonical", out.name, "softmax(q k^T) v written by hand is one attention",
                          module_of(match.result), source_of(match.result), function))
    drop_unused(graph)
    return notes
