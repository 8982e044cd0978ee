"""Where the programs of a model's calls come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xdit_compile.ir.output_spec import OutputSpec
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.runtime.execution.cached_step import CachedStep
from xdit_compile.runtime.execution.displaced_step import DisplacedStep
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram
from xdit_compile.spec import ShardingSpec


class Runnable(Protocol):
    """What one rank runs for one kind of call: ``body`` at each step, ``invariant`` when the arguments that it takes
    have changed; or, as a ``stage`` of a pipeline, the programs of that."""

    @property
    def body(self) -> Program: ...

    @property
    def invariant(self) -> Program | None: ...

    @property
    def stage(self) -> StageProgram | None: ...

    @property
    def step(self) -> CachedStep | DisplacedStep | None:
        """Where steps use more of steps before than what stays the same, the programs of a step."""

    @property
    def output_spec(self) -> OutputSpec: ...

    @property
    def parameters(self) -> set[str]:
        """The names of those that this rank uses."""

    @property
    def shares(self) -> set[str]:
        """The names of groups of parameters of which this rank uses a share."""

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """What this rank has of the model's parameters, where they come block by block."""

    @property
    def name(self) -> str:
        """Equal on ranks that would run the same program."""

    @property
    def lost(self) -> str:
        """Of a spec that shares a call out in two ways, which of them gains nothing, in words; else nothing."""

    @property
    def unsharded(self) -> bool:
        """Whether nothing is shared out among ranks."""

    def digest(self) -> dict[str, str]:
        """What all ranks must have decided alike, as short texts."""


class ProgramSource(Protocol):
    """Finds what to run for a call. A kind of call is an object of its own."""

    @property
    def changes(self) -> int:
        """How often it was noticed that the model is another than before."""

    @property
    def state(self) -> object | None:
        """What stands for the model as `find` has found it: the same object as long as its parameters and buffers are
        the same tensors and look the same. None where nobody looks."""

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any], fresh: bool = False) -> Any | None:
        """The kind of this call if there was one before; ``fresh``: whether it is the first of a loop."""

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The kind of a new call."""

    def compiled(self, kind: Any, spec: ShardingSpec, rank: int, stages: Mapping[str, int],
                 groups: Sequence[ParameterGroup]) -> Runnable:
        """What rank ``rank`` of ``spec`` runs for it; blocks in ``stages`` stay where they are, ``groups`` are those of
        the model's parameters, where they come block by block.

        Raises:
            SpecError: the spec does not fit this call.
        """
