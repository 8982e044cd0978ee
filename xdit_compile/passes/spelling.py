"""Operators written in terms of others that have rules, where the general form of them has none."""

from __future__ import annotations

import math

import torch
from torch import fx

from xdit_compile.errors import PlanError
from xdit_compile.ir.program import drop_unused, source_of
from xdit_compile.passes.graph_editor import Editor, val

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def respell(graph: fx.Graph) -> None:
    """Rewrite the operators of ``SPELLED`` where it knows how."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in SPELLED:
            edit = Editor(node)
            made = SPELLED[node.target](edit, *node.args, **node.kwargs)
            if made is not None:
                edit.replace_with(made)
    drop_unused(graph)


def _vectors(edit: Editor, a: fx.Node, b: fx.Node) -> fx.Node | None:
    """A product with a vector as one with a matrix of one row or column."""
    one, other = val(a).ndim == 1, val(b).ndim == 1
    if not one and not other:
        return None
    left = edit.call(aten.unsqueeze.default, a, 0) if one else a
    right = edit.call(aten.unsqueeze.default, b, 1) if other else b
    product = edit.call(aten.matmul.default, left, right)
    return edit.call(aten.reshape.default, product, list(val(edit.node).shape))


def _vdot(edit: Editor, a: fx.Node, b: fx.Node) -> fx.Node | None:
    return _vectors(edit, edit.call(aten._conj.default, a) if val(a).is_complex() else a, b)


def _plain_convolution(edit: Editor, x: fx.Node, weight: fx.Node, bias: fx.Node | None, stride: list[int],
                       padding: list[int], dilation: list[int], transposed: bool, _: list[int],
                       groups: int) -> fx.Node | None:
    """What is left of a convolution with padding by name."""
    if transposed or val(x).ndim != val(weight).ndim:
        return None
    return edit.call(_CONVOLUTIONS[val(x).ndim - 2], x, weight, bias, stride, padding, dilation, groups)


def _instance_norm(edit: Editor, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, mean: fx.Node | None,
                   variance: fx.Node | None, own: bool, momentum: float, eps: float, cudnn: bool) -> fx.Node | None:
    """Each channel is a group."""
    if not own or mean is not None or variance is not None:
        return None
    return edit.call(aten.group_norm.default, x, val(x).shape[1], weight, bias, eps, cudnn)


def _aligned(sizes: list[int], kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> bool:
    """Whether windows lie side by side and cover everything."""
    return kernel == stride and set(dilation) == {1} and set(padding) == {0} and all(
        n % k == 0 for n, k in zip(sizes, kernel, strict=True))


def _patches(edit: Editor, x: fx.Node, kernel: list[int], *how: list[int]) -> fx.Node | None:
    """``F.unfold`` into patches: a view."""
    *batch, channels, height, width = val(x).shape
    if len(batch) != 1 or not _aligned([height, width], kernel, *how):
        return None
    (h, w), shape = kernel, list(val(edit.node).shape)
    grid = edit.call(aten.reshape.default, x, [*batch, channels, height // h, h, width // w, w])
    return edit.call(aten.reshape.default, edit.call(aten.permute.default, grid, [0, 1, 3, 5, 2, 4]), shape)


def _picture(edit: Editor, x: fx.Node, sizes: list[int], kernel: list[int], *how: list[int]) -> fx.Node | None:
    """``F.fold`` of patches."""
    if val(x).ndim != 3 or not _aligned(sizes, kernel, *how):
        return None
    (h, w), (height, width), out = kernel, sizes, list(val(edit.node).shape)
    grid = edit.call(aten.reshape.default, x, [out[0], out[1], h, w, height // h, width // w])
    return edit.call(aten.reshape.default, edit.call(aten.permute.default, grid, [0, 1, 4, 2, 5, 3]), out)


def _strided(edit: Editor, x: fx.Node, size: list[int], stride: list[int], offset: int | None = None) -> fx.Node:
    """By what lies where in memory, which is as the model saw it and not as ranks hold it: a look-up by positions.

    Raises:
        PlanError: what is read lies in memory with gaps.
    """
    held = val(x)
    order = sorted(range(held.ndim), key=lambda i: (-held.stride(i), -held.shape[i], i))
    dense = held.permute(order)
    if not dense.is_contiguous() or (offset or 0) + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= (
            held.numel()):
        raise PlanError(f"as_strided at {source_of(edit.node) or edit.node.name} reads memory by strides {stride} of a "
                        f"tensor of shape {list(held.shape)} that is a view of a larger one; use indexing or unfold")
    flat = edit.call(aten.reshape.default, edit.call(aten.permute.default, x, order), [held.numel()])
    if size == list(dense.shape) and not offset and all(
            n == 1 or a == b for n, a, b in zip(size, stride, dense.stride(), strict=True)):
        return edit.call(aten.reshape.default, flat, size)
    where = edit.call(aten.full.default, [1] * len(size), offset or 0, dtype=torch.int64, device=held.device)
    for i, (n, step) in enumerate(zip(size, stride, strict=True)):
        steps = edit.call(aten.arange.start_step, 0, n * max(step, 1), max(step, 1), device=held.device)
        steps = edit.call(aten.mul.Tensor, steps, int(step > 0))
        steps = edit.call(aten.reshape.default, steps, [n if j == i else 1 for j in range(len(size))])
        where = edit.call(aten.add.Tensor, where, steps)
    where = edit.call(aten.reshape.default, where, [math.prod(size)])
    return edit.call(aten.reshape.default, edit.call(aten.index_select.default, flat, 0, where), list(size))


def _masked_write(edit: Editor, x: fx.Node, indices: list[fx.Node | None], value: fx.Node,
                  accumulate: bool = False) -> fx.Node | None:
    """``x[mask] = number`` fills."""
    mask, rest = indices[0], val(x).shape
    if len(indices) != 1 or val(mask).dtype is not torch.bool or val(value).numel() != 1 or accumulate:
        return None
    mask = edit.call(aten.reshape.default, mask, [*val(mask).shape, *[1] * (len(rest) - val(mask).ndim)])
    number = edit.call(aten.reshape.default, value, [])
    return edit.call(aten.masked_fill.Tensor, x, mask, number)


SPELLED = {
    aten.mv.default: _vectors, aten.dot.default: _vectors, aten.vdot.default: _vdot, aten.matmul.default: _vectors,
    aten.convolution.default: _plain_convolution, aten.instance_norm.default: _instance_norm,
    aten.im2col.default: _patches, aten.col2im.default: _picture, aten.as_strided.default: _strided,
    aten.index_put.default: _masked_write,
}
"""How each is written otherwise: None where it stays as it is."""
