"""What code asks of what a tensor is, and not what it holds: whether it is a parameter, or contiguous, or needs
gradients, what attributes it has.

While a model is traced, others stand in for its tensors, and for those it is called with. They are *dressed* as what
they stand for; what differs all the same is answered by the tensor itself. Each answer about an argument or about state
is noted: a program serves only calls with the same answers. What nobody asks for makes no difference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.objects import MISSING, constants
from xdit_compile.ir.given_up import kind_of
from xdit_compile.ir.packed_tensors import is_packed, is_wrapper
from xdit_compile.ir.pytree import CONSTANTS

_ORIGIN = "_xdit_compile_origin"
_OURS = ("_xdit_compile_", "_dynamo_")
"""How attributes begin that this package and PyTorch's compiler put on tensors."""

STANDING_IN = (FakeTensor, FunctionalTensor)

_LAID_OUT: set[Any] = {Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset}
"""What views and results inherit from what they are made of."""
_METHODS: tuple[Callable[..., Any], ...] = (*_LAID_OUT, Tensor._is_view, Tensor.is_inference)
_ASKED: dict[Any, Callable[..., Any]] = {
    **{getattr(Tensor, n).__get__: attrgetter(n) for n in ("requires_grad", "is_leaf", "grad", "_version", "_base")},
    **dict(zip(_METHODS, _METHODS, strict=True))}
"""Functions that tell what a tensor is, and how to call them."""


def dress(stand_in: Tensor, original: Tensor) -> None:
    """Give a stand-in the attributes of the tensor that it stands for."""
    if stand_in is original:
        return
    state = vars(stand_in)
    for name, value in vars(original).items():
        if not (isinstance(original, FakeTensor) and _is_of_fakes(name)):
            state.setdefault(name, value)
    if isinstance(original, nn.Parameter):
        state["_is_param"] = True
    if not isinstance(original, FakeTensor):  # else that of the fake tensor, if it has one
        state[_ORIGIN] = original


def original_of(stand_in: Tensor) -> Tensor:
    """What a stand-in stands for, if it is one."""
    return vars(stand_in).get(_ORIGIN, stand_in)


def _is_of_fakes(name: str) -> bool:
    """Whether it is an attribute that fake tensors have for themselves, in this version of PyTorch."""
    return name in _names_of_fakes() or "_memo" in name


@cache
def _names_of_fakes() -> frozenset[str]:
    with torch._C.DisableTorchFunction():
        return frozenset(vars(FakeTensorMode().from_tensor(torch.empty(0)))) | {"_debug_trace"}


def check_dress(stand_in: Tensor, name: str, before: Mapping[str, Any]) -> None:
    """Refuse attributes that forward has set on a tensor that was there before it: they would be lost.

    Args:
        before: the stand-in's attributes when forward began.
    """
    now = vars(stand_in)
    for key in sorted(now.keys() | before.keys()):
        if now.get(key, MISSING) is not before.get(key, MISSING):
            raise CaptureError(f"the forward sets the attribute {key} of the tensor {name}; a program has no state. "
                               "Keep it outside of the model, or return it")


def attributes_of(tensor: Tensor, named: Collection[str] | None = None) -> dict[str, Any]:
    """Python attributes of a tensor, all or those with these names, but for ours. What is promised, or fake, has
    attributes of its own."""
    if kind_of(tensor) not in (Tensor, nn.Parameter) and not is_packed(tensor):
        return {}
    return {k: v for k, v in vars(tensor).items() if (named is None or k in named) and not k.startswith(_OURS)}


def marked(fake: Tensor) -> bool:
    """Whether somebody has set an attribute of a fake tensor that is nobody's stand-in."""
    return any(not _is_of_fakes(name) and not name.startswith("_") for name in vars(fake) if name != "elem")


