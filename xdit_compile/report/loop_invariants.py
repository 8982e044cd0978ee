"""What a program computes once and keeps from step to step: what that saves, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xdit_compile.ir.program import Program
from xdit_compile.report.costs import Costs
from xdit_compile.report.memory import peak_activations, result_bytes
from xdit_compile.report.operations import program_flops
from xdit_compile.report.units import size, work


@dataclass(frozen=True)
class InvariantWork:
    """Of one rank, as long as nothing changes but the arguments in ``changes``.

    Attributes:
        flops: operations saved at each step after the first, of ``of`` at the first.
        nbytes: what is kept takes, once for each prompt that the model is called with by turns.
    """

    changes: tuple[str, ...]
    flops: int
    of: int
    nbytes: int

    def __str__(self) -> str:
        return (f"kept from step to step: {work(self.flops)} of {work(self.of)} ({self.flops / max(self.of, 1):.1%}), "
                f"{size(self.nbytes)} kept")


def invariant_work(local: Program, invariant: Program | None, body: Program, changes: tuple[str, ...],
                   of: int) -> InvariantWork | None:
    """What ``local``, parted in these two, saves of ``of`` operations."""
    if invariant is None:
        return None
    return InvariantWork(changes, program_flops(local) - program_flops(body), of, result_bytes(invariant))


def with_invariants(costs: Costs, invariant: Program | None, body: Program) -> Costs:
    """The costs of a program parted in these two, which has what is kept in memory all the time."""
    if invariant is None:
        return costs
    return replace(costs, activations=max(peak_activations(invariant),
                                          result_bytes(invariant) + peak_activations(body)))
