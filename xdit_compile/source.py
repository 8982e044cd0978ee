"""Where the programs of a model's calls come from: they are captured and compiled, or were so before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from xdit_compile.answer import Answer
from xdit_compile.compiler import Compiled, Dump, compile_program
from xdit_compile.frontend.cache import captured, find
from xdit_compile.program import Program
from xdit_compile.runtime.flow import StageProgram
from xdit_compile.spec import ShardingSpec
from xdit_compile.staging import compile_stage
from xdit_compile.steps import changing


class Runnable(Protocol):
    """What one rank runs for one kind of call: ``body`` at each step, ``steady`` when the arguments that it takes have
    changed; or, as a ``stage`` of a pipeline, the programs of that."""

    @property
    def body(self) -> Program: ...

    @property
    def steady(self) -> Program | None: ...

    @property
    def stage(self) -> StageProgram | None: ...

    @property
    def answer(self) -> Answer: ...

    @property
    def parameters(self) -> set[str]:
        """The names of those that this rank uses."""

    @property
    def name(self) -> str:
        """Equal on ranks that would run the same program."""

    @property
    def idle(self) -> bool:
        """Whether nothing is shared out among ranks."""

    def digest(self) -> dict[str, str]:
        """What all ranks must have decided alike, as short texts."""


class Source(Protocol):
    """Finds what to run for a call. A kind of call is an object of its own."""

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
        """The kind of this call if there was one before."""

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The kind of a new call."""

    def compiled(self, kind: Any, spec: ShardingSpec, rank: int, stages: Mapping[str, int]) -> Runnable:
        """What rank ``rank`` of ``spec`` runs for it; blocks in ``stages`` stay where they are.

        Raises:
            SpecError: the spec does not fit this call.
        """


class Captures:
    """Programs captured from calls of a model in this process."""

    def __init__(self, model: nn.Module, dump: Dump | None = None) -> None:
        self.model, self.dump = model, dump
        self._changes: dict[int, Mapping[int, str]] = {}
        """By the identity of a program, which is kept with the model: which arguments change from step to step."""

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program | None:
        return find(self.model, args, kwargs)

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
        program = captured(self.model, args, kwargs)
        self._changes[id(program)] = changing(self.model, args, kwargs)
        return program

    def compiled(self, kind: Program, spec: ShardingSpec, rank: int, stages: Mapping[str, int]) -> Compiled:
        if spec.pipefusion_degree > 1:
            return compile_stage(kind, spec, rank, self.dump, stages, self._changes[id(kind)])
        return compile_program(kind, spec, rank, self.dump, self._changes[id(kind)])
