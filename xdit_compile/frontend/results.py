"""What a forward returns: nothing of the trace may be in it, and what it made is the caller's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType, GeneratorType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.objects import constants, elements, entries, inside, is_leaf, is_stream
from xdit_compile.ir.program import Input, output_args
from xdit_compile.ir.pytree import TENSOR

_PLACEHOLDERS = (FakeTensor, FunctionalTensor)
_ADVICE = "Return tensors, or tuples, lists, dictionaries and plain objects that hold them"


def check_results(model: nn.Module, arguments: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor],
                  leaves: Sequence[Any], older: Callable[[Any], bool]) -> None:
    """Refuse results that a program cannot make again.

    Args:
        arguments, tensors: of the call, and of its result.
        leaves: what else is in the result, and not taken apart.
        older: whether an object was there before the call.

    Raises:
        CaptureError: naming the class of the object.
    """
    name = type(model).__name__
    for leaf in leaves:
        if leaf is TENSOR or older(leaf):
            continue
        cls = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
        if isinstance(leaf, GeneratorType) or is_stream(leaf) or hasattr(type(leaf), "__next__"):
            raise CaptureError(f"{name} returns a {cls}, which runs when somebody asks it: a program has no such "
                               f"results. {_ADVICE}; list(...) makes one of an iterator")
        if _holds_tensor(leaf, older, set()):
            raise CaptureError(f"{name} returns a {cls} with tensors inside, which cannot be taken apart and made "
                               f"again at each call. {_ADVICE}")
    given = {id(t) for t in (*arguments, *model.parameters(), *model.buffers())}
    for tensor in tensors:
        if id(tensor) in given or older(tensor):
            continue
        if named := [n for n in vars(tensor) if n not in _OWN and not n.startswith("_")]:
            raise CaptureError(f"{name} returns a tensor with the attribute {named[0]}, which no program sets; return "
                               "that value beside the tensor")
        if tensor.requires_grad:
            raise CaptureError(f"{name} returns a tensor that requires gradients, which a program computes none of; "
                               "leave requires_grad_() to the caller")


_OWN = frozenset({"elem", *FakeTensor.__annotations__})
"""Attributes of tensors while they are traced."""


def _holds_tensor(value: Any, older: Callable[[Any], bool], seen: set[int]) -> bool:
    """Whether a tensor of the trace is anywhere inside."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, _PLACEHOLDERS)
    if id(value) in seen or constants(value) or older(value) or isinstance(value, type) or is_leaf(value):
        return False
    seen.add(id(value))
    return any(_holds_tensor(part, older, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__, *(value.__closure__ or ()))
    elif isinstance(value, CellType):
        try:
            yield value.cell_contents
        except ValueError:  # nothing was assigned yet
            return
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    for key, part in (entries(value) or {}).items():
        yield from (key, part)
    yield from elements(value) or ()
    yield from (part for _, part in inside(value))


# Results that share memory


_COPIES = frozenset({"clone", "copy", "lift_fresh_copy", "lift_fresh", "_to_copy", "to", "type_as", "contiguous",
                     "reshape", "dropout", "pad", "alias", "detach", "cat", "_unsafe_view"})
"""Operators that passes may leave out, or that may return what they are given."""
_SAME = _COPIES - {"clone", "copy", "lift_fresh_copy", "_to_copy", "dropout", "pad", "cat"}
"""Those of which the plain model returns what they are given."""


def copied_results(main: fx.GraphModule, inputs: Sequence[Input], own: Collection[str],
                   written: int) -> tuple[int, ...]:
    """Which results, by their place, are a copy in the plain model and may be the same memory as an input or as another
    result here. The first ``written`` ones are new values of arguments.

    Args:
        own: names of constants that are the model's, which it returns as they are.
    """
    what = dict(zip(main.graph.find_nodes(op="placeholder"), inputs, strict=True))
    found: list[int] = []
    taken: dict[Any, Any] = {}
    for place, node in enumerate(output_args(main.graph)):
        root, plain = _root(main, node, _COPIES), _root(main, node, _SAME)
        kept = what.get(root)
        made = kept is not None and kept.kind == "constant" and kept.name not in own
        if place < written:
            fresh = kept is not None  # another argument, which may be written into first
        else:
            fresh = made or (kept is not None and root is not plain) or taken.get(root, plain) is not plain
        if fresh:
            found.append(place)
        taken.setdefault(root, plain)
    return tuple(found)


def _root(module: fx.GraphModule, node: fx.Node, through: Collection[str]) -> fx.Node:
    """The node that made the memory a node's value lies in."""
    while True:
        before = _before(module, node, through)
        if before is None:
            return node
        node = before


def _before(module: fx.GraphModule, node: fx.Node, through: Collection[str]) -> fx.Node | None:
    if node.op != "call_function" or not node.args:
        return None
    first: Any = node.args[0]
    if node.target is operator.getitem and isinstance(first, fx.Node):
        if first.op != "call_module":
            return first if _is_view(first) else None
        inner = getattr(module, str(first.target))
        place: Any = node.args[1]
        root = _root(inner, output_args(inner.graph)[place], through)
        held = list(inner.graph.find_nodes(op="placeholder"))
        outer: Any = first.args[held.index(root)] if root in held else None
        return outer
    if not _is_view(node) and _name(node) not in through:
        return None
    if _name(node) == "copy":  # what is written over is not read
        return node.args[1] if isinstance(node.args[1], fx.Node) else None
    first = first[0] if isinstance(first, (list, tuple)) and len(first) == 1 else first
    return first if isinstance(first, fx.Node) else None


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).rpartition("::")[2]
