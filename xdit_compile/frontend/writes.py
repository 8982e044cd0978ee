"""State that a forward writes: which of it a program may leave out, and which makes the model one that no program is.

A table that a call makes once is no state: every call would make the same one. A counter, the residual of the step
before, keys of the first call's text are. To tell them apart the model runs on fake tensors twice, the second time from
what the first left:

* what the second call leaves otherwise than the first, or reads of it and replaces, is carried from call to call;
* a tensor that stays and was computed from the first call's arguments belongs to that call;
* where nothing of the kind is left, both calls must compute alike, or the first is another than all later ones.
"""

from __future__ import annotations

import dis
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.concrete_values import READS, writes
from xdit_compile.frontend.objects import (
    MISSING,
    constants,
    content,
    elements,
    entries,
    inside,
    is_library,
    is_plain,
    namespace,
)
from xdit_compile.frontend.opaque_modules import OPAQUE, path_of
from xdit_compile.frontend.reads import Reads
from xdit_compile.frontend.side_effects import Before, Change, Key

_OF_LOOKS = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
             "new_tensor"}
"""Functions whose result depends on no value of what they are given."""
_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Functions that only take looks from their second argument."""
ADVICE = ("A program has no state: it would repeat the first call. Switch what keeps it off (a cache of steps, say), "
          "pass it in and return it, or leave this model as it is")


class Follow(TorchFunctionMode):
    """Follows what is computed from the arguments of a call: their descendants, and which functions made these."""

    def __init__(self, arguments: Iterable[Tensor], kept: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.tainted = {id(t): t for t in arguments}
        self._kept = {id(t) for t in kept}
        self.used: set[int] = set()
        """Of ``kept``, which were used."""
        self.log: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # which traces modes as well
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = tree_leaves((args, kwargs))
        tensors = [x for x in given if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        sources = tensors[:1] if name in _LIKE else [] if name in _OF_LOOKS else tensors
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        written = tensors[:1] if writes(func, kwargs) else []
        if made or written or func in READS:  # else only looks were asked for
            self.used |= {id(t) for t in tensors} & self._kept
        if (made or written) and any(id(t) in self.tainted for t in sources):
            # What is written into a view is in its base.
            bases = [t._base for t in written if t._base is not None]
            self.tainted |= {id(t): t for t in (*made, *written, *bases)}
            if func is OPAQUE:  # each trace calls it by another name
                name, given = path_of(args[0]), tensors
            self.log.append((name, *(x.shape if isinstance(x, Tensor) else x for x in given
                                     if isinstance(x, Tensor) or constants(x))))
        return result

    def reads(self, tensor: Tensor) -> bool:
        return id(tensor) in self.tainted


def refuse(found: Mapping[str, str], model: nn.Module) -> CaptureError:
    """The error that names what is kept, and why it is state."""
    shown = "; ".join(f"{path} {why}" for path, why in sorted(found.items())[:4])
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return CaptureError(f"the forward of {type(model).__name__} keeps state from call to call: {shown}{more}. {ADVICE}")


def settle(model: nn.Module, call: Callable[[Sequence[Tensor]], Iterable[Tensor]], examples: Callable[[], list[Tensor]],
           before: Before, reads: Reads) -> tuple[tuple[str, ...], dict[Key, Change]]:
    """Whether what ``call`` leaves behind may be left out of a program.

    Args:
        call: runs the model on fake tensors, and gives what it returns; examples: makes these.
        before: how things were, and still are.

    Returns:
        Names of buffers that are filled by the first call, and only by that; and what else it leaves that a later call
        finds there and keeps. A call of another kind would not have left the same.

    Raises:
        CaptureError: naming what is carried from call to call, with the line that writes it.
    """
    start, buffers = before.changes(), _versions(model)
    shown = examples()
    first = Follow(shown)
    with first:
        call(shown)
    left, between = _since(start, before.changes()), _versions(model)
    held = [*(t for change in left.values() for t in _tensors(change.after)), *(t for t, _ in between.values())]
    shown = examples()
    second = Follow(shown, held)
    with second:
        results = call(shown)
    second.used |= {id(t) for t in results} & {id(t) for t in held}
    then, after = _since(start, before.changes()), _versions(model)
    found = {str(c): f"({why}{_where(c, reads)})" for c, why in _carried(left, then, first, second)}
    # What each call replaces before it reads that is no state.
    fresh = {n for n, (t, _) in between.items() if n in after and after[n][0] is not t and id(t) not in second.used}
    found |= {n: "(a tensor that each call writes into)" for n in after.keys() - fresh
              if _moved(after[n], between.get(n))}
    filled = {n: t for n, (t, _) in between.items() if n not in fresh and _moved(between[n], buffers.get(n))}
    found |= {n: "(filled from the arguments of the first call)" for n, t in filled.items() if first.reads(t)}
    if not found and left and first.log != second.log:
        found = {str(c): f"(the first call computes otherwise than the next{_where(c, reads)})" for c in left.values()}
    if found:
        raise refuse(found, model)
    kept = {k: c for k, c in left.items() if k in then and _is_kept(c, then[k].after, reads)}
    return tuple(filled), kept


def _is_kept(change: Change, then: Any, reads: Reads) -> bool:
    """Whether what the first call left is there after the second, and some code may read it."""
    is_attribute = f".{change.path}".endswith(f".{change.name}")
    return (change.after is then or constants(then)) and (not is_attribute or reads.loads(change.name))


def _versions(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Parameters and buffers, and how often they were written into."""
    held = [*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    return {name: (tensor, tensor._version) for name, tensor in held}


def _moved(now: tuple[Tensor, int], before: tuple[Tensor, int] | None) -> bool:
    return before is None or now[0] is not before[0] or now[1] != before[1]


def _since(start: Mapping[Key, Change], now: Mapping[Key, Change]) -> dict[Key, Change]:
    """Changes that are not there since the start, when parameters became fake."""
    return {k: c for k, c in now.items() if k not in start or start[k].after is not c.after}


def fill(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Fill buffers as the model does: by one plain call.

    Raises:
        CaptureError: the model, or what it is called with, has no values.
    """
    if not has_values(model, args, kwargs):
        raise CaptureError(f"the forward writes into {', '.join(names)} at the first call; a program has no state. "
                           "Call the model once as it is before it is captured, with its weights: that fills them")
    warnings.warn(f"{type(model).__name__} fills {', '.join(names)} at its first call: it was called once as it is, on "
                  "this device alone", stacklevel=2)
    with torch.no_grad():
        type(model).forward(model, *args, **kwargs)


def has_values(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model can be called as it is."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in (*given, *model.parameters(), *model.buffers()))


def _carried(left: Mapping[Key, Change], then: Mapping[Key, Change], first: Follow,
             second: Follow) -> Iterable[tuple[Change, str]]:
    for key in left.keys() | then.keys():
        a, b = left.get(key), then.get(key)
        if a is None or b is None:
            yield (a or b), "another value after the second call than after the first"  # type: ignore[misc]
        elif why := _differs(a.after, b.after, first, second, {}):
            yield a, why


def _differs(a: Any, b: Any, first: Follow, second: Follow, seen: dict[int, Any]) -> str:
    """Why a value that two calls left, one after the other, is state; nothing if it is not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b:
            return "computed from the arguments of the first call" if first.reads(a) else ""
        if id(a) in second.used:
            return "what the next call reads and replaces"
        return "" if (a.shape, a.dtype) == (b.shape, b.dtype) else "a tensor of another shape after each call"
    if constants(a) or constants(b):
        same = type(a) is type(b) and (a == b or repr(a) == repr(b))
        return "" if same else f"{_short(a)} after the first call, {_short(b)} after the second"
    if type(a) is not type(b):
        return "another kind of value after each call"
    if namespace(a) is not None:  # what code reaches through a module of Python is looked at where it does
        return "" if a is b else "another module after each call"
    if id(a) in seen:
        return ""
    seen[id(a)] = a
    if (raw := content(a)) is not None:
        return "" if raw == content(b) else "other numbers after each call"
    for parts in (_entries, _elements, lambda x: dict(inside(x))):
        one, other = parts(a), parts(b)
        if one.keys() != other.keys():
            return f"{len(one)} entries after the first call, {len(other)} after the second"
        if why := next((w for k in one if (w := _differs(one[k], other[k], first, second, seen))), ""):
            return why
    return ""


def _entries(value: Any) -> Mapping[Any, Any]:
    return entries(value) or {}


def _elements(value: Any) -> Mapping[Any, Any]:
    return dict(enumerate(elements(value) or ()))


def _tensors(value: Any, seen: dict[int, Any] | None = None) -> list[Tensor]:
    """All in a value, however deep."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if (constants(value) or isinstance(value, type) or value is MISSING or namespace(value) is not None
            or id(value) in seen):
        return []
    seen[id(value)] = value
    parts = [*_entries(value).values(), *_elements(value).values(), *(v for _, v in inside(value))]
    return [t for part in parts for t in _tensors(part, seen)]


def holds_no_tensors(value: Any, seen: dict[int, Any] | None = None) -> bool:
    """Whether a value is known throughout, and there is nothing of a trace in it."""
    seen = {} if seen is None else seen
    if constants(value) or isinstance(value, type) or namespace(value) is not None or id(value) in seen:
        return True
    seen[id(value)] = value
    plain = is_plain(type(value)) and not is_library(type(value).__module__)
    if not plain and type(value) not in (dict, list, tuple, set, frozenset):
        return False
    parts = [*_entries(value).items(), *_elements(value).values(), *(v for _, v in inside(value))]
    return all(holds_no_tensors(part, seen) for part in parts)


def _short(value: Any) -> str:
    # Ranks compare this text: no address may be in it.
    if value is MISSING:
        return "nothing"
    return re.sub(r" at 0x\w+", "", repr(value))[:40] if constants(value) else f"a {type(value).__name__}"


def _where(change: Change, reads: Reads) -> str:
    """Where code writes a place of this name."""
    name = change.name or change.path.rpartition(".")[2]
    for ran in reads.codes.values():
        if ran.is_layer or name not in ran.code.co_names:
            continue
        line = ran.code.co_firstlineno
        for instruction in dis.get_instructions(ran.code):
            line = getattr(instruction, "line_number", None) or instruction.starts_line or line
            if instruction.opname in ("STORE_ATTR", "STORE_GLOBAL") and instruction.argval == name:
                return f", {ran.code.co_filename.rpartition('/')[2]}:{int(line)}"
    owner = change.path.partition("[")[0].rpartition(".")[2]
    for ran in reads.codes.values():
        if not ran.is_layer and owner in ran.code.co_names:
            return f", {ran.code.co_filename.rpartition('/')[2]}:{ran.code.co_firstlineno}"
    return ""
