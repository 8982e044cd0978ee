"""Captured programs, kept with their model: each kind of call is captured once, whatever it is compiled for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from xdit_compile.frontend.capture import capture
from xdit_compile.frontend.known import digest
from xdit_compile.frontend.state import device_of, state_token
from xdit_compile.program import Program
from xdit_compile.structure import flatten


@dataclass
class _Captures:
    """``reads``: by kind of call, the arguments whose values its programs depend on. ``programs``: by kind of call
    and those values."""

    reads: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)
    programs: dict[Hashable, Program] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)
    """Objects whose identity is part of a key, so that no other object gets it."""


_captures: WeakKeyDictionary[nn.Module, _Captures] = WeakKeyDictionary()


def captured(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """The program of ``model(*args, **kwargs)``, captured now unless a call of this kind was captured before.

    A kind of call is all that shapes the graph: containers and Python values among the arguments, shapes, dtypes
    and devices of tensors, structure and state of the model, and the tensor values the model read.
    """
    tensors, structure = flatten((tuple(args), dict(kwargs)))
    kind = (structure.key(), tuple((t.shape, t.dtype, device_of(t)) for t in tensors), state_token(model))
    known = _captures.setdefault(model, _Captures())

    def key(reads: Sequence[int]) -> Hashable:
        return kind, tuple(digest(tensors[i]) for i in reads)

    reads = known.reads.get(kind)
    if reads is None or key(reads) not in known.programs:
        program = capture(model, args, kwargs)
        state_token(model, known.held)
        known.reads[kind] = reads = program.reads
        known.programs[key(reads)] = program
    return known.programs[key(reads)]
