"""The collectives of a local program: what each is for, how often it runs, the bytes that leave this rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from xdit_compile.ir.mesh import axis_sizes, group_name
from xdit_compile.ir.program import Note, Program, module_of, source_of

c10d = torch.ops._c10d_functional

KINDS = {
    c10d.all_to_all_single.default: "all_to_all",
    c10d.all_gather_into_tensor.default: "all_gather",
    c10d.all_reduce.default: "all_reduce",
}

FINAL = "output"
"""The node that notes name where the model's results are made whole."""


@dataclass(frozen=True)
class Collective:
    """One collective node.

    Attributes:
        kind: all_to_all, all_gather or all_reduce; axis, ranks: the mesh axis it runs over and its size.
        why: what the pass that made it said it is for.
        function, node: where it stands in the local program; origin: the node of the global one it serves.
        times: how often it runs in one forward.
        size: bytes this rank sends to others, each time.
    """

    kind: str
    axis: str
    ranks: int
    why: str
    function: str
    node: str
    origin: str
    module: str
    source: str
    times: int
    size: int

    @property
    def sent(self) -> int:
        """Bytes this rank sends in one forward."""
        return self.times * self.size


def collectives(program: Program) -> Iterator[Collective]:
    """Every collective of a local program, in order."""
    assert program.spec is not None and program.position is not None
    calls, sizes = program.calls(), axis_sizes(program.spec)
    axes = {group_name(axis, sizes): axis for axis in sizes}
    why = _Purposes(program.notes)
    for function, module in program.functions():
        for node in module.graph.nodes:
            kind = KINDS.get(node.target)
            if kind is not None:
                axis, origin = axes[node.args[-1]], node.meta.get("origin", FINAL)
                yield Collective(
                    kind, axis, sizes[axis], why(function, origin, kind), function, node.name, origin,
                    module_of(node), source_of(node), calls[function],
                    bytes_sent(node, sizes[axis], program.position[axis]))


def bytes_sent(node: fx.Node, ranks: int, me: int) -> int:
    """Bytes that rank ``me`` of ``ranks`` sends to others: what it keeps for itself does not travel, and an
    all-reduce goes around a ring twice, 1/``ranks`` of the tensor at each step (Patarasuk and Yuan, 2009)."""
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    size = x.numel() * x.dtype.itemsize
    if node.target is c10d.all_to_all_single.default:
        send: list[int] = node.args[2]  # type: ignore[assignment]
        return (sum(send) - send[me]) * math.prod(x.shape[1:]) * x.dtype.itemsize
    if node.target is c10d.all_gather_into_tensor.default:
        return (ranks - 1) * size
    return 2 * (ranks - 1) * size // ranks


def count(found: Iterable[Collective]) -> int:
    """How many collectives one forward runs."""
    return sum(c.times for c in found)


def sent(found: Iterable[Collective]) -> int:
    """Bytes this rank sends in one forward."""
    return sum(c.sent for c in found)


class _Purposes:
    """What notes say a collective is for. A node may need several of a kind; notes keep the graph's order."""

    def __init__(self, notes: Iterable[Note]) -> None:
        self._said: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for note in notes:
            if note.kind == "collective":
                kind, _, text = note.text.partition(": ")
                self._said[note.function, note.node, kind].append(text)
            elif note.kind == "attention":
                self._said[note.function, note.node, "attention"].append(note.text.partition(":")[0])

    def __call__(self, function: str, origin: str, kind: str) -> str:
        said = self._said[function, origin, kind]
        if said:
            return said.pop(0)
        methods = self._said[function, origin, "attention"]
        return f"attention, {methods[-1]}" if methods else ""
