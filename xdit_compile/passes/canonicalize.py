"""One way of writing each thing: what tracing leaves behind is removed, manual attention becomes attention.

Assertions and copies mean nothing in a functional graph of static shapes, but for what they let go of. Views become
reshapes, because a rank's piece need not have the strides the whole tensor had. Writes into ranges become
concatenations, einsum a matrix product, and softmax(q k^T) v written by hand one attention node.
"""

from __future__ import annotations

import torch
from torch import fx

from xdit_compile.ir.program import Note, Program, drop_unused
from xdit_compile.passes.composite import expand_composites
from xdit_compile.passes.expand_einsum import expand_einsum
from xdit_compile.passes.functionalize_writes import expand_writes
from xdit_compile.passes.fuse_attention import fold_softmax, fuse_attention
from xdit_compile.passes.spelling import respell

aten = torch.ops.aten

COPIES = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
          aten.lift_fresh_copy.default}
JOINS = {aten.concat.default, aten.concatenate.default}
UNSET = {aten.empty_like.default: aten.zeros_like.default, aten.new_empty.default: aten.new_zeros.default,
         aten.empty.memory_format: aten.zeros.default}
"""Uninitialised memory is made zero: what ranks hold of it would differ."""
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
REWRITTEN = frozenset({*COPIES, *JOINS, *UNSET, *VIEWS, aten.type_as.default, aten.pad.default})


def canonicalize(program: Program) -> Program:
    """Needs a captured program; guarantees no views, copies or checks, and whole attention nodes."""
    notes: list[Note] = []
    functions = {}
    for name, module in program.functions():
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {})).meta.update(module.graph.output_node().meta)
        expand_einsum(graph)
        respell(graph)
        expand_composites(graph, REWRITTEN)
        respell(graph)
        _clean(graph)
        expand_writes(graph)
        fold_softmax(graph)
        notes += fuse_attention(graph, name)
        drop_unused(graph)
        functions[name] = graph
    return program.rebuilt(functions, "canonical", notes=program.notes + tuple(notes))


def _lets_go(node: fx.Node) -> bool:
    """Whether the model copies a part so that the rest need not be kept, as for what the next frame wants of this."""
    source = node.args[0]
    while source.target is aten.slice.Tensor:
        source = source.args[0]
    return node.target is aten.clone.default and not node.kwargs and (
        source.meta["val"].numel() > node.meta["val"].numel() > 0)


def _clean(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in COPIES and not _lets_go(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in JOINS:
            node.target = aten.cat.default
        elif node.target in UNSET:
            node.target = UNSET[node.target]
        elif node.target in VIEWS:
            node.target = aten.reshape.default
            node.args = (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten.expand.default:
            node.args = (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten.type_as.default:
            node.target, node.args = aten._to_copy.default, node.args[:1]
            node.kwargs = {"dtype": node.meta["val"].dtype}
        elif node.target is aten.pad.default and (len(node.args) < 3 or node.args[2] == "constant"):
            given = {"value": node.args[3] if len(node.args) > 3 else None} | node.kwargs
            node.target, node.kwargs = aten.constant_pad_nd.default, {}
            node.args = (*node.args[:2], given["value"] or 0)
