"""What code asks of PyTorch, call by call, and whether other code asks the same.

A log holds each function with all it was given: constants as they are, tensors by where they come from. Where later
code must ask the same, nothing is computed again: it is given what the first was given, and is told apart at the first
call that differs. So whatever makes two blocks unlike (a number of their own, what their parent wrote in between, a
global, who they are) is found by what it does, wherever it is held.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xdit_compile.frontend.caller import autocast_now
from xdit_compile.frontend.concrete_values import writes

Origins = Mapping[int, tuple[Tensor, Hashable]]
"""Where tensors come from, by identity."""


class Unlike(BaseException):
    """Raised inside a model's code where it asks something else than it should; no model is to catch it."""


class OperatorLog(TorchFunctionMode):
    """Logs what is asked within. Tensors of unknown origin, and objects, are known by their looks, unless ``exact``:
    then by who they are."""

    def __init__(self, origins: Origins | None = None, exact: bool = False) -> None:
        super().__init__()
        self.entries: list[Hashable] = []
        self.results: list[Any] = []
        """Of ``exact`` logs, what each call gave."""
        self.asks_gradients = False
        """Whether it was asked if a tensor requires gradients."""
        self._exact = exact
        self._origins: dict[int, tuple[Tensor, Hashable]] = dict(origins or {})
        self._kept: list[Any] = []
        """What entries know by its identity."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # which traces modes as well
            return func(*args, **kwargs)
        with _untold():
            asked = None if _getter(func) else self._asked(func, args, kwargs)
        self.asks_gradients |= func == _REQUIRES_GRAD
        result = func(*args, **kwargs)
        with _untold():
            made = _tensors(result)
            if func in _CONVERSIONS and not self._exact:
                self.entries.append((Tensor.to, self.origin(args[0]), self.origin(result)))
            elif made or writes(func, kwargs):
                self.entries.append(asked or self._asked(func, args, kwargs))
                if self._exact:
                    self.results.append(result)
                    self._entered(made)
        return result

    def origin(self, tensor: Tensor) -> Hashable:
        """Where a tensor comes from."""
        known = self._origins.get(id(tensor))
        if known is not None:
            return known[1]
        if not self._exact:
            return tensor.shape, tensor.dtype
        self._kept.append(tensor)
        return "other", id(tensor)

    def _entered(self, made: Sequence[Tensor]) -> None:
        """What the last entry has made."""
        for i, tensor in enumerate(made):
            self._origins.setdefault(id(tensor), (tensor, (len(self.entries), i)))

    def _asked(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Hashable:
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
        if isinstance(value, (tuple, list)):
            return cls, tuple([self._said(v, depth) for v in value])
        if isinstance(value, dict):
            return cls, tuple([(k if isinstance(k, str) else self._said(k, depth), self._said(v, depth))
                               for k, v in value.items()])
        if depth < 4:
            parts = _parts(value)
            if parts is not None:
                return cls, tuple(self._said(p, depth + 1) for p in parts)
        self._kept.append(value)
        said: Any = (cls, id(value)) if self._exact or isinstance(value, (type, BuiltinFunctionType)) else cls
        return said


class Replay(OperatorLog):
    """Within, code must ask what a log holds, and is answered from it.

    Raises:
        Unlike: at the first call that is not in the log.
    """

    def __init__(self, log: OperatorLog, origins: Origins) -> None:
        super().__init__(origins, exact=True)
        self._log = log
        self._mine = {origin: tensor for tensor, origin in origins.values()}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with _untold():
            if not _getter(func) and self._next(func, args, kwargs):
                return self._answer()
        if writes(func, kwargs):
            raise Unlike
        result = func(*args, **kwargs)
        with _untold():
            if not _tensors(result):
                return result
            if not _getter(func) or not self._next(func, args, kwargs):
                raise Unlike
            return self._answer()

    @property
    def ended(self) -> bool:
        """Whether all was asked that is in the log."""
        return len(self.entries) == len(self._log.entries)

    def _next(self, func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        at = len(self.entries)
        return at < len(self._log.entries) and self._log.entries[at] == self._asked(func, args, kwargs)

    def _answer(self) -> Any:
        result = self._log.results[len(self.entries)]
        self.entries.append(self._log.entries[len(self.entries)])
        result = self._own(result)
        self._entered(_tensors(result))
        return result

    def _own(self, result: Any) -> Any:
        """A result, with what this code was given in the place of what the first was given."""
        if isinstance(result, Tensor):
            return self._mine.get(self._log.origin(result), result)
        if isinstance(result, (tuple, list)):
            parts = [self._own(r) for r in result]
            if type(result) in (tuple, list):
                return type(result)(parts)
            return result if all(a is b for a, b in zip(parts, result, strict=True)) else type(result)(parts)
        return result


_PLAIN = frozenset({int, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
                    type(...), torch.Size})
_WRITTEN = frozenset({float, complex, slice, range})

_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

_CONVERSIONS = {Tensor.to, *(getattr(Tensor, n) for n in ("char", "cpu", "cuda", "bfloat16", "byte", "double", "float",
                                                         "bool", "half", "int", "long"))}
"""What tensors that are traced spell otherwise than plain ones do."""


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
        return [value.__code__, value.__defaults__, *(_cell(c) for c in value.__closure__ or ())]
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


class _untold:
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
