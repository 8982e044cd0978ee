"""From a model and a call to this rank's program: capture, plan, localize. Holds no state and starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from xdit_compile.frontend.gc_pause import gc_paused
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import bind_call
from xdit_compile.ir.output_spec import OutputSpec
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.program import Program
from xdit_compile.ir.step_inputs import step_inputs
from xdit_compile.passes import local_groups, localize, pass_digests, plan
from xdit_compile.passes.hoist import split_loop_invariant
from xdit_compile.passes.interpreter import Seeds
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram, parameters_of, shares_of
from xdit_compile.spec import ShardingSpec

Dump = Callable[[str, Program], None]


@dataclass(frozen=True)
class Compiled:
    """One captured call under one spec: the program as captured, in canonical form, where sharding begins, and one
    rank's program. As a stage of a pipeline a rank has several: ``local`` is the one for all patches.

    Attributes:
        body: what a rank runs of ``local`` at each step; invariant: the rest, run when its arguments have changed.
        changes: the names of the arguments that change at each step.
        groups: what this rank has of the model's parameters, where they come block by block.
    """

    captured: Program
    whole: Program
    seeds: Seeds
    local: Program
    body: Program
    invariant: Program | None = None
    changes: tuple[str, ...] = ()
    stage: StageProgram | None = None
    groups: tuple[ParameterGroup, ...] = ()

    @property
    def output_spec(self) -> OutputSpec:
        return self.captured.output_spec

    @property
    def unsharded(self) -> bool:
        return not self.seeds

    @property
    def lost(self) -> str:
        return next((n.text for n in self.whole.notes if n.kind == "seed" and self.seeds), "")

    @property
    def parameters(self) -> set[str]:
        return self.stage.parameters if self.stage else parameters_of(self.body, self.invariant)

    @property
    def shares(self) -> set[str]:
        return self.stage.shares if self.stage else shares_of(self.body, self.invariant)

    @cached_property
    def name(self) -> str:
        """Equal on ranks that would run the same program."""
        return _hash(str(self.digest()))

    def digest(self) -> dict[str, str]:
        """What all ranks must have decided alike, as short texts."""
        if self.stage is not None:
            notes = "; ".join([*map(str, self.stage.edges), *map(str, self.stage.cuts), *map(str, self.stage.blocks)])
        else:
            notes = "\n".join(str(n) for n in self.local.notes)
        return {
            "spec": str(self.whole.spec),
            "passes": _hash(str(pass_digests())),
            "seeds": "; ".join(f"{name} {layout}" for name, layout in self.seeds.items()),
            "operators": ", ".join(f"{n} {len(m.graph.nodes)} {_hash(m.code)}" for n, m in self.whole.functions()),
            "constants": " ".join(_hash(str(t.tolist())) for t in self.whole.constants.values() if t.numel() < 65536),
            "decisions": _hash(notes),
        }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


NONE: Mapping[int, str] = MappingProxyType({})


def compile_program(captured: Program, spec: ShardingSpec, rank: int = 0, dump: Dump | None = None,
                    changes: Mapping[int, str] = NONE, groups: Sequence[ParameterGroup] = ()) -> Compiled:
    """Rank ``rank``'s program for ``spec``; ``dump`` is called with each pass's name and result.

    Args:
        changes: which arguments change from step to step, as ``steps.step_inputs`` finds them.
        groups: those of the model's parameters, where they come block by block; by default, of the call's.
    """
    with gc_paused():
        whole, seeds = plan(captured, spec, groups)
        groups = local_groups(whole, seeds, groups, rank)
        local = localize(whole, seeds, rank, dump, groups=groups)
        invariant, body = split_invariant(captured, local, changes)
        return Compiled(captured, whole, seeds, local, body, invariant, tuple(changes.values()), groups=groups)


def split_invariant(captured: Program, local: Program, changes: Mapping[int, str]) -> tuple[Program | None, Program]:
    """What of ``local`` to keep from step to step, and the rest. All is the rest where there are no steps, and where
    the call itself changes its arguments."""
    if local.spec is None or local.spec.keep == "off" or not changes or captured.output_spec.changes_arguments:
        return None, local
    return split_loop_invariant(local, {f"arg_{i}" for i in changes})


def compile_call(model: nn.Module, spec: ShardingSpec, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int = 0,
                 dump: Dump | None = None) -> Compiled:
    """Capture ``model(*args, **kwargs)``, unless that was done before, and compile it."""
    bound = bind_call(model, args, kwargs)
    whole = captured(model, bound.args, bound.kwargs)
    return compile_program(whole, spec, rank, dump, step_inputs(model, bound.args, bound.kwargs),
                           parameter_groups(model) if spec.parts else ())
