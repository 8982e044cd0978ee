"""Python values as JSON and tensors, to be sent from rank to rank. Reading makes nothing that is not listed here: what
comes from a socket is never unpickled, and no class is imported for it."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from xdit_compile.errors import XditError

Json = Any

_LISTED = "None, bool, int, float, str, bytes, list, tuple, dict, Size, dtype, device, tensors and outputs of models"


class Kind(NamedTuple):
    """A further type that may be sent, told by ``fits``: as a value of those that are listed, and back."""

    name: str
    fits: Callable[[Any], bool]
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def encoded(value: Any, further: Sequence[Kind] = ()) -> tuple[bytes, list[torch.Tensor]]:
    """``value`` as text, and the tensors in it, which travel beside it.

    Raises:
        XditError: it holds something of another type than those that are sent.
    """
    tensors: list[torch.Tensor] = []
    return json.dumps(_written(value, tensors, further)).encode(), tensors


def decoded(text: bytes, tensor: Callable[[tuple[int, ...], torch.dtype], torch.Tensor], further: Sequence[Kind] = (),
            unknown: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value that was encoded; ``tensor`` gives each tensor in it, in their order, by shape and type.

    Args:
        unknown: makes an output of a model of its fields where this process does not know the class.

    Raises:
        XditError: the text is none that ``encoded`` makes.
    """
    try:
        return _read(json.loads(text), tensor, {kind.name: kind.read for kind in further}, unknown)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise XditError(f"a message of another rank cannot be read: {type(error).__name__}: {error}") from error


def _written(value: Any, tensors: list[torch.Tensor], further: Sequence[Kind]) -> Json:
    def of(part: Any) -> Json:
        return _written(part, tensors, further)

    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": [list(value.shape), _name(value.dtype)]}
    if kind is list:
        return [of(v) for v in value]
    if kind in (tuple, torch.Size):
        return {"size" if kind is torch.Size else "tuple": [of(v) for v in value]}
    if kind is dict:
        return {"dict": [[of(k), of(v)] for k, v in value.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if _is_output(kind):
        return {"output": f"{kind.__module__}:{kind.__qualname__}", "fields": [[k, of(v)] for k, v in value.items()]}
    for one in further:
        if one.fits(value):
            return {one.name: of(one.write(value))}
    raise XditError(f"a {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks; what can is {_LISTED}")


def _read(held: Json, tensor: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
          further: Mapping[str, Callable[[Any], Any]], unknown: Callable[[dict[str, Any]], Any] | None) -> Any:
    def of(part: Json) -> Any:
        return _read(part, tensor, further, unknown)

    if held is None or isinstance(held, (bool, int, float, str)):
        return held
    if isinstance(held, list):
        return [of(v) for v in held]
    if "output" in held:
        return _output(held["output"], {str(k): of(v) for k, v in held["fields"]}, unknown)
    ((kind, content),) = held.items()
    if kind in further:
        return further[kind](of(content))
    make: Mapping[str, Callable[[Any], Any]] = {
        "tensor": lambda c: tensor(tuple(map(int, c[0])), _dtype(c[1])), "tuple": lambda c: tuple(map(of, c)),
        "size": lambda c: torch.Size(map(int, c)), "dict": lambda c: {of(k): of(v) for k, v in c},
        "bytes": base64.b64decode, "dtype": _dtype, "device": torch.device}
    return make[kind](content)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise XditError(f"a message of another rank names a type of tensors that is none: {name!r}")
    return found


def _is_output(cls: Any) -> bool:
    """Whether it is a class of what models return: a dictionary of the fields of a dataclass."""
    return isinstance(cls, type) and issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls)


def _output(name: str, fields: dict[str, Any], unknown: Callable[[dict[str, Any]], Any] | None) -> Any:
    module, _, path = name.partition(":")
    cls: Any = getattr(sys.modules.get(module), path, None)
    if not _is_output(cls):
        if unknown is not None:
            return unknown(fields)
        raise XditError(f"another rank sent a {name}, which this process does not know as a model's output")
    return cls(**fields)

