"""Runs a local program: feeds it the model's parameters as they are now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from xdit_compile.ir.packed_tensors import OF, part, whole_name
from xdit_compile.ir.program import Input, Program, part_of
from xdit_compile.runtime.compilation.cuda_graphs import GraphedFunction, check_groups
from xdit_compile.runtime.compilation.inductor_backend import asks_for_graphs
from xdit_compile.runtime.compilation.regional import compiled
from xdit_compile.runtime.execution.loop_invariant_cache import CachedValues, LoopInvariantCache, version

_STAY = frozenset({"parameter", "constant", "cache", "parameter_share"})
"""Kinds of inputs whose memory is the same from call to call."""
_NAMED = ("once", "received")
_HELD = (("parameter",), ("constant",), ("parameter_share",), ("invariant",), _NAMED, ("cache",))
"""Kinds of inputs in the order in which a call collects them; arguments, of which some may not be used, come last."""

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
    """

    def __init__(self, program: Program, model: nn.Module, invariant: Program | None = None,
                 counts: Counter[str] | None = None, shares: Shares = NONE) -> None:
        assert program.spec is not None
        self.program = program
        self._run = compiled(program.main, program.spec)
        self._graphed = asks_for_graphs(program.spec) and _on_gpu(program)
        if self._graphed:
            self._run = GraphedFunction(self._run, [i.kind in _STAY for i in program.inputs])
        self._state = ParameterReader(model, [i for i in program.inputs if i.kind == "parameter"])
        self._constants = [program.constants[i.name] for i in program.inputs if i.kind == "constant"]
        self._shares = [shares[i.name] for i in program.inputs if i.kind == "parameter_share"]
        self._named = [i.name for i in program.inputs if i.kind in _NAMED]
        self._in_order = _order(program)
        self._invariant = None if invariant is None else Executor(invariant, model, shares=shares)
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
        return [(id(t), version(t)) for t in (*self._state.read(), *self._shares)]

    def __call__(self, tensors: Sequence[torch.Tensor], values: Mapping[str, torch.Tensor] = NONE,
                 caches: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        invariant = self._invariant_values(tensors)
        held = [*self._state.read(), *self._constants, *self._shares, *(invariant.values if invariant else ()),
                *(values[n] for n in self._named), *caches, *tensors]
        with torch.no_grad(), _as_captured():
            results = self._run(*map(held.__getitem__, self._in_order))
        # The caller may write into what the model returns.
        return results if invariant is None or self.program.part else tuple(map(invariant.apart, results))

    def _invariant_values(self, tensors: Sequence[torch.Tensor]) -> CachedValues | None:
        if (invariant := self._invariant) is None or self._cache is None:
            return None
        return self._cache(tensors, invariant._state.read(), lambda: invariant(tensors))


def _on_gpu(program: Program) -> bool:
    return any(n.meta["val"].device.type == "cuda" for n in program.main.graph.find_nodes(op="placeholder"))


def _order(program: Program) -> list[int]:
    """Where each input of a program is among all that a call has collected."""
    order = [i for kinds in _HELD for i, given in enumerate(program.inputs) if given.kind in kinds]
    places = {i: place for place, i in enumerate(order)}
    return [places[i] if i in places else len(places) + int(given.name.removeprefix("arg_"))
            for i, given in enumerate(program.inputs)]


def _as_captured() -> AbstractContextManager[Any]:
    """The caller's autocast is off: its casts are in the graph, and none where the model had switched it off."""
    if not torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return _NOTHING
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


class ParameterReader:
    """Parameters and buffers of a model by name, or this rank's part of them, looked up anew at each call: they and the
    modules that have them may have been replaced. No module is held, so that weights which are unloaded are freed."""

    def __init__(self, model: nn.Module, inputs: Sequence[Input]) -> None:
        self._model, names = model, [i.name for i in inputs]
        self._pieces = [(place, i.part) for place, i in enumerate(inputs) if i.part is not None]
        self._steps: list[tuple[int, str]] = []
        """How to come by every module that is needed: a child, by name, of the model (0) or of the n-th step's."""
        places = {"": 0}
        # In an artifact's model, parts are there by themselves.
        packed = [(i, name) for i, name in enumerate(names) if OF in name and not _holds(model, name)]
        self._packed = [(i, name.partition(OF)[2]) for i, name in packed]
        """Of packed tensors, which part, by place."""
        wholes = {i: whole_name(name) for i, name in packed}
        split = [wholes.get(i, name).rpartition(".") for i, name in enumerate(names)]
        self._leaves = [(self._place(path, places), leaf) for path, _, leaf in split]

    def _place(self, path: str, places: dict[str, int]) -> int:
        if path not in places:
            parent, _, child = path.rpartition(".")
            self._steps.append((self._place(parent, places), child))
            places[path] = len(self._steps)
        return places[path]

    def read(self) -> list[Any]:
        modules: list[Any] = [self._model]
        for parent, child in self._steps:
            modules.append(modules[parent]._modules[child])
        found = [m._parameters[leaf] if leaf in (m := modules[place])._parameters else m._buffers[leaf]
                 for place, leaf in self._leaves]
        for i, name in self._packed:
            found[i] = part(found[i], name)
        for i, piece in self._pieces:
            found[i] = part_of(found[i], piece)
        return found


def _holds(model: nn.Module, name: str) -> bool:
    """Whether a parameter or a buffer has this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return leaf in module._parameters or leaf in module._buffers
