"""How much memory a rank takes to run programs: said in the artifact, computed anew on fake tensors before anything
real is made, and limited by the user."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.json_values import Json
from xdit_compile.artifact.permissions import name_of, permissions
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.program import Program
from xdit_compile.report.memory import peak_activations, result_bytes
from xdit_compile.report.units import size
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank takes.

    Attributes:
        weights: that its programs use, and its shares of them, on the host too; constants: that come with the artifact.
        kept: from step to step, for one prompt and one condition; a rank has as many as a pipeline uses by turns.
        values: of one call at the worst moment, or the largest of them if that is more, as a view may be.
        workspace: what kernels may need for themselves beside that: scores of attention, windows of convolutions.
    """

    weights: int = 0
    constants: int = 0
    kept: int = 0
    values: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def most(self, other: Memory) -> Memory:
        """The larger figures of two."""
        return Memory(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def check(self, declared: Memory, where: str) -> None:
        """Raise ArtifactError if programs take more than was ``declared``."""
        for name, found in asdict(self).items():
            if found > (said := getattr(declared, name)):
                raise ArtifactError(f"{where} says that a rank takes {said} bytes of {name}, but its programs take "
                                    f"{found}")

    def check_limit(self, most: int | None, where: str) -> None:
        """Raise ArtifactError if this is more than the user allows."""
        if most is not None and self.total > most:
            raise ArtifactError(f"{where} takes {self.total} bytes on a rank ({self}), more than max_memory={most}")

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def of_json(entry: Entry) -> Memory:
        return Memory(**{f.name: entry[f.name].whole(0, 2**60) for f in fields(Memory)})

    def __str__(self) -> str:
        return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in asdict(self).items())


UNLIMITED = Memory(*[2**62] * len(fields(Memory)))
"""For what is being written, of which nothing is said yet."""


def memory_of(body: Program, invariant: Program | None, stage: StageProgram | None, weights: int,
              constants: int) -> Memory:
    """What the programs of one call take.

    Args:
        weights, constants: bytes of these.
    """
    programs = [p for p in ((stage.invariant, stage.once, *stage.units.values()) if stage else (body, invariant)) if p]
    caches = sum(_nbytes(n.meta["val"]) for n, i in zip(
        programs[-1].main.graph.find_nodes(op="placeholder"), programs[-1].inputs, strict=True) if i.kind == "cache")
    lasting = stage.invariant if stage else invariant
    return Memory(
        weights, constants, caches + (result_bytes(lasting) if lasting else 0),
        max(max([peak_activations(p), *map(_nbytes, _values(p))]) for p in programs),
        max((workspace(n) for p in programs for n in _nodes(p) if n.op == "call_function"), default=0))


def workspace(node: fx.Node) -> int:
    """The most bytes that the kernel of an operator needs beside its arguments and results, as far as that is more than
    a few times these."""
    name = name_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
    kind = permissions()[name].kind if name in permissions() else ""
    if kind not in ("attention", "window"):
        return 0
    operands = [a.meta["val"] for a in node.args if isinstance(a, fx.Node)]
    if kind == "attention":
        # All scores, where no fused kernel can be used; in float32 at least, and their softmax.
        queries, keys = operands[:2]
        return 2 * math.prod(queries.shape[:-1]) * keys.shape[-2] * max(4, queries.dtype.itemsize)
    made = pytree.tree_leaves(node.meta["val"])
    if len(operands) < 2 or operands[1].ndim < 3:
        return 0
    # Windows unfolded: what one result is computed from, for each place of the results.
    return math.prod(operands[1].shape[1:]) * made[0].shape[0] * math.prod(made[0].shape[2:]) * made[0].dtype.itemsize


def _nodes(program: Program) -> Iterable[fx.Node]:
    return (node for _, module in program.functions() for node in module.graph.nodes)


def _values(program: Program) -> Iterable[torch.Tensor]:
    """All that operators make."""
    for node in _nodes(program):
        if node.op == "call_function":
            yield from (t for t in pytree.tree_leaves(node.meta["val"]) if isinstance(t, torch.Tensor))


def _nbytes(value: torch.Tensor) -> int:
    return value.numel() * value.dtype.itemsize
