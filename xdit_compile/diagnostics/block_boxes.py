"""The blocks of a program in the order in which they run, with the layouts of what goes in and out."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.program import Program, module_of
from xdit_compile.report.operations import node_flops
from xdit_compile.report.traffic import collectives

OUTSIDE = "main"


@dataclass(frozen=True)
class BlockBox:
    """Blocks of one kind that follow each other, or what stands between blocks.

    Attributes:
        function: the block's name in the program, ``main`` for what is in no block; times: how many follow each other.
        first, last: paths of the first module and the last.
        takes, gives: layouts of the activations that come in and go out, as ``[1, 4096/8, 3072]``.
        flops: of this rank, in all of them together.
        sent: what this rank sends in all of them together: kind and purpose of a collective, how often, bytes.
    """

    function: str
    times: int
    first: str
    last: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    flops: int
    sent: tuple[tuple[str, int, int], ...]


def block_boxes(local: Program) -> tuple[BlockBox, ...]:
    """What one rank runs, from the first operation to the last."""
    flops = {name: sum(map(node_flops, module.graph.nodes)) for name, module in local.functions()}
    sent: dict[str, dict[str, list[int]]] = defaultdict(dict)
    where: dict[tuple[str, str], tuple[str, int]] = {}
    for c in collectives(local) if local.position is not None else ():
        what = f"{c.kind} over {c.axis}{f': {c.why}' if c.why else ''}"
        where[c.function, c.node] = what, c.size
        if c.function != OUTSIDE:
            tally = sent[c.function].setdefault(what, [0, 0])
            tally[0], tally[1] = tally[0] + 1, tally[1] + c.size
    boxes: list[BlockBox] = []
    for box in _in_order(local, flops, sent, where):
        alike = boxes and (boxes[-1].function, boxes[-1].takes, boxes[-1].gives) == (box.function, box.takes, box.gives)
        if alike and box.function != OUTSIDE:
            before = boxes.pop()
            box = replace(box, times=before.times + 1, first=before.first, flops=before.flops + box.flops,
                          sent=tuple((what, n + m, a + b) for (what, n, a), (_, m, b) in zip(
                              before.sent, box.sent, strict=True)))
        boxes.append(box)
    return tuple(boxes)


def _in_order(local: Program, flops: dict[str, int], sent: Any, where: Any) -> Iterator[BlockBox]:
    between: list[fx.Node] = []

    def outside() -> Iterator[BlockBox]:
        work = sum(map(node_flops, between))
        tally: dict[str, list[int]] = {}
        for node in between:
            if (OUTSIDE, node.name) in where:
                what, size = where[OUTSIDE, node.name]
                entry = tally.setdefault(what, [0, 0])
                entry[0], entry[1] = entry[0] + 1, entry[1] + size
        modules = list(dict.fromkeys(filter(None, map(module_of, between))))
        if work or tally:
            yield BlockBox(OUTSIDE, 1, modules[0] if modules else "", modules[-1] if modules else "", (),
                           tuple(dict.fromkeys(_layouts(n for n in between if _leaves(n, between)))), work,
                           tuple((what, n, size) for what, (n, size) in tally.items()))
        between.clear()

    for node in local.main.graph.nodes:
        if node.op == "call_module":
            yield from outside()
            results = [u for u in node.users if u.target is operator.getitem] or [node]
            name = str(node.target)
            path = module_of(node) or str(node.meta.get("origin", ""))
            yield BlockBox(name, 1, path, path, tuple(_layouts(node.all_input_nodes)), tuple(_layouts(results)),
                           flops[name], tuple((what, n, size) for what, (n, size) in sent[name].items()))
        elif node.op == "call_function":
            between.append(node)
    yield from outside()


def _leaves(node: fx.Node, between: list[fx.Node]) -> bool:
    """Whether a block uses it, or the answer."""
    return any(user.op in ("call_module", "output") for user in node.users)


def _layouts(nodes: Any) -> Iterator[str]:
    """Of activations that ranks share; of whole ones too, where nothing is shared."""
    held = [(str(node.meta["layout"]), node.meta["layout"].sharded) for node in nodes
            if node.meta.get("layout") is not None and isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].dim() > 2]
    shared = [text for text, sharded in held if sharded]
    yield from shared or dict.fromkeys(text for text, _ in held)
