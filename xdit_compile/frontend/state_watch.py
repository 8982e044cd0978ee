"""What tells cheaply that nothing has changed of what was looked into.

At each call of a program some thousand dictionaries could be other than they were. Python counts what is written into a
dictionary (PEP 509; where it does no more, PyTorch's own guards watch it instead), so that only those that were written
into are looked at again: at the identities of what is in them. Where PyTorch does the counting, one look tells that
nothing was written into any of them. PyTorch does not count what is written through ``.data``: large values of tensors
are compared where a loop begins.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import TensorGuards, dict_version
from torch._subclasses.fake_tensor import FakeTensor

from xdit_compile.frontend.concrete_values import plain
from xdit_compile.frontend.objects import MISSING, content
from xdit_compile.ir import host_values
from xdit_compile.ir.given_up import kind_of
from xdit_compile.ir.packed_tensors import is_wrapper, parts
from xdit_compile.ir.released_parameters import device_of

SMALL = 1 << 14
"""Bytes of an array, or of a tensor on the CPU, that are compared at each call; larger ones at a loop's first step."""

Get = Callable[[Any], tuple[Any, ...]]


class _Writes:
    """What tells that nothing was written into any dictionary whose version was ever asked for.

    From Python 3.12 on, versions come from a counter of PyTorch's own, which goes up by one when a dictionary is first
    asked for its version and with each write into one that was. A new dictionary's version follows the last new one's
    if nothing was written in between. Before, Python counts writes into all dictionaries, and nothing can be told.
    """

    def __init__(self) -> None:
        self._last = 0
        self._mark = object()

    def mark(self) -> object:
        """Another object after a write, and after what only may be one."""
        version = dict_version({})
        if version != self._last + 1:
            # Not a number: of two threads that count up at once, one could give back an earlier one.
            self._mark = object()
        self._last = version
        return self._mark


_writes = _Writes()


@dataclass
class LookedInto:
    """Where values were found that count by identity, or by what they hold."""

    modules: Sequence[nn.Module]
    states: list[tuple[Get, dict[str, Any]]] = field(default_factory=list)
    """Attributes of modules, and what gets those of interest at once."""
    mappings: dict[int, Mapping[Any, Any]] = field(default_factory=dict)
    sequences: dict[int, Any] = field(default_factory=dict)
    names: dict[int, tuple[dict[str, Any], dict[str, None]]] = field(default_factory=dict)
    """Namespaces of Python modules, and the names in them that count."""
    getters: list[Callable[[], Any]] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    """The model's, whose values do not count."""
    foreign: dict[int, torch.Tensor] = field(default_factory=dict)
    """Others, whose values do."""


