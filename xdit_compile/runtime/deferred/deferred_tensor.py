"""Results that arrive later: tensors that record what is done with them until somebody needs a number.

Where a pipeline calls its model once for each term of guidance, each group of ranks computes one of the calls. The
others get a deferred tensor, and so does the group itself: element-wise operators and those that only move elements
are written down on a tape. The first use of any other kind plays the tape: the groups exchange their results, and
everything recorded is computed, in its order. Every rank runs the same Python, so all do so at the same place.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.runtime.deferred.patch_propagation import Cut, Followed, follow

aten = torch.ops.aten

MOVES = {
    aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.clone.default,
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.cat.default, aten.stack.default,
    aten._to_copy.default,
}
"""Operators that move elements and compute nothing; recorded as the element-wise ones are."""

IN_MEMORY = {"numpy", "tolist", "data", "data_ptr", "untyped_storage", "storage", "share_memory_", "__array__",
             "__dlpack__", "__reduce_ex__", "__deepcopy__", "__repr__", "__format__", "set_"}
"""What of a tensor's own methods reads its memory without an operator."""


class Promise:
    """What a call or an operator returns: ``values`` once they are known.

    Attributes:
        cuts: how each value comes in pieces, if it does.
    """

    def __init__(self, values: Sequence[torch.Tensor] | None = None, cuts: Sequence[Cut | None] = ()) -> None:
        self.values, self.cuts = values, cuts

    def piece(self, place: int, patch: int) -> torch.Tensor:
        """Patch ``patch`` of a value that comes in pieces; waits for no other."""
        cut = self.cuts[place]
        assert cut is not None
        return self._piece(place, patch) if self.values is None else cut.piece(self.values[place], patch)

    def _piece(self, place: int, patch: int) -> torch.Tensor:
        raise NotImplementedError

    def operands(self) -> Any:
        """What it is computed from."""
        return ()


class _Recorded(Promise):
    """An operator to be carried out, as a whole or for one patch."""

    def __init__(self, op: Any, args: Any, kwargs: Any, followed: Followed | None, results: int) -> None:
        super().__init__(cuts=[followed.cut if followed else None] * results)
        self.op, self.args, self.kwargs, self.followed = op, args, kwargs, followed
        self._pieces: dict[int, Sequence[torch.Tensor]] = {}

    def operands(self) -> Any:
        return self.args, self.kwargs

    @property
    def ready(self) -> bool:
        """Whether all that it works on is known."""
        return all(t.promise.values is not None for t in pytree.tree_leaves(self.operands())
                   if isinstance(t, DeferredTensor))

    def compute(self) -> None:
        args, kwargs = materialize((self.args, self.kwargs))
        # Autocast's casts are recorded like all else, and it may be on by now where it was off.
        with torch._C._DisableAutocast():
            result = self.op(*args, **kwargs)
        self.values = result if isinstance(result, (list, tuple)) else (result,)
        self.args, self.kwargs = (), {}
        self._pieces.clear()

    def _piece(self, place: int, patch: int) -> torch.Tensor:
        if patch not in self._pieces:
            followed = self.followed
            assert followed is not None
            cut = followed.source

            def local(t: torch.Tensor) -> torch.Tensor:
                if isinstance(t, DeferredTensor) and t.promise.values is None:
                    return t.promise.piece(t.place, patch)
                t = materialize(t)
                return cut.piece(t, patch) if t.ndim >= -cut.dim and t.shape[cut.dim] == cut.size > 1 else t

            args, kwargs = pytree.tree_map_only(torch.Tensor, local, (self.args, self.kwargs))
            with torch._C._DisableAutocast():
                result = self.op(*followed.arguments(args, patch), **kwargs)
            self._pieces[patch] = result if isinstance(result, (list, tuple)) else (result,)
        return self._pieces[patch][place]


