"""A net under ``side_effects``: tensors of a trace that are alive when it is over are somewhere that nobody noted down.

They would be found there by the model's next call. Only what code of the model was given is looked at.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from types import CellType, FrameType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.objects import attributes
from xdit_compile.ir.program import Program


def check_left(model: nn.Module, made: Sequence[weakref.ref[Tensor]], program: Program) -> None:
    """Look for such tensors.

    Raises:
        CaptureError: naming what holds one. It is taken out if that can be done.
    """
    own = {id(t) for _, function in program.functions() for node in function.graph.nodes
           for t in tree_leaves(node.meta.get("val"))}
    if not _alive(made, own):
        return
    gc.collect()  # most are held by each other
    if left := _alive(made, own):
        holders = [_release(tensor, left) for tensor in left]
        named = next(filter(None, holders), "something that Python does not tell")
        raise CaptureError(f"the forward of {type(model).__name__} leaves a tensor in {named}, which is no place that "
                           "is watched; keep it in an attribute of the model, or in a dictionary of its module")


def _alive(made: Sequence[weakref.ref[Tensor]], own: set[int]) -> list[Tensor]:
    found = {id(t): t for ref in made if (t := ref()) is not None and id(t) not in own}
    return [*found.values()]


def _release(tensor: Tensor, known: list[Tensor]) -> str | None:
    """Takes a tensor out of what holds it, and names that."""
    named, which = None, id(tensor)  # a name that inner functions share would be one more holder
    for holder in gc.get_referrers(tensor):
        if holder is known or isinstance(holder, FrameType):
            continue
        if isinstance(holder, dict):
            keys = [k for k, v in holder.items() if id(v) == which]
            for key in keys:
                del holder[key]
            named = f"{keys[0]!r} of {_owner(holder)}" if keys else named
        elif isinstance(holder, list):
            holder[:] = [v for v in holder if id(v) != which]
            named = f"a list of {_owner(holder)}"
        elif isinstance(holder, CellType):
            del holder.cell_contents
            named = "a variable that functions share"
        else:
            named = named or f"a {type(holder).__name__}"
    return named


def _owner(holder: Any) -> str:
    """Whose attributes, or which object's, a container is."""
    for owner in gc.get_referrers(holder):
        if attributes(owner) is holder:
            return str(getattr(owner, "__name__", f"a {type(owner).__name__}"))
    return f"a {type(holder).__name__}"
