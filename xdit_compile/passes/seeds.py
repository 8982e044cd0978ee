"""Where to begin: which values to shard, found by trying.

Candidates are the dimensions of values that enter blocks (called block functions, or, in a program without any,
modules that hold attention). Each is tried by an abstract walk that only counts; one after the other is kept
while it lowers the cost. Nothing is guessed from names or shapes: that a dimension is the token axis shows in
attention being distributed over it, that text is worth sharding shows in the work saved.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from xdit_compile.costs import FORMULAS
from xdit_compile.errors import SpecError
from xdit_compile.layout import SEQUENCE, Dim
from xdit_compile.passes.shard import Seeds, Tally, estimate
from xdit_compile.program import Program, module_of

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

TRAFFIC_WEIGHT = 4.0
"""Bytes sent over all bytes the model computes, against its share of the model's operations. Set so that a
projection of some hundred text tokens is rather computed on every rank than paid for with two more exchanges per
block; relative to the model, so that a small model is sharded as its large sibling is."""

WORTH = 0.999
"""A further seed must lower the cost below this fraction, or it only adds slices."""


def choose_seeds(program: Program, sizes: Mapping[str, int]) -> Seeds:
    """The seeds of least cost for ``program.spec``.

    Raises:
        SpecError: when no dimension can be sharded so that attention is distributed.
    """
    parts = sizes[SEQUENCE]
    if parts == 1:
        return {}
    whole = estimate(program, {}, sizes)

    def cost(tally: Tally) -> float:
        return tally.flops / max(whole.flops, 1) + TRAFFIC_WEIGHT * tally.sent / max(whole.moved, 1) + (
            0.01 * tally.moved / max(whole.moved, 1))

    options = [{node.name: (dim, Dim.even(size, parts, SEQUENCE))} for node in candidates(program)
               for dim, size in enumerate(node.meta["val"].shape) if size >= parts]
    # A dimension over which no attention is distributed is a batch or a width, no axis of tokens.
    tried = sorted((cost(tally), i) for i, seed in enumerate(options)
                   for tally in [estimate(program, seed, sizes)] if tally.attentions)
    if not tried:
        raise SpecError(
            f"{program.spec} cannot be honoured: no dimension of what enters the model's blocks can be split into "
            f"{parts} parts so that attention is distributed. Use fewer processes, or one."
        )
    best, first = tried[0]
    chosen = options[first]
    for _, i in tried[1:]:
        if not chosen.keys() & options[i].keys():
            trial = chosen | options[i]
            found = cost(estimate(program, trial, sizes))
            if found < best * WORTH:
                chosen, best = trial, found
    return chosen


def candidates(program: Program) -> Iterator[fx.Node]:
    """Features that enter a block, in graph order."""
    graph = program.main.graph
    entering = _entering_calls(graph) or _entering_modules(graph) or _before_attention(graph)
    learned: set[fx.Node] = set()
    for node in graph.nodes:
        # Features come out of a matrix product; position tables and masks, which do not, follow by themselves.
        if node.op == "call_module" or node.target in FORMULAS or any(n in learned for n in node.all_input_nodes):
            learned.add(node)
        if node in entering and node in learned and isinstance(value := node.meta.get("val"), torch.Tensor) and (
                value.is_floating_point() and value.ndim > 1):
            yield node


def _entering_calls(graph: fx.Graph) -> set[fx.Node]:
    """Arguments of block functions that are not results of the same function."""
    def comes_from(node: fx.Node, block: str) -> bool:
        return node.target is operator.getitem and node.args[0].target == block

    return {a for call in graph.find_nodes(op="call_module") for a in call.all_input_nodes
            if not comes_from(a, call.target)}


def _entering_modules(graph: fx.Graph) -> set[fx.Node]:
    """What flows into the outermost modules that part the attention nodes among them."""
    paths = [module_of(n).split(".") for n in graph.find_nodes(op="call_function", target=ATTENTION)]
    depth = next((d for d in range(1, max(map(len, paths), default=0) + 1)
                  if len({tuple(p[:d]) for p in paths}) > 1), 0)
    blocks = {tuple(p[:depth]) for p in paths} if depth else set()

    def block_of(node: fx.Node) -> tuple[str, ...] | None:
        path = tuple(module_of(node).split(".")[:depth])
        return path if path in blocks else None

    return {a for n in graph.nodes if n.op == "call_function" and block_of(n) for a in n.all_input_nodes
            if block_of(a) != block_of(n)}


def _before_attention(graph: fx.Graph) -> set[fx.Node]:
    """Everything the first attention depends on."""
    first = next(iter(graph.find_nodes(op="call_function", target=ATTENTION)), None)
    found: set[fx.Node] = set()
    queue = [first] if first else []
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                queue.append(node)
    return found
