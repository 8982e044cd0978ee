"""What all ranks choose alike: rank 0 plans by the figures of its machine, the others are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from xdit_compile.errors import SpecError, XditError
from xdit_compile.planner.auto import Auto
from xdit_compile.planner.calibrate import measure
from xdit_compile.planner.machine import Machine
from xdit_compile.runtime.parallel_group import ParallelGroup
from xdit_compile.spec import ShardingSpec


class AutoRunner:
    """Runs a model under a spec that is chosen at its first call."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._runner: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._runner is None:
            self._runner = self._make(args, kwargs)
        return self._runner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._runner is None:
            raise AttributeError(f"{name}: the spec is chosen at the first call, which was not made yet")
        return getattr(self._runner, name)

    @property
    def store(self) -> Any:
        """Shares of parameters, if there are some."""
        return None if self._runner is None else self._runner.store

    @property
    def programs(self) -> dict[int, Any]:
        """Of the calls made so far."""
        return {} if self._runner is None else self._runner.programs


def agreed_choice(auto: Auto, group: ParallelGroup, plan: Callable[[Machine], ShardingSpec]) -> ShardingSpec:
    """The spec that rank 0's ``plan`` gives for its machine, on all ranks of ``group``, which come to it together.

    Raises:
        XditError: what rank 0 raised, on all ranks.
    """
    here: Machine | None = None
    try:
        here = auto.machine_here() if group.rank == 0 else None
        said = "measure" if here is None else "known"
    except XditError as error:
        said = f"error: {error}"
    said = group.gather("what is known of this machine", said)[0]
    if said == "measure":
        if dist.is_initialized() and len(group.ranks) < dist.get_world_size():
            raise SpecError("auto on some of the ranks cannot measure the links between them; run xdit-compile "
                            "calibrate once, or name a machine: auto,machine=8xNAME")
        here = measure()
    elif said != "known":
        raise SpecError(said.removeprefix("error: "))
    chosen = ""
    if group.rank == 0:
        assert here is not None
        try:
            chosen = str(plan(here))
        except Exception as error:
            chosen = f"error: {error}"
    chosen = group.gather("the chosen spec", chosen)[0]
    if chosen.startswith("error: "):
        raise SpecError(chosen.removeprefix("error: "))
    return ShardingSpec.parse(chosen)