class Tape:
    """Promised results and what was recorded of their use. ``play`` fetches them and computes the rest.

    Args:
        fetch: gives all promised calls their values; every rank comes to it at the same place.

    Attributes:
        plays: how often it was played; played_for: what last needed a number: the use, and the line of it.
    """

    def __init__(self, fetch: Callable[[], None]) -> None:
        self._fetch = fetch
        self.played_for = ""
        self.plays = 0
        self._recorded: list[weakref.ref[_Recorded]] = []

    def deferred(self, promise: Promise, likes: Sequence[torch.Tensor]) -> list[DeferredTensor]:
        """Tensors like these, whose values the promise will hold."""
        return [DeferredTensor(like, like.device, self, promise, i) for i, like in enumerate(likes)]

    def record(self, op: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """What ``op`` will return. Tensors that are known already are copied: they may be written into meanwhile."""
        def held(t: torch.Tensor) -> torch.Tensor:
            return t if isinstance(t, DeferredTensor) else t.clone()

        def meta(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

        args, kwargs = pytree.tree_map_only(torch.Tensor, held, (args, kwargs))
        shown_args, shown = pytree.tree_map_only(torch.Tensor, meta, (args, kwargs))
        result = op(*shown_args, **{k: v for k, v in shown.items() if k != "device"})
        several = isinstance(result, (list, tuple))
        results = result if several else [result]
        followed = follow(op, shown_args, shown, _cuts((args, kwargs), (shown_args, shown)), results[0])
        node = _Recorded(op, args, kwargs, followed, len(results))
        self._recorded.append(weakref.ref(node))
        made = [DeferredTensor(r, device, self, node, i) for i, r in enumerate(results)]
        return made if several else made[0]

    def advance(self) -> None:
        """Compute what is recorded, in order, up to what still waits for a call."""
        while self._recorded:
            node = self._recorded[0]()
            if node and not node.ready:
                return
            if node:
                node.compute()
            del self._recorded[0]

    def play(self) -> None:
        """Fetch what is promised, then compute what is recorded and still wanted, in order: views of one tensor must
        all exist before one of them is written into."""
        self.plays += 1
        self._fetch()
        recorded, self._recorded = self._recorded, []
        for reference in recorded:
            if node := reference():
                node.compute()


def _cuts(tree: Any, shown: Any) -> dict[int, Cut]:
    """How tensors in ``shown`` come in pieces, by their ``id``; none at all if one of them comes, but not so."""
    pairs = [(t, s) for t, s in zip(pytree.tree_leaves(tree), pytree.tree_leaves(shown), strict=True)
             if isinstance(t, DeferredTensor) and t.promise.values is None]
    cuts = {id(s): cut for t, s in pairs if (cut := t.cut) is not None}
    return cuts if len(cuts) == len(pairs) else {}


class DeferredTensor(torch.Tensor):
    """A tensor whose values are not here yet. Shape, dtype and device are."""

    tape: Tape
    promise: Promise
    place: int

    @staticmethod
    def __new__(cls, like: torch.Tensor, device: torch.device, tape: Tape, promise: Promise,
                place: int) -> DeferredTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)
        made.tape, made.promise, made.place = tape, promise, place
        return made

    def value(self) -> torch.Tensor:
        """The tensor itself; all ranks must ask together the first time."""
        if self.promise.values is None:
            self.tape.play()
        assert self.promise.values is not None
        return self.promise.values[self.place]

    @property
    def cut(self) -> Cut | None:
        """How it comes in pieces, if it does."""
        return self.promise.cuts[self.place] if self.promise.cuts else None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property, which has the name
            name = getattr(func.__self__, "__name__", "")
        if name in IN_MEMORY:
            for t in pytree.tree_leaves((args, kwargs)):
                if isinstance(t, DeferredTensor) and t.promise.values is None:
                    t.tape.played_for = f"{name}{_line()}"
            args, kwargs = materialize((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs))
                 if isinstance(t, DeferredTensor) and t.promise.values is None]
        if len({t.tape for t in given}) == 1 and _recordable(func, kwargs, given[0].device):
            return given[0].tape.record(func, args, kwargs, given[0].device)
        for t in given:
            t.tape.played_for = f"{func}{_line()}"
        args, kwargs = materialize((args, kwargs))
        return func(*args, **kwargs)


def _line() -> str:
    """The line of the user's, or a library's, that uses a deferred tensor."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "xdit_compile"):
        frame = frame.f_back
    return f" at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def materialize(tree: Any) -> Any:
    """The same containers with the values of deferred tensors; ``tree`` itself if there are none in it, for a model may
    be about to write into containers that it is given."""
    if not any(isinstance(leaf, DeferredTensor) for leaf in pytree.tree_leaves(tree)):
        return tree
    return pytree.tree_map_only(DeferredTensor, DeferredTensor.value, tree)


def _recordable(op: Any, kwargs: Any, device: torch.device) -> bool:
    """Whether the operator writes nowhere, draws nothing, and takes each element by itself or only moves it."""
    refused = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if op._schema.is_mutable or refused & set(op.tags):
        return False
    stays = kwargs.get("device") in (None, device)
    return stays and (op in MOVES or torch.Tag.pointwise in op.tags)
