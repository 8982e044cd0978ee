"""Objects that stand where a model or a pipeline stood: the same class to callers, other methods.

A stand-in and its original have one ``__dict__``. Its class is made for it alone: an instance that is made or copied
from it is one of the original's class, an ordinary model, and what is set on the class is set on the original's.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from xdit_compile.driver.edits import edits
from xdit_compile.driver.model_runner import ModelRunner
from xdit_compile.errors import XditError
from xdit_compile.frontend.mechanisms import COMPILED
from xdit_compile.ir.released_parameters import check_whole, device_of_model, moving, unmoved
from xdit_compile.runtime.execution.parameter_store import ParameterStore
from xdit_compile.runtime.parallel_group import ParallelGroup

GROUPS = "enable_group_offload"
"""A method of diffusers' models: weights wait on the host until a module of a group is called."""


class Parallel:
    """Marks a parallel model. ``runners`` holds, by the name of the method they serve, its programs."""

    runners: Mapping[str, ModelRunner]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `nn.Module.compile` would hand the call to Dynamo, which cannot look into collectives."""
        warnings.warn(f"compile() of a parallel {type(self).__name__} {COMPILED}", stacklevel=2)

    @property
    def _compiled_call_impl(self) -> None:
        # What ``Module.compile`` leaves on the original runs the original.
        return None

    @_compiled_call_impl.setter
    def _compiled_call_impl(self, _: Any) -> None:
        self.compile()


def parallel_model(model: nn.Module, runners: Mapping[str, ModelRunner]) -> Any:
    """An instance of a subclass of the model's class that shares everything but the methods named in ``runners``.

    A subclass, because callers test for the class and read its attributes; an instance of its own, because the
    caller's model must keep its methods. Both have one ``__dict__``: what is set on one is set on the other.
    """
    if hidden := (runners.keys() - {"forward"}) & vars(model).keys():
        raise XditError(f"the {hidden.pop()} of this {type(model).__name__} was replaced on the object, and would not "
                        "be part of the program; put it back first")
    members: dict[str, Any] = {name: _method(model, name, runner) for name, runner in runners.items()}
    if isinstance(inspect.getattr_static(type(model), "device", None), property):
        # Of parameters that are given up, where they were.
        members["device"] = property(device_of_model)
    members["_apply"] = moved(type(model))
    members |= edits(type(model), functools.partial(_shares, list(runners.values())))
    if hasattr(type(model), GROUPS):
        members[GROUPS] = _in_groups(getattr(type(model), GROUPS), list(runners.values()))
    return instance_of_subclass(model, Parallel, {**members, "runners": dict(runners)}, vars(model))


def _shares(runners: Sequence[ModelRunner]) -> tuple[ParameterStore, ParallelGroup] | None:
    """What this rank has of the parameters, and with whom; None as long as it has all."""
    return next(((r.store, r.group) for r in runners if r.store is not None), None)


def _in_groups(method: Callable[..., None], runners: Sequence[ModelRunner]) -> Callable[..., None]:
    """Offloading by groups of a parallel model, which its runners take over at the next call."""
    @functools.wraps(method)
    def enable(self: Any, *args: Any, **kwargs: Any) -> None:
        if not any(r.store is not None and r.store.offload for r in runners):  # else it is on
            check_whole(self, "offloaded by groups of modules")
            method(self, *args, **kwargs)

    return enable


def instance_of_subclass(original: Any, mixin: type, members: Mapping[str, Any], state: dict[str, Any]) -> Any:
    """An object with ``state`` as its attributes, of a class that only differs from the original's in ``members``
    and ``mixin``, and goes by its name."""
    cls = type(original)

    def ordinary(self: Any) -> Any:
        """The same object as one of the original's class."""
        return _made(cls, vars(self))

    def reduced(self: Any, protocol: Any) -> Any:
        if isinstance(self, nn.Module):
            check_whole(self, "pickled")
        how, what, *rest = ordinary(self).__reduce_ex__(protocol)
        # pickle insists that the usual way is of the object's own class.
        if how is copyreg.__newobj__:  # type: ignore[attr-defined]
            how, what = copyreg._reconstructor, (cls, object, None)  # type: ignore[attr-defined]
        return how, what, *rest

    def deep(self: Any, memo: dict[int, Any]) -> Any:
        if isinstance(self, nn.Module):
            check_whole(self, "copied with its parameters")
        return copy.deepcopy(ordinary(self), memo)

    made = _like(type(cls))(  # type: ignore[arg-type]
        cls.__name__, (mixin, cls), {
        **members, "_stands_for": cls, "__module__": cls.__module__, "__doc__": cls.__doc__,
        "__qualname__": cls.__qualname__, "__new__": lambda _, *args, **kwargs: cls(*args, **kwargs),
        "__reduce_ex__": reduced, "__copy__": lambda self: copy.copy(ordinary(self)),
        "__deepcopy__": deep,
        "__class__": property(type, _exchanged)})
    return _made(made, state)


