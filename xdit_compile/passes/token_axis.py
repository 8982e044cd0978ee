"""Where to begin: which values to shard, found by trying.

Candidates are the dimensions of values that enter blocks (called block functions, or, in a program without any,
modules that hold attention). Each is tried by an abstract walk that only counts; one after the other is kept
while it lowers the cost. Nothing is guessed from names or shapes: that a dimension is the token axis shows in
attention being distributed over it, that text is worth sharding shows in the work saved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from xdit_compile.errors import SpecError
from xdit_compile.ir.flops import FORMULAS
from xdit_compile.ir.layout import SEQUENCE, Dim, Layout
from xdit_compile.ir.program import Program, module_of, source_of
from xdit_compile.passes.batch_axis import merge_seeds
from xdit_compile.passes.cost import Cost
from xdit_compile.passes.interpreter import Seeds
from xdit_compile.passes.shard import CostEstimator

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default

TRAFFIC_WEIGHT = 4.0
"""Bytes sent over all bytes the model computes, against its share of the model's operations. Set so that a
projection of some hundred text tokens is rather computed on every rank than paid for with two more exchanges per
block; relative to the model, so that a small model is sharded as its large sibling is."""

WORTH = 0.999
"""A further seed must lower the cost below this fraction, or it only adds slices."""


def choose_seeds(program: Program, sizes: Mapping[str, int], batch: Seeds) -> Seeds:
    """The seeds of least cost for ``program.spec`` beside those of the batch; none if there is no work to be saved.

    Raises:
        SpecError: when attention has too few heads, or too few tokens.
    """
    parts = sizes[SEQUENCE]
    if parts == 1:
        return {}
    check_heads(program)
    estimator = CostEstimator(program, sizes)

    def estimate(seeds: Seeds) -> Cost:
        return estimator(merge_seeds(batch, seeds))

    whole = estimate({})
    # Nothing hides an exchange that a block waits for; and what ranks have each for itself is not the same on all of
    # them once they have read what is late, so that it must not be put together again from several.
    displaced = program.spec is not None and program.spec.displaced == "yes"

    def score(cost: Cost) -> float:
        return cost.flops / max(whole.flops, 1) + TRAFFIC_WEIGHT * cost.sent / max(whole.moved, 1) + (
            0.01 * cost.moved / max(whole.moved, 1)) + (cost.gathers if displaced else 0)

    def gathered(tried: Sequence[tuple[Cost, Seeds]]) -> tuple[Cost, Seeds]:
        """The best choice, and with it all that lowers its cost further."""
        # A dimension over which no attention is distributed is a batch or a width, no axis of tokens; unless none ever
        # is, because attention stays inside windows, or there is none. But what saves work may join: image tokens of
        # linear attention, once the text they attend to is distributed.
        worth = (t for t in tried if t[0].attentions or t[0].flops < 0.98 * whole.flops)
        worth = sorted(worth, key=lambda t: score(t[0])) or [(whole, {})]
        best = first = next((t for t in worth if t[0].attentions), worth[0])
        for trial in [seeds for _, seeds in worth] + prologues if first[1] else []:
            # What a prologue makes whole again must not undo a choice made before it.
            trial = best[1] | {name: layout for name, layout in trial.items() if name not in best[1]}
            cost = estimate(trial) if trial != best[1] else best[0]
            if cost.attentions >= first[0].attentions and score(cost) < score(best[0]) * WORTH:
                best = cost, trial
        rest = {name: layout for name, layout in best[1].items() if name not in first[1]}
        if rest and (cost := estimate(rest)).attentions >= first[0].attentions and score(cost) < score(best[0]):
            best = cost, rest
        return best

    entering = list(candidates(program))
    prologues, tried = _prologues(program, entering, parts), _tried(estimate, entering, parts)
    found = gathered(tried)
    for further in (
        # Blocks that are given features as they are, with no projection before.
        lambda: [gathered(tried + _tried(estimate, given, parts))] if (
            given := list(candidates(program, False))) else [],
        # Where blocks make grids of tokens again, for convolutions or to attend inside frames, these can be followed
        # if the grid was cut along one of its sides.
        lambda: [gathered(tried + _tried(estimate, _grids(entering), parts))],
        # Where all is convolutions, with attention in some places, a side of the pictures that are given is to be cut.
        lambda: [f for f in ((estimate(side), side) for side in _sides(program, parts))
                 if f[0].flops < 0.98 * whole.flops],
    ):
        if found[0].flops * parts > 1.05 * whole.flops or found[0].gathers:
            found = min([found, *further()], key=lambda f: score(f[0]))
    if not found[1]:
        _check_tokens(program, parts)
    return found[1]


def _tried(estimate: Callable[[Seeds], Cost], nodes: Iterable[fx.Node], parts: int) -> list[tuple[Cost, Seeds]]:
    """What it costs to cut each dimension of each value, but for values that are cut already when one before them is:
    where blocks of two kinds take turns, there is one more between each of them."""
    tried, cut = [], set[str]()
    for node in nodes:
        if node.name not in cut:
            new = [(estimate(seeds), seeds) for seeds in _cuts([node], parts)]
            tried += new
            cut = cut.union(*(cost.cut for cost, _ in new if cost.attentions))
    return tried


def _grids(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """What these values were before dimensions of theirs were flattened into one."""
    through = (aten.reshape.default, aten.permute.default, aten.transpose.int, aten.linear.default, aten.add.Tensor)
    for node in nodes:
        grid = node
        while grid.target in through and grid.meta["val"].ndim <= node.meta["val"].ndim:
            grid = grid.args[0]
        if grid.meta["val"].ndim > node.meta["val"].ndim:
            yield grid


def _sides(program: Program, parts: int) -> Iterator[Seeds]:
    """The dimensions of arguments that come after batch and channels, cut evenly."""
    for node in (n for n in arguments(program) if n.meta["val"].ndim > 3):
        yield from (seeds for seeds in _cuts([node], parts) if not any(d.sharded for d in seeds[node.name].dims[:2]))


def _cuts(nodes: Iterable[fx.Node], parts: int) -> list[Seeds]:
    """Each dimension of each value, cut evenly."""
    return [{node.name: Layout.replicated(shape).replace(dim, Dim.even(size, parts, SEQUENCE))}
            for node in nodes for shape in [tuple(node.meta["val"].shape)]
            for dim, size in enumerate(shape) if size >= parts]


def _prologues(program: Program, entering: Sequence[fx.Node], parts: int) -> list[Seeds]:
    """Each dimension of each argument cut, and what enters the blocks whole again: projections of text that every
    block wants whole are then shared out, at the price of one gather before the blocks."""
    whole = {n.name: Layout.replicated(n.meta["val"].shape) for n in entering}
    return [seed | whole for seed in _cuts(arguments(program), parts)]


def arguments(program: Program) -> list[fx.Node]:
    """Features that the model is given."""
    holders = program.main.graph.find_nodes(op="placeholder")
    return [n for n, what in zip(holders, program.inputs, strict=True) if what.kind == "argument"
            and n.meta["val"].is_floating_point() and n.meta["val"].ndim > 1]


def _check_tokens(program: Program, parts: int) -> None:
    """Raise SpecError when every attention has fewer tokens than there are ranks."""
    found = [(n.args[0].meta["val"].shape[-2], n) for _, module in program.functions()
             for n in module.graph.find_nodes(op="call_function", target=ATTENTION)]
    tokens, node = max(found, key=lambda item: item[0], default=(parts, None))
    if tokens < parts and node is not None:
        raise SpecError(f"{program.spec} splits tokens into {parts} parts, but for these inputs the model's attention "
                        f"has {tokens} (in {module_of(node) or 'forward'}, {source_of(node)}); use fewer ranks")


def check_heads(program: Program) -> None:
    """Raise SpecError when no attention has the heads that ``ulysses_degree`` ranks would share."""
    assert program.spec is not None
    found = [(n.args[0].meta["val"].shape[-3] if n.args[0].meta["val"].ndim > 2 else 1, n)
             for _, module in program.functions()
             for n in module.graph.find_nodes(op="call_function", target=ATTENTION)]
    heads, node = max(found, key=lambda item: item[0], default=(0, None))
    degree, world = program.spec.ulysses_degree, program.spec.world_size
    if node is not None and degree > heads:
        fits = [f"ulysses={u},ring={world // u}" for u in range(1, heads + 1) if world % u == 0]
        raise SpecError(
            f"ulysses_degree={degree} shares attention heads among {degree} ranks, but the model's attention has "
            f"{heads} (in {module_of(node) or 'forward'}, {source_of(node)}); degrees that fit: {'; '.join(fits)}"
        )


def candidates(program: Program, projected: bool = True) -> Iterator[fx.Node]:
    """Features that enter a block, in graph order; not ``projected``: those that are as they were given."""
    graph = program.main.graph
    entering = _entering_calls(graph) or _entering_modules(graph) or _before_attention(graph)
    learned: set[fx.Node] = set()
    features = set(arguments(program))
    for node in graph.nodes:
        if any(n in features for n in node.all_input_nodes):
            features.add(node)
        # Features come out of a matrix product; position tables and masks, which do not, follow by themselves.
        if node.op == "call_module" or node.target in FORMULAS or any(n in learned for n in node.all_input_nodes):
            learned.add(node)
        value = node.meta.get("val")
        if node in entering and (node in learned) is projected and isinstance(value, torch.Tensor) and (
                value.is_floating_point() and value.ndim > 1) and (projected or node in features):
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
