"""Runs a local program: feeds it the model's parameters as they are now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.distributed import ProcessGroup

from xdit_compile.ir.program import Program
from xdit_compile.runtime.compilation.cuda_graphs import GraphedFunction, check_groups
from xdit_compile.runtime.compilation.graph_segments import Function
from xdit_compile.runtime.compilation.inductor_backend import asks_for_graphs
from xdit_compile.runtime.compilation.regional import compiled
from xdit_compile.runtime.compilation.straight_line import StraightLine
from xdit_compile.runtime.execution.held_inputs import HeldInputs, ParameterReader, State, unwatched
from xdit_compile.runtime.execution.loop_invariant_cache import CachedValues, LoopInvariantCache, version

_STAY = frozenset({"parameter", "constant", "cache", "parameter_share"})
"""Kinds of inputs whose memory is the same from call to call."""
_HELD = ("parameter", "constant", "parameter_share")
"""Kinds of inputs that are the same tensors from call to call, in the order in which they are collected."""
_NAMED = ("once", "received")
_GIVEN = (("invariant",), _NAMED, ("cache",))
"""Kinds of all others in this order; arguments, of which some may not be used, come last."""

NONE: Mapping[str, torch.Tensor] = MappingProxyType({})
Shares = Mapping[str, torch.Tensor]
"""What this rank holds of each group of parameters, by the groups' names."""
_NOTHING = nullcontext()


class Executor:
    """A program bound to a model: called with the flat argument tensors, it returns the flat results.

    That of a stage also takes what was computed ``once`` or ``received``, by name, and the caches it keeps.

    Args:
        invariant: computes what the program takes as ``invariant``; its results are, from call to call.
        counts: counts the calls that used them again, in ``kept``.
        shares: of the parameters that come block by block.
        state: tells the model as it is from how it was.
    """

    def __init__(self, program: Program, model: nn.Module, invariant: Program | None = None,
                 counts: Counter[str] | None = None, shares: Shares = NONE, state: State = unwatched) -> None:
        assert program.spec is not None
        self.program = program
        self._graphed = asks_for_graphs(program.spec) and _on_gpu(program)
        main, inputs = compiled(program.main, program.spec), program.inputs
        if self._graphed:
            main = _at_once(GraphedFunction(main, [i.kind in _STAY for i in inputs]), len(inputs))
        self._line = StraightLine(main, [i.kind in _HELD for i in inputs])
        places = {place: i for i, place in enumerate(p for kind in _HELD for p, i in enumerate(inputs)
                                                     if i.kind == kind)}
        others = [program.constants[i.name] if kind == "constant" else shares[i.name]
                  for kind in _HELD[1:] for i in inputs if i.kind == kind]
        self.held = HeldInputs(ParameterReader(model, [i for i in inputs if i.kind == "parameter"]), others,
                               [places[p] for p in self._line.order], state)
        self._named = [i.name for i in inputs if i.kind in _NAMED]
        self._given = _order(program)
        self._invariant = None if invariant is None else Executor(invariant, model, shares=shares, state=state)
        self._cache = None if invariant is None else LoopInvariantCache(
            [int(i.name.removeprefix("arg_")) for i in invariant.inputs if i.kind == "argument"],
            Counter() if counts is None else counts)

    @property
    def programs(self) -> tuple[Program, ...]:
        """All that a call may run."""
        return (self.program, *(self._invariant.programs if self._invariant else ()))

    def check_groups(self, groups: Sequence[ProcessGroup]) -> None:
        """Refuse groups whose collectives cannot be part of what runs.

        Raises:
            XditError: as `cuda_graphs.check_groups`.
        """
        if self._graphed:
            check_groups(groups)

    def forget(self, suspect: bool = False) -> None:
        """Keep nothing of the steps so far; ``suspect``: as `LoopInvariantCache.forget`."""
        if self._cache is not None:
            self._cache.forget(suspect)

    def versions(self) -> list[tuple[int, int | None]]:
        """What tells the weights from those of another call, as far as PyTorch counts writes into them."""
        return [(id(t), version(t)) for t in self.held.read()[0]]

    def __call__(self, tensors: Sequence[torch.Tensor], values: Mapping[str, torch.Tensor] = NONE,
                 caches: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        invariant = self._invariant_values(tensors)
        given = [*(invariant.values if invariant else ()), *(values[n] for n in self._named), *caches, *tensors]
        with torch.no_grad(), _as_captured():
            results = self._line([given[i] for i in self._given], *self.held.read())
        # The caller may write into what the model returns.
        return results if invariant is None or self.program.part else tuple(map(invariant.apart, results))

    def _invariant_values(self, tensors: Sequence[torch.Tensor]) -> CachedValues | None:
        if (invariant := self._invariant) is None or self._cache is None:
            return None
        return self._cache(tensors, invariant.held.read()[0], lambda: invariant(tensors))


def _at_once(function: Function, inputs: int) -> fx.GraphModule:
    """A graph that is one call of a function."""
    graph = fx.Graph()
    graph.output(graph.call_module("all", tuple(graph.placeholder(f"input_{i}") for i in range(inputs))))
    return fx.GraphModule({"all": function}, graph)


def _on_gpu(program: Program) -> bool:
    return any(n.meta["val"].device.type == "cuda" for n in program.main.graph.find_nodes(op="placeholder"))


def _order(program: Program) -> list[int]:
    """Where each input of a program that may be another at each call is among all that a call has collected."""
    order = [i for kinds in _GIVEN for i, given in enumerate(program.inputs) if given.kind in kinds]
    places = {i: place for place, i in enumerate(order)}
    return [places[i] if i in places else len(places) + int(given.name.removeprefix("arg_"))
            for i, given in enumerate(program.inputs) if given.kind not in _HELD]


def _as_captured() -> AbstractContextManager[Any]:
    """The caller's autocast is off: its casts are in the graph, and none where the model had switched it off."""
    if not torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return _NOTHING
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
