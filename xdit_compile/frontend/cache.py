"""Captured programs, kept with their model: each kind of call is captured once, whatever it is compiled for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from xdit_compile.frontend.capture import capture
from xdit_compile.frontend.opaque import modules_in
from xdit_compile.frontend.state import state_token
from xdit_compile.givenup import device_of
from xdit_compile.program import Program
from xdit_compile.structure import flatten, sharing


@dataclass(frozen=True)
class _Captured:
    program: Program
    modules: Mapping[str, nn.Module]
    """By path, those that the program calls themselves; all others it knows by what they hold."""

    def serves(self, model: nn.Module, tensors: Sequence[torch.Tensor]) -> bool:
        return self.program.guards.hold(tensors, model) and all(
            model.get_submodule(path) is module for path, module in self.modules.items())


@dataclass
class _Captures:
    programs: dict[Hashable, list[_Captured]] = field(default_factory=dict)
    """By kind of call; several where values that the model reads make a difference."""
    held: dict[int, Any] = field(default_factory=dict)
    """Objects whose identity is part of a key, by that, so that no other object gets it."""


_captures: WeakKeyDictionary[nn.Module, _Captures] = WeakKeyDictionary()


def captured(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """The program of ``model(*args, **kwargs)``, captured now unless a call of this kind was captured before."""
    return find(model, args, kwargs) or _capture(model, args, kwargs)


def find(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program | None:
    """The program of this kind of call, if it was captured before.

    A kind of call is all that shapes the graph: containers and Python values among the arguments, shapes, dtypes
    and devices of tensors, structure and state of the model, and the tensor values the model read.
    """
    kind, tensors = _kind(model, args, kwargs)
    known = _captures.setdefault(model, _Captures()).programs.get(kind, ())
    return next((c.program for c in known if c.serves(model, tensors)), None)


def _capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    program = capture(model, args, kwargs)
    known = _captures.setdefault(model, _Captures())
    kind, _ = _kind(model, args, kwargs)
    state_token(model, known.held)
    known.programs.setdefault(kind, []).append(_Captured(program, modules_in(program)))
    return program


def _kind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[torch.Tensor]]:
    tensors, structure = flatten((tuple(args), dict(kwargs)))
    looks = tuple((t.shape, t.dtype, device_of(t)) for t in tensors)
    return (structure.key(), looks, sharing(tensors), state_token(model)), tensors

