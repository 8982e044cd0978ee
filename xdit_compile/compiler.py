"""From a model and a call to this rank's program: capture, plan, localize. Holds no state and starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from xdit_compile.answer import Answer
from xdit_compile.frontend.cache import captured
from xdit_compile.garbage import uncollected
from xdit_compile.passes import localize, plan
from xdit_compile.passes.shard import Seeds
from xdit_compile.program import Program
from xdit_compile.runtime.flow import StageProgram
from xdit_compile.spec import ShardingSpec

Dump = Callable[[str, Program], None]


@dataclass(frozen=True)
class Compiled:
    """One captured call under one spec: the program as captured, in canonical form, where sharding begins, and one
    rank's program. As a stage of a pipeline a rank has several: ``local`` is the one for all patches."""

    captured: Program
    whole: Program
    seeds: Seeds
    local: Program
    stage: StageProgram | None = None

    @property
    def answer(self) -> Answer:
        return self.captured.answer

    @property
    def idle(self) -> bool:
        return not self.seeds

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


def compile_program(captured: Program, spec: ShardingSpec, rank: int = 0, dump: Dump | None = None) -> Compiled:
    """Rank ``rank``'s program for ``spec``; ``dump`` is called with each pass's name and result."""
    with uncollected():
        whole, seeds = plan(captured, spec)
        return Compiled(captured, whole, seeds, localize(whole, seeds, rank, dump))


def compile_call(model: nn.Module, spec: ShardingSpec, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int = 0,
                 dump: Dump | None = None) -> Compiled:
    """Capture ``model(*args, **kwargs)``, unless that was done before, and compile it."""
    return compile_program(captured(model, args, kwargs), spec, rank, dump)
