"""From a model and a call to this rank's program: capture, plan, localize. Holds no state and starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from xdit_compile.frontend.capture import capture
from xdit_compile.passes import localize, plan
from xdit_compile.passes.shard import Seeds
from xdit_compile.program import Program
from xdit_compile.spec import ShardingSpec

Dump = Callable[[str, Program], None]


@dataclass(frozen=True)
class Compiled:
    """One captured call under one spec: the global program, where sharding begins, and one rank's program."""

    whole: Program
    seeds: Seeds
    local: Program

    def digest(self) -> dict[str, str]:
        """What all ranks must have decided alike, as short texts."""
        notes = "\n".join(str(n) for n in self.local.notes)
        return {
            "spec": str(self.whole.spec),
            "seeds": "; ".join(f"{name} dim {dim}: {new}" for name, (dim, new) in self.seeds.items()),
            "operators": str(sum(len(m.graph.nodes) for _, m in self.whole.functions())),
            "decisions": hashlib.blake2b(notes.encode(), digest_size=16).hexdigest(),
        }


def compile_call(model: nn.Module, spec: ShardingSpec, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int = 0,
                 dump: Dump | None = None) -> Compiled:
    """Capture ``model(*args, **kwargs)`` and make rank ``rank``'s program for ``spec``."""
    whole, seeds = plan(capture(model, args, kwargs), spec)
    return Compiled(whole, seeds, localize(whole, seeds, rank, dump))
