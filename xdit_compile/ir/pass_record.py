"""What a pass is and what it did: the record that a program carries of how it was made."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = __name__.split(".")[0]
COMPILER = (f"{PACKAGE}.ir.", f"{PACKAGE}.passes.", f"{PACKAGE}.kernels.")
"""What a pass may be made of: a change in any other module changes no program."""


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass.

    Attributes:
        name: of the pass; module: where it is defined.
        seconds: how long it took.
        nodes_before, nodes_after: of all functions of the program; equal for an analysis, which changes none.
        matched: how many decisions of each kind it noted, or what an analysis found.
        operators: by how many the program has more or less of an operator than before.
    """

    name: str
    module: str
    seconds: float
    nodes_before: int
    nodes_after: int
    matched: Mapping[str, int]
    operators: Mapping[str, int]

    @property
    def digest(self) -> str:
        """Of the pass's source: see `source_digest`."""
        return source_digest(self.module)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        return {"name": self.name, "module": self.module, "digest": self.digest, "seconds": round(self.seconds, 6),
                "nodes_before": self.nodes_before, "nodes_after": self.nodes_after, "matched": dict(self.matched),
                "operators": dict(self.operators)}


@cache
def source_digest(module: str) -> str:
    """Equal as long as a module's source is, and that of all it imports of the compiler (``COMPILER``)."""
    found: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _source(name)
            waiting += _imports(name)
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(found):
        total.update(name.encode() + b"\0" + hashlib.blake2b(found[name]).digest())
    return total.hexdigest()


@cache
def _path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name inside a module
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


@cache
def _source(module: str) -> bytes:
    path = _path(module)
    return path.read_bytes() if path is not None else b""


@cache
def _imports(module: str) -> tuple[str, ...]:
    """The modules of the compiler that one imports; those of a package of rules are all its own."""
    return tuple(dict.fromkeys(_imported(module)))


def _imported(module: str) -> Iterator[str]:
    path = _path(module)
    if path is not None and path.name == "__init__.py":
        yield from (f"{module}.{p.stem}" for p in sorted(path.parent.glob("*.py")) if p.stem != "__init__")
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(COMPILER):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inside if _path(name) is not None)
            if not all(_path(name) is not None for name in inside):
                yield node.module
