"""Captured programs, kept with their model: each kind of call is captured once, whatever it is compiled for."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.caller import surroundings
from xdit_compile.frontend.capture import recorded
from xdit_compile.frontend.model_state import ARGUMENT, Description, ambient, describe
from xdit_compile.frontend.objects import CAPTURES
from xdit_compile.frontend.opaque_modules import modules_in
from xdit_compile.frontend.reads import Reads
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import sharing, taken_apart
from xdit_compile.ir.released_parameters import device_of


@dataclass
class _Captured:
    """A program and what it was made for."""

    program: Program
    reads: Reads
    states: list[Description]
    """Of the model and all else: as they were, and as a call leaves them."""
    modules: Mapping[str, nn.Module]
    """By path, those that the program calls themselves; all others it knows by what they hold."""
    found: Description
    """Which of them the last call found."""
    others: Sequence[Any]
    """Arguments that their kind says nothing of: they are compared by what they hold, as if they were the model's."""
    places: Sequence[int | None]
    """Of containers among the arguments, which the model knows by another way too: it may ask whether they are one."""
    own: Sequence[int | None]
    """Which arguments are tensors of the model's."""
    effects: Sequence[Callable[[], None]]
    """What each call does beside its results: it puts tables, or what it saw of its arguments, into their places."""

    def reads_alike(self, model: nn.Module, tensors: Sequence[torch.Tensor], changed: bool) -> bool:
        """Whether what the model reads of arguments is the same, and modules that are called as they are."""
        return self.reads.looks.hold(tensors, model, changed) and self.program.guards.hold(tensors, model) and all(
            model.get_submodule(path) is module for path, module in self.modules.items())

    def same_state(self, model: nn.Module, call: _Call, fresh: bool) -> tuple[bool, bool, bool]:
        """Whether the model, objects among the arguments and all else are as they were; whether all had to be looked at
        to know; and whether something is another than before, be it a parameter alone."""
        alike = len(call.others) == len(self.others) and all(map(operator.is_, call.others, self.others))
        state = next((s for s in self.states if s.watch.holds(fresh)), None) if alike else None
        looked, changed = state is None, False
        if state is None:
            state = describe(model, self.reads, self.program.constants, call.others)
            before = next((s for s in self.states if s.value == state.value), None)
            if before is None:
                return False, True, True
            # Most of what is written into is not what was watched: Python imports into the names of packages.
            changed = not state.watch.has_tensors_of(before.watch)
            # What was watched of other objects says nothing of these.
            self.states = [state if s.value == state.value else s for s in self.states] if alike else [state]
            self.others = call.others
        self.found = state
        own = [state.own.get(id(t)) for t in call.tensors]
        return call.places(state) == self.places and own == self.own, looked, changed


@dataclass(frozen=True)
class _Call:
    """What a call is made with."""

    kind: Hashable
    tensors: list[torch.Tensor]
    others: Sequence[Any]
    containers: Sequence[Any]

    def places(self, description: Description) -> list[int | None]:
        """Of each container, its identity if the model knows it by another way too."""
        return [id(c) if id(c) in description.held else None for c in self.containers]


@dataclass
class _Captures:
    """What was captured of a model, by kind of call; several where state, or values that the model reads, make a
    difference. The one used last comes first."""

    owner: Callable[[], nn.Module | None] = lambda: None
    """The model. A shallow copy of it brings this object along, which is not its own."""
    programs: dict[Hashable, list[_Captured]] = field(default_factory=dict)
    changes: int = 0
    """How often something was found to have changed."""
    state: object | None = None
    """Stands for the model as the last call found it."""

    def __deepcopy__(self, _: Any) -> _Captures:
        return _Captures()

    def __reduce__(self) -> tuple[type[_Captures], tuple[()]]:
        return _Captures, ()


def captured(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """The program of ``model(*args, **kwargs)``, captured now unless a call of this kind was captured before."""
    return find(model, args, kwargs, fresh=True) or _capture(model, args, kwargs)


def find(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], fresh: bool = False) -> Program | None:
    """The program of this kind of call, if it was captured before.

    A kind of call is all that shapes the graph: containers and Python values among the arguments, shapes, dtypes
    and devices of tensors, structure and state of the model and of what else it reads, and the tensor values it read.

    Args:
        fresh: whether this is the first step of a loop, or no step of any: what is costly to compare is compared too.
    """
    call = _call(args, kwargs)
    captures = _captures_of(model)
    known = captures.programs.get(call.kind, [])
    for i, candidate in enumerate(known):
        same, looked, changed = candidate.same_state(model, call, fresh)
        captures.changes += changed
        if same and candidate.reads_alike(model, call.tensors, looked):
            known.insert(0, known.pop(i))
            # What a call puts into the model comes after that was looked at.
            captures.state = None if candidate.effects else candidate.found.watch.mark
            for effect in candidate.effects:
                effect()
            return candidate.program
    return None


def changes_of(model: nn.Module) -> int:
    """How often a call met a model that had changed since its program was used."""
    return _captures_of(model).changes


def state_of(model: nn.Module) -> object | None:
    """What stands for the model as the last call has found it: the same object as long as its tensors are the same and
    look the same."""
    return _captures_of(model).state


def _captures_of(model: nn.Module) -> _Captures:
    # On the model, not beside it: what is kept may lead to the model, and is freed with it all the same.
    found = vars(model).get(CAPTURES)
    if found is None or found.owner() is not model:
        found = vars(model)[CAPTURES] = _Captures(weakref.ref(model))
    return found


def _capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    program, reads, effects = recorded(model, args, kwargs)
    call = _call(args, kwargs)
    states = [describe(model, reads, program.constants, call.others)]
    for effect in effects:
        effect()
    states += [describe(model, reads, program.constants, call.others)] if effects else []
    named = reads.names()
    if unseen := [path for path in states[0].streams if path.startswith(ARGUMENT) or (
            path.rpartition(".")[2].partition("[")[0] in named)]:
        raise CaptureError(f"the forward of {type(model).__name__} can read {unseen[0]}, which cannot be watched for "
                           "changes; keep it outside of the model, or hold a list or a number instead")
    own = [states[-1].own.get(id(t)) for t in call.tensors]
    made = _Captured(program, reads, states[::-1], modules_in(program), states[-1], call.others,
                     call.places(states[-1]), own, effects)
    captures = _captures_of(model)
    captures.programs.setdefault(call.kind, []).insert(0, made)
    # A program may yet put something into the model.
    captures.state = None
    return program


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
    tensors, structure, containers = taken_apart((tuple(args), dict(kwargs)))
    looks = tuple((t.shape, t.dtype, device_of(t), type(t) is nn.Parameter) for t in tensors)
    kind = structure.kind(), looks, sharing(tensors), ambient(), surroundings()
    return _Call(kind, tensors, structure.others(), containers)
