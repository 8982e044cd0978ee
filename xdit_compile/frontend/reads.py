"""What code a forward ran, and which globals that code names: recorded while a model is traced.

Python's trace function is told of each call of a function. It is switched off inside of PyTorch's operators, so that
only the model's own functions are seen, not the machinery that traces them. What a function can read beside its
arguments is written in its code: names of globals, and names of attributes of these.
"""

from __future__ import annotations

import builtins
import dis
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.borrowed_memory import BorrowedMemory
from xdit_compile.frontend.concrete_values import READS, writes
from xdit_compile.frontend.looks import STANDING_IN, Looks
from xdit_compile.frontend.objects import MISSING, is_library, line_of, package

Chain = tuple[str, ...]
"""A global's name, and names of attributes that are read of it: ``("F", "silu")``."""

_OPS = dis.opmap
_ATTRIBUTES = {_OPS[n] for n in ("LOAD_ATTR", "LOAD_METHOD") if n in _OPS}
_SHIFT = {_OPS["LOAD_GLOBAL"]: sys.version_info >= (3, 11), _OPS["LOAD_ATTR"]: sys.version_info >= (3, 12)}
_NAMING = _ATTRIBUTES | {_OPS[n] for n in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME")}
_COMPARES = {_OPS[n] for n in ("IS_OP", "COMPARE_OP", "CONTAINS_OP")}
_BUILDS = {_OPS[n] for n in ("BUILD_TUPLE", "BUILD_LIST", "BUILD_SET")}
_BETWEEN = {_OPS[n] for n in ("CACHE", "PUSH_NULL") if n in _OPS}


@dataclass(frozen=True)
class Names:
    """What a function's code names: ``chains`` of globals, globals it writes (``stored``), modules that it imports
    (``imported``), all names of attributes, and texts that may be such (``attributes``), and of these what it does not
    only write (``loaded``)."""

    chains: frozenset[Chain]
    stored: frozenset[str]
    imported: frozenset[str]
    attributes: frozenset[str]
    compared: frozenset[Chain]
    """Those of ``chains`` with which something is compared: ``type(x) is torch.Tensor``."""
    loaded: frozenset[str]


def names_of(code: CodeType) -> Names:
    """What ``code`` and the functions that are written inside it name."""
    return _names(id(code), code)


@lru_cache(maxsize=1 << 14)
def _names(_: int, code: CodeType) -> Names:
    chains, stored, imported, names = set[Chain](), set[str](), set[str](), set[str]()
    loaded = set[str]()
    chain: list[str] = []
    row, compared = list[Chain](), set[Chain]()
    extended = 0
    for op, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        arg = extended | low
        extended = arg << 8 if op == dis.EXTENDED_ARG else 0
        if op == dis.EXTENDED_ARG or op in _BETWEEN:
            continue
        name = code.co_names[arg >> _SHIFT.get(op, 0)] if op in _NAMING else ""
        if op in _ATTRIBUTES:
            loaded.add(name)
            if chain:
                chain.append(name)
                continue
        if chain:
            chains.add(tuple(chain))
            row.append(tuple(chain))
            chain = []
        if op in _COMPARES:
            compared.update(row)
        if op not in _BUILDS:  # several in a row become a tuple
            row = row if op in (_OPS["LOAD_GLOBAL"], _OPS["LOAD_NAME"]) else []
        if op in (_OPS["LOAD_GLOBAL"], _OPS["LOAD_NAME"]):
            chain = [name]
        elif op == _OPS["IMPORT_NAME"]:
            imported.add(name)
        elif op in (_OPS["STORE_GLOBAL"], _OPS["DELETE_GLOBAL"]):
            stored.add(name)
    if chain:
        chains.add(tuple(chain))
    texts = {c for c in code.co_consts if isinstance(c, str) and c.replace(".", "_").isidentifier()}
    names.update(code.co_names, texts)
    loaded |= texts
    inner = [names_of(c) for c in code.co_consts if isinstance(c, CodeType)]
    return Names(frozenset(chains.union(*(n.chains for n in inner))),
                 frozenset(stored.union(*(n.stored for n in inner))),
                 frozenset(imported.union(*(n.imported for n in inner))),
                 frozenset(names.union(*(n.attributes for n in inner))),
                 frozenset(compared.union(*(n.compared for n in inner))),
                 frozenset(loaded.union(*(n.loaded for n in inner))))


def is_followed(module: str | None) -> bool:
    """Whether globals that code of this module names are part of what a forward read: those of Python, of PyTorch's
    machinery and of this package are not; those of PyTorch's layers and functions are, as any may be replaced."""
    if package(module) == "torch":
        return ((module or "").startswith("torch.nn.") and module != "torch.nn.modules.module") or module == (
            "torch.functional")
    return module in ("os", "__main__") or package(module) not in _NOT


_NOT = (frozenset(sys.stdlib_module_names) | {"xdit_compile", "numpy", "sympy", "mpmath", "networkx"}) - {"__main__"}


@dataclass
class Ran:
    """A function that ran: its code and its globals."""

    code: CodeType
    globals: dict[str, Any]

    @property
    def is_layer(self) -> bool:
        """Whether it is PyTorch's own, of which only functions that were put in the place of others are of interest."""
        return package(self.globals.get("__name__")) == "torch"


@dataclass
class Reads:
    """All code that ran. ``first`` is called with each frame of new code before it runs."""

    codes: dict[int, Ran] = field(default_factory=dict)
    _seen: dict[int, CodeType] = field(default_factory=dict, repr=False)
    first: Callable[[FrameType], None] | None = None
    valued: list[weakref.ref[Tensor]] = field(default_factory=list, repr=False)
    """Such tensors of which values were read into Python."""
    written: list[tuple[Tensor, str]] = field(default_factory=list, repr=False)
    """Tensors that are neither the model's nor made by forward and that it writes into, and where."""
    looks: Looks = field(default_factory=Looks, repr=False)
    made: list[weakref.ref[Tensor]] = field(default_factory=list, repr=False)
    """Tensors of traces that code was given."""
    borrowed: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Buffers of the model in memory that is not PyTorch's."""

    def include(self, function: FunctionType) -> None:
        """As if ``function`` had run: what it made may have been remembered."""
        if is_followed(function.__globals__.get("__name__")):
            self._seen[id(function.__code__)] = function.__code__
            self.codes.setdefault(id(function.__code__), Ran(function.__code__, function.__globals__))

    @contextmanager
    def recording(self, whole: bool = True) -> Iterator[None]:
        """Within: calls are recorded, of this thread. A debugger that is at work is told of them too.

        ``whole``: whether the model runs, and not a block by itself that has run inside of it before."""
        before = sys.gettrace()

        def tell(frame: FrameType, event: Any, arg: Any) -> Any:
            code = frame.f_code
            # What a module does while it is imported is done once, whatever is called later.
            if id(code) not in self._seen and _imports(frame) == imports:
                self._seen[id(code)] = code
                if is_followed(frame.f_globals.get("__name__")):
                    self.codes[id(code)] = Ran(code, frame.f_globals)
                    if self.first is not None:
                        self.first(frame)
            return told(before, frame, event, arg) if before else None

        def told(other: Any, frame: FrameType, event: Any, arg: Any) -> Any:
            answer = other(frame, event, arg)
            if on and sys.gettrace() is not tell:  # some put themselves in the place of who calls them
                sys.settrace(tell)
            return partial(told, answer) if answer is not None else None

        outside = _Outside(self.written, self.valued, self.looks, self.made)
        if whole:
            outside.borrowed.hold(self.borrowed)
        on, imports = True, _imports(sys._getframe())
        sys.settrace(tell)
        try:
            with outside:
                yield
            if sys.gettrace() is not tell:
                raise CaptureError("the forward sets another trace function (sys.settrace), so that nobody can tell "
                                   "what it reads; set it around the call")
        finally:
            on = False
            sys.settrace(before)
        if outside.refused:
            raise outside.refused[0]
        outside.borrowed.check()

    def names(self) -> set[str]:
        """Of attributes, in the code of models."""
        return set().union(*(names_of(r.code).attributes for r in self.codes.values() if not r.is_layer))

    def loads(self, name: str) -> bool:
        """Whether code of models reads an attribute of this name."""
        return any(name in names_of(r.code).loaded for r in self.codes.values() if not r.is_layer)

    def chains(self) -> Iterator[tuple[Ran, Chain]]:
        """Globals that were named, each once."""
        found: dict[tuple[int, Chain], Ran] = {}
        for ran in list(self.codes.values()):
            for chain in names_of(ran.code).chains:
                found.setdefault((id(ran.globals), chain), ran)
        yield from ((ran, chain) for (_, chain), ran in found.items())

    def asks_id(self) -> bool:
        """Whether code of models names ``id``."""
        return any(("id",) in names_of(r.code).chains for r in list(self.codes.values()) if not r.is_layer)

    def types_compared(self) -> Iterator[tuple[CodeType, type]]:
        """Classes of tensors with which the type of something is compared, in the code of models."""
        for ran in list(self.codes.values()):
            names = names_of(ran.code)
            if not ran.is_layer and (("type",) in names.chains or "__class__" in names.attributes):
                values = (resolve(ran, chain)[2] for chain in names.compared)
                yield from ((ran.code, v) for v in values if isinstance(v, type) and issubclass(v, Tensor))

    def namespaces(self) -> Iterator[dict[str, Any]]:
        """Of modules that code reaches otherwise than by its globals, each once."""
        found = {id(s): s for r in list(self.codes.values()) if not r.is_layer for s in namespaces_of(r)}
        yield from sorted(found.values(), key=lambda space: str(space["__name__"]))


def namespaces_of(ran: Ran) -> Iterator[dict[str, Any]]:
    """Of modules that a function imports, or asks for by their names; and its own if it calls ``globals``."""
    names = names_of(ran.code)
    asked = names.imported | (names.attributes if names.attributes & _ASKING else frozenset())
    around = str(ran.globals.get("__package__") or "").split(".")
    for name in asked:
        parts = name.split(".")
        within = [around[:i] for i in range(len(around) + 1)]
        for start in within:  # imports may be relative
            for i in range(len(parts)):
                module = sys.modules.get(".".join([*start, *parts[: i + 1]]))
                if module is not None and not is_library(module.__name__):
                    yield vars(module)
    if ("globals",) in names.chains:
        yield ran.globals


_ASKING = {"modules", "import_module", "__import__"}

_REFUSALS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
             UnsupportedOperatorException)
