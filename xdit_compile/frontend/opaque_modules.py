"""Modules that no graph can hold are left in Python: one opaque operator, called with their parameters and inputs.

A mixture of experts that counts tokens in numpy, say: what it does depends on values that weights make. The
operator has no rule, so its inputs are gathered and every rank computes it whole, which the report says.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from xdit_compile.errors import XditError
from xdit_compile.frontend.caller import Autocast, autocast_as, autocast_now
from xdit_compile.frontend.concrete_values import plain
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import Structure, flatten

_library = torch.library.Library("xdit_compile", "FRAGMENT")
_library.define("python(str name, Tensor[] inputs) -> Tensor[]")
OPAQUE = torch.ops.xdit_compile.python.default

VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What PyTorch raises when tracing would need a value; and see ``_needs_a_value``."""

Shape = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class _Left:
    """A module left in Python, at a path of the model: as a function of the flat inputs, and what that returns.

    ``autocast`` is as it was where the model called it: programs run with autocast off.
    """

    module: nn.Module
    path: str
    function: Callable[..., Any]
    shapes: list[Shape]
    autocast: Autocast


_calls: dict[str, _Left] = {}
"""By name. Programs refer to them as long as the process lives."""


def _python(name: str, inputs: list[Tensor]) -> list[Tensor]:
    function, shapes = _calls[name].function, _calls[name].shapes
    # Exchanges leave other strides than the model would see, and its code may take views.
    with autocast_as(_calls[name].autocast):
        results, _ = flatten(function([x.contiguous() for x in inputs]))
    if [(r.shape, r.dtype) for r in results] != shapes:
        raise XditError(f"{name} is left in Python and returned {[tuple(r.shape) for r in results]}, but "
                        f"{[tuple(s) for s, _ in shapes]} when it was captured")
    return [r.clone() for r in results]


_library.impl("python", _python, "CPU")
_library.impl("python", _python, "CUDA")


@torch.library.register_fake("xdit_compile::python", lib=_library)
def _fake(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in _calls[name].shapes]


def path_of(name: str) -> str:
    """Where in the model the module is that a program calls by this name."""
    return _calls[name].path


def modules_in(program: Program) -> dict[str, nn.Module]:
    """The modules that a program calls as they are, by path: it is of no use to a model that has others there."""
    called = [_calls[n.args[0]] for _, m in program.functions()
              for n in m.graph.find_nodes(op="call_function", target=OPAQUE)]
    return {left.path: left.module for left in called}


def culprit(error: BaseException, model: nn.Module) -> type[nn.Module] | None:
    """The class of the innermost module of ``model`` in whose forward values decided what to do next, which is how
    ``error`` arose; not the model's own. None for any other error."""
    if not _needs_a_value(error) and "numpy" not in str(error):
        return None
    classes = {type(m) for m in model.modules() if not type(m).__module__.startswith("torch.nn.")} - {type(model)}
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((type(o) for o in reversed(owners) if isinstance(o, nn.Module) and type(o) in classes), None)


def _needs_a_value(error: BaseException) -> bool:
    # A part of PyTorch that is slow to import, and has raised nothing before it was.
    shapes = sys.modules.get("torch.fx.experimental.symbolic_shapes")
    return isinstance(error, VALUES) or (
        shapes is not None and isinstance(error, shapes.GuardOnDataDependentSymNode))


@contextmanager
def leaving_in_python(model: nn.Module, classes: Sequence[type[nn.Module]]) -> Iterator[None]:
    """Within: calls of modules of these classes are traced as opaque operators."""
    forwards = {cls: cls.forward for cls in classes}
    # Tracing puts its own tensors in their places.
    states = {id(m): (path, _state(m)) for path, m in model.named_modules() if type(m) in forwards}
    for cls in classes:
        cls.forward = _stand_in(cls, forwards[cls], states)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, forward in forwards.items():
            cls.forward = forward  # type: ignore[method-assign]


def _stand_in(cls: type[nn.Module], original: Callable[..., Any],
              states: dict[int, tuple[str, dict[str, Tensor]]]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors, inputs = flatten((args, kwargs))
        names, count = list(_state(self)), len(tensors)

        def call(flat: Sequence[Tensor]) -> Any:
            given, named = inputs.build(flat[:count])
            state = dict(zip(names, flat[count:], strict=True))
            with _originally(cls, original):
                return torch.func.functional_call(self, state, given, named)

        path, state = states[id(self)]
        held = [state[n] for n in names]
        outputs, shapes = _example(call, tensors, held)
        name = f"{cls.__qualname__}_{len(_calls)}"
        _calls[name] = _Left(self, path, call, shapes, autocast_now())
        return outputs.build(OPAQUE(name, [*tensors, *_state(self).values()]))

    return forward


def _example(call: Callable[..., Any], tensors: Sequence[Tensor],
             held: Sequence[Tensor]) -> tuple[Structure, list[Shape]]:
    """What the module returns for inputs of these shapes, found by running it."""
    if any(t.is_meta for t in held):
        raise XditError("its parameters are on the meta device, so it cannot be run to see what it returns")
    with plain():
        made = [torch.zeros(t.shape, dtype=t.dtype, device=h.device) for t in tensors for h in held[:1]]
        results, outputs = flatten(call([*made, *held]))
        return outputs, [(r.shape, r.dtype) for r in results]


@contextmanager
def _originally(cls: type[nn.Module], original: Callable[..., Any]) -> Iterator[None]:
    standing, cls.forward = cls.forward, original  # type: ignore[method-assign]
    try:
        yield
    finally:
        cls.forward = standing  # type: ignore[method-assign]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
