"""What code asks of PyTorch, call by call, and whether other code asks the same.

A log holds each function with all it was given: constants as they are, tensors by where they come from. Where later
code must ask the same, nothing is computed again: it is given what the first was given, and is told apart at the first
call that differs. So whatever makes two blocks unlike (a number of their own, what their parent wrote in between, a
global, who they are) is found by what it does, wherever it is held.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from xdit_compile.frontend.caller import autocast_now
from xdit_compile.frontend.concrete_values import writes
from xdit_compile.frontend.objects import content, package
from xdit_compile.ir.packed_tensors import OF, named_parts

Origins = Mapping[int, tuple[Tensor, Hashable]]
"""Where tensors come from, by identity."""


class Unlike(BaseException):
    """Raised inside a model's code where it asks something else than it should; no model is to catch it."""


class OperatorLog(TorchFunctionMode):
    """Logs what is asked within. Tensors of unknown origin count by who they are, and so do objects."""

    def __init__(self, origins: Origins | None = None) -> None:
        super().__init__()
        self.entries: list[tuple[Hashable, ...]] = []
        self.results: list[Any] = []
        """What each call gave."""
        self.asks_gradients = False
        """Whether it was asked if a tensor requires gradients, or what hangs on that."""
        self.written: set[Hashable] = set()
        """Where tensors come from that were written into."""
        self._origins: dict[int, tuple[Tensor, Hashable]] = dict(origins or {})
        self._kept: list[Any] = []
        """What entries know by its identity."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # which traces modes as well
            return func(*args, **kwargs)
        if _is_users(func):  # it asks for what is inside
            with self:
                return func(*args, **kwargs)
        self.asks_gradients |= func in _GRADIENTS
        result = func(*args, **kwargs)
        with untold():
            self._answered(func, args, kwargs, result)
        return result

    def _answered(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        made, written = _tensors(result), writes(func, kwargs)
        if made or written:
            self.entries.append(self._asked(func, args, kwargs))
            self.results.append(result)
            if func == _DATA:
                self._origins[id(result)] = result, self.origin(args[0])
            self._entered(made)
        if written:
            self.written |= {self.origin(t) for t in _tensors([*args[:1], kwargs.get("out")])}

    def origin(self, tensor: Tensor) -> Any:
        """Where a tensor comes from: something that can be hashed."""
        known = self._origins.get(id(tensor))
        return known[1] if known is not None else self._unknown(tensor)

    def _unknown(self, tensor: Tensor) -> Hashable:
        self._kept.append(tensor)
        return "other", id(tensor)

    def _entered(self, made: Sequence[Tensor]) -> None:
        """What the last entry has made."""
        for i, tensor in enumerate(made):
            self._origins.setdefault(id(tensor), (tensor, (len(self.entries), i)))

    def _asked(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Hashable, ...]:
        around = torch.get_default_dtype(), autocast_now()
        return func, self._said(args), self._said(kwargs) if kwargs else None, around

    def _said(self, value: Any, depth: int = 0) -> Hashable:
        cls = type(value)
        if isinstance(value, Tensor):
            return self.origin(value)
        if cls in _PLAIN:
            return cls, value
        if cls in _WRITTEN:  # -0.0 is not 0.0
            return cls, repr(value)
        if cls is slice:
            return cls, tuple([self._said(v, depth) for v in (value.start, value.stop, value.step)])
        if isinstance(value, (tuple, list)):
            return cls, tuple([self._said(v, depth) for v in value])
        if isinstance(value, dict):
            return cls, tuple([(k if isinstance(k, str) else self._said(k, depth), self._said(v, depth))
                               for k, v in value.items()])
        if (raw := content(value)) is not None:
            return cls, str(getattr(value, "dtype", "")), getattr(value, "shape", ()), raw
        kind = next((k for k in _CONSTANTS if isinstance(value, k)), None)
        parts = _parts(value) if depth < 4 else None
        if kind is None and parts is None:
            return self._object(value)
        # Numbers and texts may be of classes that add to them.
        return cls, kind and kind.__repr__(value), tuple(self._said(p, depth + 1) for p in parts or ())

    def _object(self, value: Any) -> Hashable:
        self._kept.append(value)
        return type(value), id(value)


class AroundLog(OperatorLog):
    """What a model asks around its blocks, which are stood in for later: then other objects take part.

    Tensors are the model's, or results of calls and of blocks, and all others are numbered as they appear. What was
    made inside of a block, and is none of its results, is nowhere when the block is stood in for.
    """

    def __init__(self, model: nn.Module, recorded: AroundLog | None = None) -> None:
        """``recorded``: what it is to be compared with."""
        super().__init__()
        self.model, self.recorded = model, recorded
        self.given_back: dict[int, int] = {}
        """By entry, which of the tensors that a function was given is its result. Where one log has plain tensors and
        the other those that are traced, one may be given back what the other gets anew."""
        self.depth = 0
        """How many modes are at work where it begins."""
        self.shared: set[int] = set()
        """Memory of results of blocks that lie in the memory of others."""
        self.split = False
        """Whether such memory is written into, or it was asked what a result of a block is beside its values."""
        self._others: list[tuple[int, Tensor]] = []
        """Tensors of unknown origin, in order, and how many entries there were."""
        self._made: list[tuple[int, Tensor]] = []
        """By which entry, in order."""

    def __enter__(self) -> OperatorLog:
        made: OperatorLog = super().__enter__()
        if not self.depth:
            self.depth = len(_get_current_function_mode_stack())
            self._origins |= state_origins(self.model)
        return made

    def _answered(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        if func in _ITERATED:
            return
        given, number = _tensors([*args, *kwargs.values()]), len(self.entries)
        known = self.recorded.given_back.get(number) if self.recorded else None
        if known is not None and known < len(given) and isinstance(result, Tensor):
            self._origins[id(result)] = result, self.origin(given[known])
        if func in _CONVERSIONS:  # tensors that are traced spell them otherwise than plain ones do
            self.entries.append((Tensor.to, self.origin(args[0]), result.dtype, result.device))
            self._entered([result])
        else:
            super()._answered(func, args, kwargs, result)
        back = next((i for i, t in enumerate(given) if t is result), None)
        if len(self.entries) > number and back is not None and not self.recorded:
            self.given_back[number] = back
        if func in _WHAT_IT_IS and self._of_block(args[0]):
            self.split = True
        if self.shared and writes(func, kwargs) and any(
                memory(t) in self.shared for t in _tensors([*args[:1], kwargs.get("out")])):
            self.split = True

    def _entered(self, made: Sequence[Tensor]) -> None:
        self._made += [(len(self.entries), t) for t in made if id(t) not in self._origins]
        super()._entered(made)

    def _unknown(self, tensor: Tensor) -> Hashable:
        self._others.append((len(self.entries), tensor))
        self._origins[id(tensor)] = tensor, ("other", len(self._others), tensor.shape, tensor.dtype)
        return self._origins[id(tensor)][1]

    def _object(self, value: Any) -> Hashable:
        if isinstance(value, (type, BuiltinFunctionType)):
            return super()._object(value)
        return type(value), None

    def _of_block(self, tensor: Tensor) -> bool:
        known = self._origins.get(id(tensor))
        return known is not None and isinstance(known[1], tuple) and known[1][0] == "block"

    def inside(self, made: Iterable[Tensor]) -> None:
        """These were made inside of a block."""
        self._origins |= {id(t): (t, ("inside",)) for t in made}

    def block(self, path: str, entered: int, results: Sequence[Tensor]) -> None:
        """All since this entry was asked inside of a block, and is none of what is asked around them."""
        while self._made and self._made[-1][0] > entered:
            self.inside([self._made.pop()[1]])
        while self._others and self._others[-1][0] >= entered:
            del self._origins[id(self._others.pop()[1])]
        for number in range(entered, len(self.entries)):
            self.given_back.pop(number, None)
        self.entries[entered:] = [(path,)]
        for i, tensor in enumerate(results):
            self._origins[id(tensor)] = tensor, ("block", len(self.entries), i)


class Replay(OperatorLog):
    """Within, code must ask what a log holds, and is answered from it, by tensors of its own.

    Raises:
        Unlike: at the first call that is not in the log.
    """

    def __init__(self, log: OperatorLog, origins: Origins, fresh: Callable[[Tensor], Tensor]) -> None:
        """``fresh`` makes a tensor that looks like another one."""
        super().__init__(origins)
        self._log, self._fresh = log, fresh
        self._mine = {origin: tensor for tensor, origin in origins.values()}
        self._failed = False
        self.made: list[Tensor] = []
        """What it was answered by."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_users(func):
            with self:
                return func(*args, **kwargs)
        self.asks_gradients |= func in _GRADIENTS
        with untold():
            if not _getter(func) and self._next(func, args, kwargs):
                return self._answer()
        if writes(func, kwargs):
            raise self._unlike()
        result = func(*args, **kwargs)
        with untold():
            if not _tensors(result):
                return result
            if not _getter(func) or not self._next(func, args, kwargs):
                raise self._unlike()
            return self._answer()

    def _unlike(self) -> Unlike:
        self._failed = True  # the code may catch all there is
        return Unlike()

    @property
    def ended(self) -> bool:
        """Whether all was asked that is in the log, and nothing else."""
        # Answers are only ever given, and so never written into, but by what no mode is told of.
        return len(self.entries) == len(self._log.entries) and not self._failed and not any(
            t._version for t in self.made)

    def _next(self, func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        at = len(self.entries)
        return at < len(self._log.entries) and self._log.entries[at][0] == func and (
            self._log.entries[at] == self._asked(func, args, kwargs))

    def _answer(self) -> Any:
        result = self._log.results[len(self.entries)]
        self.entries.append(self._log.entries[len(self.entries)])
        result = self._own(result)
        self._entered(_tensors(result))
        return result

    def _own(self, result: Any) -> Any:
        """A result, with what this code was given in the place of what the first was given."""
        if isinstance(result, Tensor):
            origin = self._log.origin(result)
            if origin not in self._mine:
                self._mine[origin] = self._fresh(result)
                self.made.append(self._mine[origin])
            return self._mine[origin]
        if isinstance(result, (tuple, list)):
            parts = [self._own(r) for r in result]
            if type(result) in (tuple, list):
                return type(result)(parts)
            return result if all(a is b for a, b in zip(parts, result, strict=True)) else type(result)(parts)
        return result


def state_origins(module: nn.Module, tensors: Iterable[Tensor] = ()) -> dict[int, tuple[Tensor, Hashable]]:
    """Where the tensors that a module is given, and those it holds, come from."""
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    inner = [(name, t) for name, t in named_parts(dict(held)).items() if OF in name]
    return {id(t): (t, name) for name, t in reversed([*enumerate(tensors), *held, *inner])}


def memory(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others; a fake one's is nowhere."""
    return tensor.untyped_storage()._cdata


_PLAIN = frozenset({int, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
                    type(...), torch.Size})
_WRITTEN = frozenset({float, complex, range})
_CONSTANTS = (bool, int, float, complex, str, bytes)

_GRADIENTS = [getattr(Tensor, n).__get__ for n in ("requires_grad", "grad_fn", "is_leaf")]

_CONVERSIONS = {Tensor.to, *(getattr(Tensor, n) for n in ("char", "cpu", "cuda", "bfloat16", "byte", "double", "float",
                                                         "bool", "half", "int", "long"))}


_ITERATED = {Tensor.unbind, torch.unbind}
"""What iterating over a tensor whose values are known may do, or not."""

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_WHAT_IT_IS = {*_GRADIENTS, *(getattr(Tensor, n).__get__ for n in ("_base", "_version")), Tensor._is_view}


def _is_users(func: Any) -> bool:
    """Whether it is a function in Python that takes part in PyTorch's protocol, and not PyTorch's own."""
    return isinstance(func, FunctionType) and package(func.__module__) != "torch"


def _getter(func: Any) -> bool:
    """Whether it is the getter of an attribute of tensors: most give no tensor, and all are quick."""
    return getattr(func, "__name__", "") == "__get__"


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for r in result for t in _tensors(r)]
    return []


def _parts(value: Any) -> list[Any] | None:
    """What a function or an object that was made for one call consists of."""
    if isinstance(value, FunctionType):
        named = [value.__globals__.get(n) for n in value.__code__.co_names]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, vars(value),
                *(n for n in named if isinstance(n, _CONSTANTS)), *(_cell(c) for c in value.__closure__ or ())]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, (type, ModuleType, torch.nn.Module)) or not hasattr(value, "__dict__"):
        return None
    return [vars(value)]


def _cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


class untold:
    """Within, neither Python nor modes of PyTorch are told of what is called."""

    __slots__ = ("_silent", "_tell")

    def __enter__(self) -> None:
        self._tell = sys.gettrace()
        if self._tell:
            sys.settrace(None)
        self._silent = torch._C.DisableTorchFunction()
        self._silent.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._silent.__exit__(*raised)
        if self._tell:
            sys.settrace(self._tell)
