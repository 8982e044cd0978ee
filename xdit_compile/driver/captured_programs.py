"""Programs of a model's calls, captured and compiled in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from xdit_compile.driver.compile_call import Compiled, Dump, compile_program
from xdit_compile.driver.compile_stage import compile_stage
from xdit_compile.frontend.program_cache import captured, changes_of, find, state_of
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.ir.step_inputs import step_inputs
from xdit_compile.spec import ShardingSpec


class CapturedPrograms:
    """A source of programs: each kind of call is captured when it is new."""

    def __init__(self, model: nn.Module, dump: Dump | None = None) -> None:
        self.model, self.dump = model, dump
        self._changes: dict[int, Mapping[int, str]] = {}
        """By the identity of a program, which is kept with the model: which arguments change from step to step."""

    @property
    def changes(self) -> int:
        return changes_of(self.model)

    @property
    def state(self) -> object | None:
        return state_of(self.model)

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any], fresh: bool = False) -> Program | None:
        return find(self.model, args, kwargs, fresh)

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
        program = captured(self.model, args, kwargs)
        self._changes[id(program)] = step_inputs(self.model, args, kwargs)
        return program

    def compiled(self, kind: Program, spec: ShardingSpec, rank: int, stages: Mapping[str, int],
                 groups: Sequence[ParameterGroup] = ()) -> Compiled:
        if spec.pipefusion_degree > 1:
            return compile_stage(kind, spec, rank, self.dump, stages, self._changes[id(kind)], groups)
        return compile_program(kind, spec, rank, self.dump, self._changes[id(kind)], groups)
