"""Whether all ranks hold the same weights: a digest of every parameter and buffer, once and after counted writes."""

from __future__ import annotations

import hashlib
import json
import operator
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from xdit_compile.errors import RankMismatch
from xdit_compile.ir.packed_tensors import OF, PLAIN, is_packed, parts
from xdit_compile.runtime.control.agreement_channel import Gather, Resolve
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.tensor_digest import bulk_digest

FACT = "weights"
"""The key under which ranks compare them before a call."""

_ELSEWHERE = "elsewhere"
"""Said of what is on the meta device: other ranks hold it."""

Mark = tuple[int, int, int]

_VERSION = operator.attrgetter("_version")


class Replicas:
    """What this rank holds of some modules, as digests by name.

    A digest is made anew when a tensor was written into, as far as PyTorch counts that, or replaced. What ranks have
    compared once each of them knows of all, also of what it has given up itself: while nothing changes, one short
    text stands for everything.

    Args:
        parts: whether each rank has but the tensors that it uses, as of an artifact; else one that is not there is a
            difference.
    """

    def __init__(self, parts: bool = False) -> None:
        self._absent = _ELSEWHERE if parts else "nothing of this name"
        self._marks: list[Mark] = []
        self._state: object | None = None
        """That of the modules in which ``_refs`` are all that counts, and ``_written`` how often they were written
        into, and where they lie."""
        self._refs: list[weakref.ref[torch.Tensor]] = []
        self._written: list[int] = []
        self._digests: dict[Mark, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._held: dict[str, str] = {}
        self._agreed: dict[str, str] = {}
        self._summary = ""
        self._lock = threading.Lock()

    def agree(self, control: ControlPlane, what: str, facts: Mapping[str, str],
              modules: Mapping[str, nn.Module]) -> None:
        """`control.agree`, and that all ranks hold the same of these modules.

        Raises:
            RankMismatch: they do not, or differ in ``facts``.
        """
        try:
            control.agree(what, {**facts, FACT: self.summary(modules)})
        except RankMismatch as error:
            if error.keys != {FACT}:
                raise
        else:
            return
        self.compare(control)

    def summary(self, modules: Mapping[str, nn.Module], state: object | None = None) -> str:
        """A text that is equal on ranks which hold the same.

        Args:
            state: the same object as before if the modules are known to have the same tensors.
        """
        with self._lock:
            if state is None or state is not self._state or _written([r() for r in self._refs]) != self._written:
                self._look_again(modules, state)
            return self._summary

    def _look_again(self, modules: Mapping[str, nn.Module], state: object | None) -> None:
        marks = _marks(modules)
        if marks != self._marks or any(ref() is None for ref, _ in self._digests.values()):
            self._look(modules)
            self._marks = marks
        self._state = None
        if state is not None:
            tensors = [t for _, t in _tensors(modules)]
            if all(type(t) in PLAIN and not t.is_inference() for t in tensors):
                self._refs, self._written = [*map(weakref.ref, tensors)], _written(tensors)
                self._state = state

    def compare(self, control: ControlPlane) -> None:
        """Compare every tensor with all ranks that hold it; they come here together.

        Raises:
            RankMismatch: naming the first that differs, on every rank.
        """
        self._compare(control.ranks, lambda text: control.gather("the weights", text))

    def resolve(self, ranks: Sequence[int]) -> Resolve:
        """What to do where summaries differ, and perhaps nothing else: `compare`."""
        def resolved(error: RankMismatch, gather: Gather) -> None:
            if error.keys != {FACT}:
                raise error
            self._compare(ranks, gather)

        return resolved

    def _compare(self, ranks: Sequence[int], gather: Gather) -> None:
        with self._lock:
            texts = gather(json.dumps(self._held))
            held = [json.loads(text) for text in texts]
            found = [line for name in dict.fromkeys(n for one in held for n in one)
                     if (line := _difference(name, ranks, [one.get(name, self._absent) for one in held]))]
            if found:
                more = f" (and {len(found) - 1} more tensors differ)" if len(found) > 1 else ""
                raise RankMismatch(f"ranks do not hold the same weights: {found[0]}{more}; load the same checkpoint "
                                   "and the same adapters on every rank", frozenset({FACT}))
            self._agreed = {name: text for one in held for name, text in one.items() if text != _ELSEWHERE}
            self._summarize()

    def _look(self, modules: Mapping[str, nn.Module]) -> None:
        tensors = dict(_tensors(modules))
        new = {m: t for t in tensors.values() if not t.is_meta and ((m := _mark(t)) not in self._digests
                                                                   or self._digests[m][0]() is not t)}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            made = dict(zip(new, pool.map(bulk_digest, new.values()), strict=True))
        kept = {m: self._digests[m] for t in tensors.values() if (m := _mark(t)) in self._digests and m not in new}
        self._digests = kept | {m: (weakref.ref(t), made[m]) for m, t in new.items()}
        self._held = {n: _ELSEWHERE if t.is_meta else self._digests[_mark(t)][1] for n, t in tensors.items()}
        self._summarize()

    def _summarize(self) -> None:
        known = {n: self._agreed.get(n, text) if text == _ELSEWHERE else text for n, text in self._held.items()}
        if self._absent == _ELSEWHERE:
            known = self._agreed | known
        content = json.dumps(known, sort_keys=True).encode()
        self._summary = hashlib.blake2b(content, digest_size=8).hexdigest()


def _difference(name: str, ranks: Sequence[int], texts: Sequence[str]) -> str:
    """What differs of one tensor, or nothing."""
    holders: dict[str, list[int]] = {}
    for rank, text in zip(ranks, texts, strict=True):
        if text != _ELSEWHERE:
            holders.setdefault(text, []).append(rank)
    if len(holders) < 2:
        return ""
    return f"{name}: " + "; ".join(f"ranks {','.join(map(str, who))} have {text}" for text, who in holders.items())


def _written(tensors: Sequence[Any]) -> list[int]:
    """How often tensors were written into, and where they lie. By functions in C: done before each call."""
    return [*map(_VERSION, tensors), *map(torch.Tensor.data_ptr, tensors)]


def _marks(modules: Mapping[str, nn.Module]) -> list[Mark]:
    """Of all parameters and buffers. Walked by hand, without names: done before calls, where it would be felt."""
    found: list[Mark] = []
    stack = list(modules.values())
    while stack:
        state = stack.pop().__dict__
        for store in (state["_parameters"], state["_buffers"]):
            if store:
                for t in store.values():
                    if t is not None:
                        found += [_mark(t)] if type(t) in PLAIN else map(_mark, parts(t).values())
        if state["_modules"]:
            stack += [m for m in state["_modules"].values() if m is not None]
    return found


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    stack = [(f"{name}." if name else "", module) for name, module in reversed(list(modules.items()))]
    while stack:
        path, module = stack.pop()
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is not None and not is_packed(tensor):
                    yield path + leaf, tensor
                elif tensor is not None:
                    yield from ((f"{path}{leaf}{OF}{name}", part) for name, part in parts(tensor).items())
        stack += [(f"{path}{n}.", m) for n, m in reversed(list(module._modules.items())) if m is not None]


def _mark(tensor: torch.Tensor) -> Mark:
    """What tells a tensor, as it is now, from others that live. In inference mode, writes are not counted."""
    return id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
