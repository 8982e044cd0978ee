"""From a model and a call to this rank's program: capture, plan, localize. Holds no state and starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from xdit_compile.answer import Answer
from xdit_compile.calls import bind_call
from xdit_compile.frontend.cache import captured
from xdit_compile.garbage import uncollected
from xdit_compile.passes import localize, plan
from xdit_compile.passes.hoist import kept_apart
from xdit_compile.passes.shard import Seeds
from xdit_compile.program import Program
from xdit_compile.runtime.flow import StageProgram, parameters_of
from xdit_compile.spec import ShardingSpec
from xdit_compile.steps import changing

Dump = Callable[[str, Program], None]


@dataclass(frozen=True)
class Compiled:
    """One captured call under one spec: the program as captured, in canonical form, where sharding begins, and one
    rank's program. As a stage of a pipeline a rank has several: ``local`` is the one for all patches.

    Attributes:
        body: what a rank runs of ``local`` at each step; steady: the rest, run when its arguments have changed.
        changes: the names of the arguments that change at each step.
    """

    captured: Program
    whole: Program
    seeds: Seeds
    local: Program
    body: Program
    steady: Program | None = None
    changes: tuple[str, ...] = ()
    stage: StageProgram | None = None

    @property
    def answer(self) -> Answer:
        return self.captured.answer

    @property
    def idle(self) -> bool:
        return not self.seeds

    @property
    def lost(self) -> str:
        return next((n.text for n in self.whole.notes if n.kind == "seed" and self.seeds), "")

    @property
    def parameters(self) -> set[str]:
        return self.stage.parameters if self.stage else parameters_of(self.body, self.steady)

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
            "seeds": "; ".join(f"{name} {layout}" for name, layout in self.seeds.items()),
            "operators": ", ".join(f"{n} {len(m.graph.nodes)} {_hash(m.code)}" for n, m in self.whole.functions()),
            "constants": " ".join(_hash(str(t.tolist())) for t in self.whole.constants.values() if t.numel() < 65536),
            "decisions": _hash(notes),
        }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


NONE: Mapping[int, str] = MappingProxyType({})


def compile_program(captured: Program, spec: ShardingSpec, rank: int = 0, dump: Dump | None = None,
                    changes: Mapping[int, str] = NONE) -> Compiled:
    """Rank ``rank``'s program for ``spec``; ``dump`` is called with each pass's name and result.

    Args:
        changes: which arguments change from step to step, as ``steps.changing`` finds them.
    """
    with uncollected():
        whole, seeds = plan(captured, spec)
        local = localize(whole, seeds, rank, dump)
        steady, body = parted(captured, local, changes)
        return Compiled(captured, whole, seeds, local, body, steady, tuple(changes.values()))


def parted(captured: Program, local: Program, changes: Mapping[int, str]) -> tuple[Program | None, Program]:
    """What of ``local`` to keep from step to step, and the rest. All is the rest where there are no steps, and where
    the call itself changes its arguments."""
    if local.spec is None or local.spec.keep == "off" or not changes or captured.answer.changes_arguments:
        return None, local
    return kept_apart(local, {f"arg_{i}" for i in changes})


def compile_call(model: nn.Module, spec: ShardingSpec, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int = 0,
                 dump: Dump | None = None) -> Compiled:
    """Capture ``model(*args, **kwargs)``, unless that was done before, and compile it."""
    bound = bind_call(model, args, kwargs)
    whole = captured(model, bound.args, bound.kwargs)
    return compile_program(whole, spec, rank, dump, changing(model, bound.args, bound.kwargs))