def _made(cls: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    object.__setattr__(made, "__dict__", state)
    return made


@functools.cache
def _like(meta: type[type]) -> type[type]:
    """A kind of class that answers for the one it stands for: libraries compare types, and set attributes on the class
    of an object."""
    class StandIn(meta):  # type: ignore[valid-type, misc]
        def __setattr__(cls, name: str, value: Any) -> None:
            if "_stands_for" in vars(cls):
                setattr(cls._stands_for, name, value)
            else:
                super().__setattr__(name, value)

        def __delattr__(cls, name: str) -> None:
            if "_stands_for" in vars(cls):
                delattr(cls._stands_for, name)
            else:
                super().__delattr__(name)

        def __eq__(cls, other: object) -> bool:
            own = vars(cls).get("_stands_for", cls)
            return own is (vars(other).get("_stands_for", other) if isinstance(other, StandIn) else other)

        def __hash__(cls) -> int:
            return hash(vars(cls)["_stands_for"]) if "_stands_for" in vars(cls) else super().__hash__()

    return StandIn


def _stand_in(cls: type) -> Any:
    """The class that was made for an object, which others may have made subclasses of."""
    return next(c for c in cls.__mro__ if "_stands_for" in vars(c))


def _exchanged(self: Any, cls: type) -> None:
    """``self.__class__ = cls``: for another class the parallel methods would be lost."""
    if not issubclass(cls, _stand_in(type(self))):
        raise XditError(f"the class of a parallel {type(self).__name__} cannot be exchanged for {cls.__qualname__}, "
                        "which would compute everything on each rank; exchange that of the original before parallelize")
    object.__dict__["__class__"].__set__(self, cls)


class Method:
    """A parallel method, which goes before attributes of the same name on the object: those are the original's.

    What is assigned to it, as wrappers and hooks do, is called in its place, and is expected to call it.
    """

    def __init__(self, name: str, original: Callable[..., Any], function: Callable[..., Any],
                 take_over: Callable[[], bool] = lambda: False) -> None:
        self.name, self.function, self.reached, self.said = name, function, 0, False
        self.take_over = take_over
        """Does what something that was put here is there for, and takes that off; whether there was anything."""
        self._put: Callable[..., Any] | None = None

        # A function, because Dynamo looks for its file.
        @functools.wraps(original)
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.reached += 1
            return function(model, *args, **kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        given = inspect.signature(original)
        call.__signature__ = given.replace(parameters=[own, *given.parameters.values()])  # type: ignore[attr-defined]
        self._call = call

    def __get__(self, model: Any, cls: type) -> Any:
        if model is None:
            return getattr(_stand_in(cls)._stands_for, self.name)
        if torch.compiler.is_dynamo_compiling():
            # Not before: what it needs is as slow to import as PyTorch itself.
            from xdit_compile.driver.uncompiled import uncompiled

            return functools.partial(uncompiled, self, model)
        return MethodType(self._call, model) if self._put is None else self._put

    def __set__(self, model: Any, value: Any) -> None:
        self._put = None if value == MethodType(self._call, model) else self._through(model, value)

    def __delete__(self, model: Any) -> None:
        if self._put is None:
            raise AttributeError(self.name)
        self._put = None

    def _through(self, model: Any, value: Callable[..., Any]) -> Callable[..., Any]:
        """``value``, and a warning if it does not come to the parallel method."""
        known = over = False

        @functools.wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal known, over
            before, put = self.reached, self._put
            if over or (not known and (over := self.take_over())):
                # What was here before, or, under what was put here later, the parallel method.
                return (MethodType(self._call, model) if self._put is put else self.__get__(model, type(model)))(
                    *args, **kwargs)
            result = value(*args, **kwargs)
            if not known and self.reached == before:
                warnings.warn(f"the {self.name} that was put on this parallel {type(model).__name__} does not call the "
                              "one that was there: every rank computes all of it. Put it on the original before "
                              "parallelize, which makes it parallel", stacklevel=2)
            known = True
            return result

        return call


def _method(model: nn.Module, name: str, runner: ModelRunner) -> Method:
    """The method that hands its call to the runner."""
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Offloading moves a model's weights when forward is called; for other methods, the method itself asks for it.
        hook = vars(self).get("_hf_hook")
        if name != "forward" and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return runner(*args, **kwargs)

    return Method(name, getattr(model, name), method, getattr(runner, "take_over", lambda: False))


def moved(cls: Any) -> Callable[..., Any]:
    """Moving or casting a model: parameters that were given up remember where they would be."""
    def apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        with unmoved(self, fn):
            return cls._apply(self, moving(fn), recurse)

    return apply
