"""From a model and a call to this rank's program: capture, plan, localize. Holds no state and starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from xdit_compile.errors import SpecError
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
from xdit_compile.passes.recorded import analysed
from xdit_compile.passes.step_cache import find_cut, localize_parts, parts_of
from xdit_compile.runtime.execution.cached_step import CachedStep
from xdit_compile.runtime.execution.displaced_step import DisplacedStep
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
        step: the programs that are run in place of ``body``, where steps may leave blocks out, or have of other ranks
            what these had a step before.
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
    step: CachedStep | DisplacedStep | None = None

    @property
    def output_spec(self) -> OutputSpec:
        return self.captured.output_spec

    @property
    def left_out(self) -> tuple[str, ...]:
        """The paths of blocks that a step may leave out."""
        return self.step.left_out if isinstance(self.step, CachedStep) else ()

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
        parts = None
        if spec.cache != "none":
            whole, cut = analysed("step_cache", find_cut, whole, lambda p: find_cut(p, {f"arg_{i}" for i in changes}),
                                  lambda cut: {"block": len(cut.left_out)})
            parts = parts_of(cut)
        groups = local_groups(whole, seeds, groups, rank)
        local = localize(whole, seeds, rank, dump, groups=groups)
        invariant, body = split_invariant(captured, local, changes)
        step: CachedStep | DisplacedStep | None = None
        if spec.displaced == "yes":
            if not changes or captured.output_spec.changes_arguments:
                raise SpecError(f"{spec}: a call of the model without a time, or that writes into its arguments, is no "
                                "step of a loop; leave displaced out")
            exact, local = local, localize(whole, seeds, rank, late=True, groups=groups)
            late = split_invariant(captured, local, changes)[::-1]
            step = DisplacedStep(split_invariant(captured, exact, changes)[::-1], late)
            body, invariant = late
        if parts is not None:
            mine = localize_parts(parts, seeds, rank, groups)
            head, blocks, rest = (split_invariant(captured, p, changes)[::-1]
                                  for p in (mine.head, mine.blocks, mine.rest))
            step = CachedStep(head, blocks, rest, mine.passed, mine.leaving, mine.streams, mine.left_out,
                              mine.all_blocks)
        return Compiled(captured, whole, seeds, local, body, invariant, tuple(changes.values()), groups=groups,
                        step=step)


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
