"""What the call of a pipeline takes: a value that can be sent, and compared with what a user gives."""

from __future__ import annotations

import inspect
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from xdit_compile.errors import ArgumentError, did_you_mean

Kinds = tuple[Any, ...]
"""What JSON may hold for an argument: ``any``, ``null``, ``bool``, ``int``, ``float``, ``str``, ``dict``, ``object`` (a
picture, a tensor), or a pair of ``list`` and the kinds of its items."""
ANY: Kinds = ("any",)


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a call.

    Attributes:
        name: of what is called.
        kinds: by argument that it takes.
        needed: those without a default.
        anything: whether it takes arguments of other names too.
        defaults: whole numbers that arguments have if they are not given.
    """

    name: str
    kinds: Mapping[str, Kinds]
    needed: tuple[str, ...]
    anything: bool
    defaults: Mapping[str, int]

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> CallSignature:
        """That of a function or a method."""
        taken = inspect.signature(function).parameters
        named = {n: p for n, p in taken.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n != "self"}
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # an annotation may be any expression, of names that are only there for type checkers
            hints = {}
        return cls(name, {n: (kinds_of(hints[n]) if n in hints else ANY) + (("null",) if p.default is None else ())
                          for n, p in named.items()},
                   tuple(n for n, p in named.items() if p.default is p.empty),
                   any(p.kind is p.VAR_KEYWORD for p in taken.values()),
                   {n: p.default for n, p in named.items() if type(p.default) is int})

    @classmethod
    def of_json(cls, held: Mapping[str, Any]) -> CallSignature:
        return cls(**held)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kinds": dict(self.kinds), "needed": self.needed, "anything": self.anything,
                "defaults": dict(self.defaults)}

    def check_names(self, given: Collection[str]) -> None:
        """Refuse names that the call does not take.

        Raises:
            ArgumentError: naming them, and those that it does.
        """
        if not self.anything and (unknown := set(given) - self.kinds.keys()):
            hint = did_you_mean(min(unknown), self.kinds)
            raise ArgumentError(f"{self.name} takes no {', '.join(sorted(unknown))}{hint}; it takes "
                                f"{', '.join(self.kinds)}")

    def missing(self, given: Collection[str]) -> list[str]:
        """What the call needs and is not given."""
        return [n for n in self.needed if n not in given]

    def check_values(self, given: Mapping[str, Any]) -> None:
        """Refuse values, as JSON has them, of other types than the call's annotations name.

        Raises:
            ArgumentError: naming the argument and what it may be.
        """
        for name, value in given.items():
            if not fits(value, self.kinds.get(name, ANY)):
                raise ArgumentError(f"{name} of {self.name} must be {described(self.kinds[name])}, got "
                                    f"{type(value).__name__}")


@contextmanager
def refusals_told(name: str) -> Iterator[None]:
    """Within, the call of a pipeline. What it refuses is told as such.

    Raises:
        ArgumentError: pipelines of diffusers look at their arguments in a method ``check_inputs``, which says what does
            not fit.
    """
    try:
        yield
    except ValueError as error:
        if any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
            raise ArgumentError(f"{name} refuses its arguments: {error}") from error
        raise


_PLAIN: Mapping[Any, str] = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null", dict: "dict"}
_WORDS = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text",
          "dict": "an object"}


def kinds_of(annotation: Any) -> Kinds:
    """What of JSON suits an annotation."""
    if annotation is Any:
        return ANY
    if annotation in _PLAIN:
        return (_PLAIN[annotation],)
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(dict.fromkeys(kind for one in inner for kind in kinds_of(one)))
    if annotation in (list, tuple) or origin in (list, tuple):
        items = [one for one in inner if one is not Ellipsis]
        return (("list", tuple(dict.fromkeys(k for one in items for k in kinds_of(one))) or ANY),)
    return ("dict",) if origin in (dict, Mapping) else ("object",)


def fits(value: Any, kinds: Kinds) -> bool:
    """Whether a value of JSON is of one of these kinds."""
    if "any" in kinds or "object" in kinds:
        return True
    if isinstance(value, list):
        inner = [k[1] for k in kinds if isinstance(k, (tuple, list))]
        return any(all(fits(one, tuple(items)) for one in value) for items in inner)
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        return "int" in kinds or "float" in kinds
    return _PLAIN.get(type(value)) in kinds


def described(kinds: Kinds) -> str:
    """In words."""
    words = [_WORDS[k] for k in kinds if isinstance(k, str) and k in _WORDS]
    lists = [f"a list of {described(k[1])}" for k in kinds if not isinstance(k, str)]
    return " or ".join(words + lists) or "anything"
