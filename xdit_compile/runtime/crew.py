"""The processes that run one parallel model, or all models of one pipeline, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch.distributed as dist

from xdit_compile.runtime.control import Control
from xdit_compile.runtime.groups import Groups, forget, make_group
from xdit_compile.runtime.turns import Turns
from xdit_compile.spec import ShardingSpec


class Crew:
    """A spec, the global ranks that carry it out, in the order of its mesh, and how they agree and fail.

    Attributes:
        rank: this process's place among them.
        timeout: seconds to wait for another rank.
        calls, shared: how many calls of parallel models its ranks have made, and how many of them all ranks computed.
    """

    def __init__(self, spec: ShardingSpec, ranks: Sequence[int], timeout: float) -> None:
        self.spec, self.ranks, self.timeout = spec, tuple(ranks), timeout
        self.rank = 0 if len(ranks) == 1 else self.ranks.index(dist.get_rank())
        self.control = Control(self.ranks, timeout)
        self.calls, self.shared = 0, 0

    @cached_property
    def groups(self) -> Groups:
        return Groups(self.spec, self.ranks, self.timeout)

    @cached_property
    def turns(self) -> Turns | None:
        """Where calls can be shared out among groups. All ranks ask for it together the first time."""
        return Turns(self.spec, self.ranks, self.control, self.timeout) if self.spec.cfg_degree > 1 else None

    @cached_property
    def part(self) -> Crew | None:
        """The group that this rank takes turns with, if there are several. All its ranks ask for it together."""
        if self.turns is None:
            return None
        spec = replace(self.spec, cfg_degree=1)
        return Crew(spec, self.turns.members(spec, self.ranks), self.timeout)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank holds, in order: any object that can be pickled."""
        everyone: list[Any] = [mine]
        if len(self.ranks) > 1:
            everyone *= len(self.ranks)
            dist.all_gather_object(everyone, mine, group=make_group("xdit_compile.all", self.ranks, self.timeout))
        return everyone

    def forget(self) -> None:
        """Use no group again: a collective failed."""
        known = vars(self)
        if "groups" in known:
            self.groups.forget()
        if "turns" in known and self.turns is not None:
            forget([self.turns.group])
        if "part" in known and self.part is not None:
            self.part.forget()
