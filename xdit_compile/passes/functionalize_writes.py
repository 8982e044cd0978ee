"""What functionalisation makes of in-place writes, as slices and concatenations, which follow any layout."""

from __future__ import annotations

import torch
from torch import fx

from xdit_compile.ir.program import drop_unused
from xdit_compile.passes.graph_editor import Editor, val

aten = torch.ops.aten


def expand_writes(graph: fx.Graph) -> None:
    """``copy`` becomes its source; ``slice_scatter`` of a range and ``select_scatter`` become what lies before,
    the new part and what lies after."""
    for node in graph.nodes:
        edit = Editor(node)
        if node.target is aten.copy.default:
            source = node.args[1]
            if val(source).shape != val(node).shape:
                source = edit.call(aten.expand.default, source, list(val(node).shape))
            if val(source).dtype != val(node).dtype:
                source = edit.call(aten._to_copy.default, source, dtype=val(node).dtype)
            edit.replace_with(source)
        elif node.target is aten.slice_scatter.default:
            x, part, dim, start, stop, step = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
            if step == 1:
                start, stop, _ = slice(start, stop).indices(val(x).shape[dim])
                edit.replace_with(_joined(edit, x, part, dim, start, max(start, stop)))
        elif node.target is aten.select_scatter.default:
            x, part, dim, index = node.args
            index %= val(x).shape[dim]
            part = edit.call(aten.unsqueeze.default, part, dim % val(x).ndim)
            edit.replace_with(_joined(edit, x, part, dim, index, index + 1))
    drop_unused(graph)


def _joined(edit: Editor, x: fx.Node, part: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
    size = val(x).shape[dim]
    before = [edit.call(aten.slice.Tensor, x, dim, 0, start)] if start else []
    after = [edit.call(aten.slice.Tensor, x, dim, stop, size)] if stop < size else []
    pieces = [*before, part, *after]
    return part if len(pieces) == 1 else edit.call(aten.cat.default, pieces, dim)