class Watch:
    """What was looked into, and the identities of what was in there.

    Attributes:
        mark: an object that stands for it: as long as it holds, the model's tensors are the same and look the same.
    """

    def __init__(self, into: LookedInto) -> None:
        self.mark = object()
        self._alive = True
        self._held: list[Any] = []
        mappings = [*{id(m): m for m in into.mappings.values()}.values()]
        # Most of a module's dictionaries are empty. Whether they still are is asked faster than how often they were
        # written into. Asking once has writes counted, but one: what ``update`` puts into an empty plain dictionary.
        self._empty = [m for m in mappings if not m]
        self._uncounted = [m for m in self._empty if type(m) is not OrderedDict]
        for m in self._empty:
            if type(m) is OrderedDict:
                dict_version(m)
        self._unwritten: object = None
        self._dicts = _Dictionaries([*((d, get) for get, d in into.states),
                                     *((m, None) for m in mappings if m and type(m) is dict),
                                     *((d, _picks([*names])) for d, names in into.names.values())])
        self._mappings = [m for m in mappings if m and type(m) is not dict]
        self._sequences = [*into.sequences.values()]
        self._getters, self._attributes = _sorted_out(into.getters)
        self._modules = [weakref.ref(m) for m in into.modules]
        self._classes, self._states = [*map(type, into.modules)], [d for _, d in into.states]
        self._own = _Looks([t for held in into.tensors for t in _watchable(held)])
        self._memory = into.memory
        self._fixed = [(weakref.ref(t), t._version if not t.is_inference() else None, t.data_ptr())
                       for t in into.foreign.values()]
        self._large = [weakref.ref(t) for t in into.foreign.values() if not _is_small(t)]
        self._small = [(weakref.ref(t), values(t)) for t in into.foreign.values() if _is_small(t)]
        self._contents: Hashable = None
        self._contents = self._values()
        self._ids, self._bytes = [*map(id, self._all())], self._small_memory()
        # A tensor or a module is not kept alive by being watched; when one is gone, all is looked at anew.
        watch = weakref.ref(self)

        def gone(_: object) -> None:
            if (it := watch()) is not None:
                it._alive = False

        for value in itertools.chain(self._dicts.inside(), self._all()):
            if isinstance(value, (torch.Tensor, nn.Module)):
                self._held += [weakref.ref(v, gone) for v in _watchable(value)]
            else:
                self._held.append(value)

    def _all(self) -> Iterator[Any]:
        """What is not in dictionaries that count."""
        return itertools.chain(itertools.chain.from_iterable(self._mappings),
                               itertools.chain.from_iterable(m.values() for m in self._mappings),
                               itertools.chain.from_iterable(self._sequences),
                               *(map(get, objects) for get, objects in self._attributes),
                               [get() for get in self._getters], (MISSING,))

    def _small_memory(self) -> list[bytes | None]:
        return [content(a) for a in self._memory if _nbytes(a) <= SMALL]

    def _values(self) -> Hashable:
        """Of what is too large, or too far away, to be compared at each call."""
        with plain():
            tensors = [None if (t := ref()) is None else values(t) for ref in self._large]
            return tensors, [
                hashlib.sha1(content(a) or b"").digest() for a in self._memory if _nbytes(a) > SMALL]

    def holds(self, fresh: bool = False) -> bool:
        """Whether nothing has changed that can be told cheaply; with ``fresh``, nor anything else: PyTorch does not
        count what is written through ``.data``."""
        if fresh and self._contents != self._values():
            return False
        if not self._alive or any(
                (t := ref()) is None or version != (None if t.is_inference() else t._version) or t.data_ptr() != place
                for ref, version, place in self._fixed):
            return False
        if self._small:
            with plain():
                if any((t := ref()) is None or values(t) != before for ref, before in self._small):
                    return False
        return self._modules_hold() and self._own.hold() and self._dictionaries_hold() and (
            # Both end in the same mark, so that none is longer. A list of the identities would be new memory.
            all(map(operator.eq, map(id, self._all()), self._ids))) and self._small_memory() == self._bytes

    def _dictionaries_hold(self) -> bool:
        mark = _writes.mark()
        if mark is self._unwritten:
            return not any(self._uncounted)
        if not self._dicts.hold() or any(self._empty):
            return False
        self._unwritten = mark
        return True

    def has_tensors_of(self, other: Watch) -> bool:
        """Whether parameters and buffers are the same objects as those that ``other`` watched."""
        return self._own.are(other._own)

    def _modules_hold(self) -> bool:
        """Their class and all of their attributes can be exchanged while the object stays the same."""
        modules = [ref() for ref in self._modules]
        return all(map(operator.is_, map(type, modules), self._classes)) and all(
            map(operator.is_, map(vars, modules), self._states))


class _Dictionaries:
    """Dictionaries, and the identities of what is in them, or of what ``get`` gets of one.

    Only those are looked at again that were written into since.
    """

    def __init__(self, dicts: Sequence[tuple[dict[Any, Any], Get | None]]) -> None:
        self._dicts, self._gets = [d for d, _ in dicts], [get for _, get in dicts]
        self._versions = [*map(dict_version, self._dicts)]
        self._ids = [self._ids_in(d, get) for d, get in dicts]

    def hold(self) -> bool:
        versions = [*map(dict_version, self._dicts)]
        if versions != self._versions:
            for i, (now, before) in enumerate(zip(versions, self._versions, strict=True)):
                if now != before and self._ids_in(self._dicts[i], self._gets[i]) != self._ids[i]:
                    return False
            self._versions = versions
        return True

    def inside(self) -> Iterator[Any]:
        """Whatever counts by identity."""
        for d, get in zip(self._dicts, self._gets, strict=True):
            yield from (*d, *d.values()) if get is None else get(d)

    @staticmethod
    def _ids_in(d: dict[Any, Any], get: Get | None) -> tuple[int, ...]:
        if get is None:
            return *map(id, d), *map(id, d.values())
        try:
            return len(d), *map(id, get(d))
        except KeyError:  # an attribute was removed
            return ()