@dataclass
class Looks:
    """What was asked of arguments and of state while a model was traced, and answered."""

    places: dict[int, int | str] = field(default_factory=dict, repr=False)
    """Indices of arguments and names of state, by identity; while the model is traced."""
    answers: dict[Any, tuple[int | str, Any, Any]] = field(default_factory=dict)
    laid_out: bool = False
    """Whether the layout of what is computed was asked for, which depends on that of arguments."""
    layouts: tuple[Any, ...] = ()
    named: frozenset[str] = frozenset()
    attributes: tuple[dict[str, Any], ...] = ()
    """Of arguments, those that are named in code."""
    _found: dict[str, weakref.ref[Any]] = field(default_factory=dict, repr=False)
    """State that was asked at the last call, by name."""

    @staticmethod
    def at(model: nn.Module, tensors: Sequence[Tensor]) -> Looks:
        """For a call of ``model``."""
        held = {id(t): f"{path}.{n}".lstrip(".") for path, m in model.named_modules()
                for group in (vars(m), m._buffers, m._parameters) for n, t in group.items() if isinstance(t, Tensor)}
        return Looks({**{id(t): i for i, t in enumerate(tensors)}, **held})

    def answer(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the tensor itself says that the first argument stands for; MISSING if it is to be asked."""
        if func not in _ASKED or not args or not isinstance(args[0], Tensor):
            return MISSING
        stand_in, ask = args[0], _ASKED[func]
        original = vars(stand_in).get(_ORIGIN)
        if original is None or (func in _LAID_OUT and stand_in.shape != original.shape):
            self.laid_out |= func in _LAID_OUT and isinstance(stand_in, STANDING_IN)
            return MISSING
        said = _ask(ask, original, args[1:], kwargs)
        place = self.places.get(id(original))
        if place is None:
            self.laid_out |= func in _LAID_OUT
        else:
            self.answers[place, func, repr((args[1:], kwargs))] = place, (ask, tuple(args[1:]), dict(kwargs)), said
        return said

    def settled(self, tensors: Sequence[Tensor], named: Iterable[str]) -> Looks:
        """As they are kept with a program: ``named`` are attributes that code names."""
        names = frozenset(named)
        return Looks({}, self.answers, self.laid_out, _layouts(tensors) if self.laid_out else (), names,
                     tuple(attributes_of(t, names) for t in tensors))

    def hold(self, tensors: Sequence[Tensor], model: nn.Module, changed: bool) -> bool:
        """Whether all would be answered the same for this call; ``changed``: whether state may be found elsewhere."""
        if self.laid_out and _layouts(tensors) != self.layouts:
            return False
        if any(vars(t) or had for t, had in zip(tensors, self.attributes, strict=True)) and not all(
                _alike(attributes_of(t, self.named), had) for t, had in zip(tensors, self.attributes, strict=True)):
            return False
        if changed:
            self._found.clear()
        with torch._C.DisableTorchFunction():
            for place, (ask, args, kwargs), said in self.answers.values():
                asked = tensors[place] if isinstance(place, int) else self._state(place, model)
                if asked is MISSING or not _same(ask(asked, *args, **kwargs), said):
                    return False
        return True

    def _state(self, place: str, model: nn.Module) -> Any:
        if (ref := self._found.get(place)) is not None and (found := ref()) is not None:
            return found
        try:
            found = attrgetter(place)(model)
        except AttributeError:
            return MISSING
        if not is_wrapper(found):  # these are swapped where their module is moved, which no weak reference survives
            self._found[place] = weakref.ref(found)
        return found


def _layouts(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(None if t.is_contiguous() else t.stride() for t in tensors)


def _ask(ask: Callable[..., Any], tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        return ask(tensor, *args, **kwargs)


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, tuple):
        return now == before  # of sizes
    return now is before or (constants(before) and type(now) is type(before) and repr(now) == repr(before))


def _alike(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return now.keys() == before.keys() and all(
        v is before[k] or (isinstance(v, CONSTANTS) and type(v) is type(before[k]) and repr(v) == repr(before[k]))
        for k, v in now.items())
