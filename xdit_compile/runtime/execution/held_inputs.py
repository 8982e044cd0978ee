"""What a program takes that stays from call to call: the model's parameters as they are now, constants, shares."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from xdit_compile.ir.packed_tensors import OF, part, whole_name
from xdit_compile.ir.program import Input, part_of

State = Callable[[], object | None]
"""What tells a model as it is in this call from others that it was: the same object as long as its parameters and
buffers are the same tensors and look the same. None where nobody looks at it."""


def unwatched() -> None:
    """The `State` of a model that nobody looks at."""


class HeldInputs:
    """Parameters, and others that stay, in an order in which each may come more than once.

    No parameter is held on to, so that weights which are unloaded are freed.

    Args:
        reader: of the parameters; others: what comes after them, which is kept elsewhere too.
        order: places among both.
    """

    def __init__(self, reader: ParameterReader, others: Sequence[torch.Tensor], order: Sequence[int],
                 state: State) -> None:
        self._reader, self._others, self._order, self._state = reader, others, order, state
        self._known: object | None = None
        """The state in which ``_refs`` are what is to be read."""
        self._refs: list[weakref.ref[torch.Tensor]] = []
        self._mark: object | None = None

    def read(self) -> tuple[list[torch.Tensor], object | None]:
        """These tensors, and what is the same object as long as they are the same and look the same."""
        state = self._state()
        if state is not None and state is self._known:
            return [ref() for ref in self._refs], self._mark  # type: ignore[misc]
        found = [*self._reader.read(), *self._others]
        held = [found[i] for i in self._order]
        # Parts of tensors are made anew each time.
        self._known = None if self._reader.takes_parts else state
        self._refs, self._mark = [], None
        if self._known is not None:
            watch = weakref.ref(self)

            def gone(_: object) -> None:
                if (it := watch()) is not None:
                    it._known = None

            self._refs, self._mark = [weakref.ref(t, gone) for t in held], object()
        return held, self._mark


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

    @property
    def takes_parts(self) -> bool:
        """Whether some of what is read is made for it."""
        return bool(self._pieces or self._packed)

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