_UNKNOWN = {*READS, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__cuda_array_interface__.__get__}
"""Functions that a stand-in may refuse, and the tensor that it stands for would not."""

_REAL = (Tensor, nn.Parameter, nn.Buffer)
"""Types of tensors that have values."""


@dataclass
class _Outside(TorchFunctionMode):
    """Switches recording off inside of operators, and notes which of them write into a tensor that has values: what
    tracing makes has none."""

    written: list[tuple[Tensor, str]]
    valued: list[weakref.ref[Tensor]]
    looks: Looks
    made: list[weakref.ref[Tensor]]
    borrowed: BorrowedMemory = field(default_factory=BorrowedMemory)
    refused: list[Exception] = field(default_factory=list)
    """What only tracing raises. The model may catch it, and go on as it would not on one device."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():  # which traces modes as well
            return func(*args, **(kwargs or {}))
        tell = sys.gettrace()
        sys.settrace(None)
        try:
            if args and writes(func, kwargs) and type(args[0]) in _REAL:
                self.written.append((args[0], line_of(sys._getframe(1))))
            if func in READS:
                self.valued.extend(weakref.ref(t) for t in args if type(t) in _REAL)
            args, kwargs = self.borrowed.seen(func, args, kwargs or {})
            said = self.looks.answer(func, args, kwargs)
            result = func(*args, **kwargs) if said is MISSING else said
        except Exception as error:
            if isinstance(error, _REFUSALS) or (func in _UNKNOWN and any(isinstance(t, STANDING_IN) for t in args)):
                self.refused.append(error)
            raise
        else:
            results = result if isinstance(result, (tuple, list)) else (result,)
            self.made.extend(weakref.ref(t) for t in results if isinstance(t, (FakeTensor, FunctionalTensor)))
            return result
        finally:
            sys.settrace(tell)


def _imports(frame: FrameType | None) -> int:
    """How many modules' own code is under way."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_name == "<module>"
        frame = frame.f_back
    return count


def resolve(ran: Ran, chain: Chain) -> tuple[Any, str, Any]:
    """Where a chain of names leads: the last module's namespace and name on the way, and the value there."""
    space: Any = ran.globals
    name = chain[0]
    value = space.get(name, MISSING)
    if value is MISSING:
        value = getattr(builtins, name, MISSING)
    for name_ in chain[1:]:
        if not isinstance(value, ModuleType) and not type(value).__module__.startswith("torch.backends."):
            break
        space, name = value, name_
        value = getattr(value, name_, MISSING)
    return space, name, value
