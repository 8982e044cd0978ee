"""Captured programs, kept with their model: each kind of call is captured once, whatever it is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.caller import surroundings
from xdit_compile.frontend.capture import recorded
from xdit_compile.frontend.model_state import Description, ambient, describe
from xdit_compile.frontend.objects import CAPTURES
from xdit_compile.frontend.opaque_modules import modules_in
from xdit_compile.frontend.reads import Reads
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten, sharing
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
    effects: Sequence[Callable[[], None]]
    """What each call does beside its results: it puts tables, or what it saw of its arguments, into their places."""

    def reads_alike(self, model: nn.Module, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether what the model reads of arguments is the same, and modules that are called as they are."""
        return self.program.guards.hold(tensors, model) and all(
            model.get_submodule(path) is module for path, module in self.modules.items())

    def same_state(self, model: nn.Module, fresh: bool) -> tuple[bool, bool]:
        """Whether the model and all else are as they were, and whether all had to be looked at to know."""
        if any(state.watch.holds(fresh) for state in self.states):
            return True, False
        now = describe(model, self.reads, self.program.constants)
        self.states = [now if now.value == state.value else state for state in self.states]
        return any(state is now for state in self.states), True


@dataclass
class _Captures:
    """What was captured of a model, by kind of call; several where state, or values that the model reads, make a
    difference. The one used last comes first."""

    programs: dict[Hashable, list[_Captured]] = field(default_factory=dict)
    changes: int = 0
    """How often something was found to have changed."""

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
    kind, tensors = _kind(args, kwargs)
    captures = _captures_of(model)
    known = captures.programs.get(kind, [])
    for i, candidate in enumerate(known):
        same, looked = candidate.same_state(model, fresh)
        captures.changes += looked
        if same and candidate.reads_alike(model, tensors):
            known.insert(0, known.pop(i))
            for effect in candidate.effects:
                effect()
            return candidate.program
    return None


def changes_of(model: nn.Module) -> int:
    """How often a call met a model that had changed since its program was used."""
    return _captures_of(model).changes


def _captures_of(model: nn.Module) -> _Captures:
    # On the model, not beside it: what is kept may lead to the model, and is freed with it all the same.
    return vars(model).setdefault(CAPTURES, _Captures())


def _capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    program, reads, effects = recorded(model, args, kwargs)
    states = [describe(model, reads, program.constants)]
    for effect in effects:
        effect()
    states += [describe(model, reads, program.constants)] if effects else []
    named = reads.names()
    if unseen := [path for path in states[0].streams if path.rpartition(".")[2].partition("[")[0] in named]:
        raise CaptureError(f"the forward of {type(model).__name__} can read {unseen[0]}, which cannot be watched for "
                           "changes; keep it outside of the model, or hold a list or a number instead")
    kind, _ = _kind(args, kwargs)
    made = _Captured(program, reads, states[::-1], modules_in(program), effects)
    _captures_of(model).programs.setdefault(kind, []).insert(0, made)
    return program


def _kind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[torch.Tensor]]:
    tensors, structure = flatten((tuple(args), dict(kwargs)))
    looks = tuple((t.shape, t.dtype, device_of(t)) for t in tensors)
    return (structure.key(), looks, sharing(tensors), ambient(), surroundings()), tensors
