"""The pass that makes one rank's program, and the same walk as an estimate of what that program would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from xdit_compile.ir.layout import Layout, Position
from xdit_compile.ir.mesh import position_of
from xdit_compile.ir.program import Input, Part, Program
from xdit_compile.passes.cost import Cost, CostMemo
from xdit_compile.passes.interpreter import Leave, ProgramInterpreter, Seeds, parameter_layouts


def shard(program: Program, seeds: Seeds, position: Position, sizes: Mapping[str, int], mode: Any,
          given: Mapping[str, Layout] = MappingProxyType({}), leave: Leave | None = None) -> Program:
    """The local program of one rank: needs a canonical program with a spec, guarantees a layout on every value.
    ``given`` and ``leave`` are as in ``ProgramInterpreter.main``."""
    interpreter = ProgramInterpreter(program, seeds, position, sizes, mode)
    interpreter.main(given, leave)
    laid = parameter_layouts(program, seeds)
    holders = program.main.graph.find_nodes(op="placeholder")
    inputs = tuple(replace(what, part=_part(laid[n.name], position)) if n.name in laid else what
                   for n, what in zip(holders, program.inputs, strict=True))
    caches = tuple(Input("cache", str(i)) for i in range(len(interpreter.caches["main"])))
    return program.having("sharded", main=interpreter.functions["main"], position=dict(position),
                          for_next_step=interpreter.sent["main"], inputs=inputs + caches,
                          notes=program.notes + tuple(interpreter.notes))


def _part(layout: Layout, position: Position) -> Part:
    return tuple(tuple(dim.spans(position)) for dim in layout.dims)


class CostEstimator:
    """Says what ``shard`` would cost for one choice of seeds after the other."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        assert program.spec is not None
        self.program, self.sizes = program, sizes
        # The first and the last rank hold the largest remainders.
        self._ends = [(position_of(rank, program.spec), CostMemo())
                      for rank in sorted({0, program.spec.world_size - 1})]

    def __call__(self, seeds: Seeds) -> Cost:
        """The cost of the busiest rank."""
        interpreters = (ProgramInterpreter(self.program, seeds, end, self.sizes, memo=memo) for end, memo in self._ends)
        return max((interpreter.main().cost for interpreter in interpreters), key=lambda cost: cost.flops)
