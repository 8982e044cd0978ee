"""What one forward costs one rank, all together."""

from __future__ import annotations

from dataclasses import dataclass

from xdit_compile.ir.program import Program
from xdit_compile.report import traffic
from xdit_compile.report.memory import peak_activations
from xdit_compile.report.operations import program_flops
from xdit_compile.report.traffic import Collective


@dataclass(frozen=True)
class Costs:
    """Of one rank and one forward.

    Attributes:
        flops: floating-point operations, a multiply-add counting as two.
        activations: bytes of activations at the worst moment (see ``memory.py`` for what is left out).
        collectives: every collective node, with its bytes.
    """

    flops: int
    activations: int
    collectives: tuple[Collective, ...] = ()

    @property
    def collective_count(self) -> int:
        return traffic.count(self.collectives)

    @property
    def sent(self) -> int:
        """Bytes sent to other ranks."""
        return traffic.sent(self.collectives)


def costs_of(program: Program) -> Costs:
    """The costs of a local program for its rank, or of a global one for a single device."""
    found = () if program.position is None else tuple(traffic.collectives(program))
    return Costs(program_flops(program), peak_activations(program), found)
