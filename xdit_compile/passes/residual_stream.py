"""Residual streams: which value of a graph is another one plus what blocks have added to it.

Blocks of transformers add to what they are given (``x + attention(x)``). Followed back through additions, copies and
views, and through the joining and cutting of streams along one dimension (text and image tokens), what leaves the last
block leads to what entered the first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from xdit_compile.ir.program import Program, output_args

aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.clamp.default,
          aten.nan_to_num.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
          aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
          aten.expand.default, aten.alias.default, aten.add.Scalar, aten.flatten.using_ints, aten.unflatten.int}
"""Operators whose result continues what they are given, cut and turned though it may be."""
SUMS = {aten.add.Tensor, aten.sub.Tensor}
CUTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}

Pieces = tuple[int, tuple[fx.Node, ...]]
"""Values that were joined, and along which dimension."""


@dataclass
class Streams:
    """Of the values of one graph: which value each continues, if any; what was joined in it; and how many blocks it has
    come through."""

    before: dict[fx.Node, fx.Node] = field(default_factory=dict)
    joined: dict[fx.Node, Pieces] = field(default_factory=dict)
    depth: dict[fx.Node, int] = field(default_factory=dict)

    def line(self, node: fx.Node) -> list[fx.Node]:
        """What ``node`` continues, from itself back to where it began."""
        found = [node]
        while found[-1] in self.before:
            found.append(self.before[found[-1]])
        return found

    def _pieces(self, node: fx.Node, dim: int) -> tuple[fx.Node, ...]:
        """What was joined along ``dim`` in the stream of ``node``, as long as it has kept its shape."""
        shape = _shape(node)
        for value in self.line(node):
            if _shape(value) != shape:
                break
            if value in self.joined and self.joined[value][0] == dim:
                return self.joined[value][1]
        return ()

    def piece(self, node: fx.Node, dim: int, start: int, stop: int) -> fx.Node | None:
        """Which of the values that were joined in ``node`` are its indices ``start`` to ``stop``."""
        at = 0
        for part in self._pieces(node, dim):
            size = _shape(part)[dim]
            if (at, at + size) == (start, stop):
                return part
            at += size
        return None


def streams_of(program: Program, block: Callable[[fx.Node], str]) -> Streams:
    """Those of ``main``. ``block`` says which block made a node, if one did."""
    functions = {name: _through(module.graph) for name, module in program.functions() if name != "main"}
    return _streams(program.main.graph, functions, block)


def _through(graph: fx.Graph) -> Mapping[int, int]:
    """Of a function: which result continues which input, by their places."""
    holders = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    found = _streams(graph, {}, lambda _: "")
    ends = {i: found.line(n)[-1] for i, n in enumerate(output_args(graph)) if isinstance(n, fx.Node)}
    return {i: holders[end] for i, end in ends.items() if end in holders}


def _streams(graph: fx.Graph, functions: Mapping[str, Mapping[int, int]], block: Callable[[fx.Node], str]) -> Streams:
    found = Streams()
    # Of two summands, what begins with an input is the stream, and what begins with a product was added to it.
    holders: Collection[fx.Node] = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        before, depth = _continued(found, functions, node, holders), 0
        if before is not None:
            found.before[node] = before
            depth = found.depth.get(before, 0)
            depth += bool(block(node)) and block(node) != block(before)
        if node.target is aten.cat.default:
            parts = tuple(node.args[0])
            found.joined[node] = (_dim(node, 1), parts)
            depth = max(found.depth.get(n, 0) for n in parts)
        if node.target in (aten.slice.Tensor, operator.getitem):
            # A part of a joined stream has come through the blocks that the whole has.
            depth = max([depth, *(found.depth.get(n, 0) for n in node.all_input_nodes)])
            if node.target is operator.getitem and node.args[0].target in CUTS:
                depth = max(depth, found.depth.get(node.args[0].args[0], 0))
        found.depth[node] = depth
    return found


def _continued(found: Streams, functions: Mapping[str, Mapping[int, int]], node: fx.Node,
               holders: Collection[fx.Node]) -> fx.Node | None:
    if node.target in COPIES:
        return node.args[0]
    if node.target in SUMS:
        summands = [a for a in node.args[:1 if node.target is aten.sub.Tensor else 2]
                    if isinstance(a, fx.Node) and _shape(a) == _shape(node)]
        return max(summands, key=lambda a: (found.depth.get(a, 0), found.line(a)[-1] in holders, len(found.line(a))),
                   default=None)
    if node.target is aten.slice.Tensor:
        source, dim, *ends = node.args
        size = _shape(source)[dim]
        start, stop = ((*ends, None, None)[:2])
        start, stop = (_inside(start or 0, size), _inside(size if stop is None else stop, size))
        return source if stop - start == size else found.piece(source, dim % len(_shape(source)), start, stop)
    if node.target is operator.getitem:
        source, index = node.args
        if source.op == "call_module":
            place = functions.get(str(source.target), {}).get(index)
            return source.args[place] if place is not None else _alike(found, node, source.args)
        if source.target in CUTS:
            whole = source.args[0]
            dim = (source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)) % node.meta["val"].ndim
            start = sum(part.shape[dim] for part in source.meta["val"][:index])
            return found.piece(whole, dim, start, start + _shape(node)[dim])
    return None


def _alike(found: Streams, node: fx.Node, given: Sequence[fx.Node]) -> fx.Node | None:
    """Of what a block is given, what its result would continue if it does not add to it: what is shaped alike, and has
    come through most blocks."""
    alike = [a for a in given if isinstance(a.meta["val"], torch.Tensor) and _shape(a) == _shape(node)
             and a.op != "placeholder"]
    return max(alike, key=lambda a: found.depth.get(a, 0), default=None)


def _dim(node: fx.Node, place: int) -> int:
    """The dimension that ``node`` is given as its argument ``place``; the first if it is not."""
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return given % len(_shape(node))  # type: ignore[operator]


def _inside(index: int, size: int) -> int:
    return min(max(index + size * (index < 0), 0), size)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