class _Looks:
    """Tensors that count by what they look like."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._refs = [weakref.ref(t) for t in tensors]
        self._before, self._attributes = [*map(_look_of, tensors)], [len(vars(t)) for t in tensors]
        self._guards = _guards(tensors)

    def are(self, others: _Looks) -> bool:
        """Whether these are the same tensors as those."""
        return len(self._refs) == len(others._refs) and all(
            a() is b() for a, b in zip(self._refs, others._refs, strict=True))

    def hold(self) -> bool:
        """Whether they look the same."""
        tensors = [ref() for ref in self._refs]
        if [*map(len, map(vars, tensors))] != self._attributes:
            return False
        if self._guards is not None and self._guards.check(*tensors):
            return True
        # Whether it needs gradients, and modes of the caller, count for the guards alone.
        known = [t for t in tensors if t is not None]
        if [*map(_look_of, known)] != self._before:
            return False
        self._guards = _guards(known)
        return True


def _watchable(value: Any) -> Sequence[Any]:
    """What there may be weak references to, and is gone when ``value`` is. PyTorch swaps a tensor that wraps others
    with another one when its module is moved or cast, and refuses to if there is one to it."""
    return [*parts(value).values()] if isinstance(value, torch.Tensor) and is_wrapper(value) else [value]


def _guards(tensors: Sequence[torch.Tensor]) -> TensorGuards | None:
    """What torch.compile compares tensors with: many in one call."""
    if any(t.layout is not torch.strided or kind_of(t) not in (torch.Tensor, nn.Parameter, nn.Buffer) for t in tensors):
        return None
    # With None in the place of a size or of a stride, any would do.
    sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]


def _look_of(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return tensor.dtype, tensor.device, tensor.shape, layout(tensor)


def _picks(names: Sequence[str]) -> Get:
    """What gets these entries of a dictionary."""
    get = operator.itemgetter(*names)
    return get if len(names) > 1 else lambda d: (get(d),)


def _sorted_out(getters: Sequence[Callable[[], Any]]) -> tuple[list[Callable[[], Any]], list[tuple[Get, list[Any]]]]:
    """Those that get an attribute are done many at once."""
    others, attributes = list[Callable[[], Any]](), defaultdict[str, list[Any]](list)
    for get in getters:
        if isinstance(get, partial) and get.func is getattr and len(get.args) == 2:
            attributes[get.args[1]].append(get.args[0])
        else:
            others.append(get)
    return others, [(operator.attrgetter(name), objects) for name, objects in attributes.items()]


def _nbytes(value: Any) -> int:
    return int(getattr(value, "nbytes", None) or len(content(value) or b""))


def _is_small(tensor: torch.Tensor) -> bool:
    return host_values.on_host(tensor) and tensor.untyped_storage().nbytes() <= SMALL


def values(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors of equal dtype, shape, place and bits; of those without values, of equal looks."""
    looks = tensor.dtype, tensor.shape, device_of(tensor)
    if tensor.is_meta or isinstance(tensor, FakeTensor) or type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        return looks
    if tensor.layout is not torch.strided:
        return looks, id(tensor), tensor._version
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    flat = flat.clone(memory_format=torch.contiguous_format) if flat.stride(0) != 1 else flat
    raw = flat.view(torch.uint8).numpy().data
    return looks, bytes(raw) if flat.nbytes <= 64 else hashlib.sha1(raw, usedforsecurity=False).digest()


def layout(tensor: torch.Tensor) -> Hashable:
    """How it lies in memory, if not in the ordinary way."""
    return None if tensor.layout is not torch.strided or tensor.is_contiguous() else tensor.stride()
