"""Hooks on inner modules run when a model is captured: what they change is part of the graph, what they see is fake.

A hook that only watches (keeps activations, prints them) would see fake tensors once and nothing afterwards. So each is
observed while the model is captured, and one that never did anything to the computation is refused by name.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xdit_compile.errors import CaptureError

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def observed_hooks(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` is captured.

    Raises:
        CaptureError: at the end, a hook on an inner module only watched, or kept what it was given; or at once, one of
            them failed.
    """
    notes = _Notes({id(m): path for path, m in model.named_modules()})
    held = [(name, vars(m)[name]) for m in model.modules() if m is not model for name in HOOKS if vars(m).get(name)]
    before = [(group, dict(group)) for _, group in held]
    for name, group in held:
        for key, hook in group.items():
            group[key] = _Observed(hook, name == "_forward_pre_hooks", notes)
    try:
        yield
    except CaptureError as error:
        # What a hook keeps may have been met as state of the model's.
        if watching := notes.watching():
            raise _refusal(watching) from error
        raise
    finally:
        for group, hooks in before:
            # Hooks may take themselves off.
            group.update({key: hook for key, hook in hooks.items() if key in group})
    if watching := notes.watching() or notes.keeping():
        raise _refusal(watching)


def _refusal(watching: str) -> CaptureError:
    return CaptureError(
        f"{watching}. Inside of a parallel model no module is called: the hook would be given fake tensors once, "
        "while the model is captured, and nothing afterwards. Remove it, watch the model itself (hooks on the "
        "parallel model are given its inputs and results), or watch inner modules of the model as it is")


class _Notes:
    """What hooks did, by their identity: those that acted, and those seen to do nothing, with where they are."""

    # Without attributes, so that fingerprints of modules do not see it.
    __slots__ = ("acting", "given", "idle", "paths")

    def __init__(self, paths: dict[int, str]) -> None:
        self.paths = paths
        self.acting: set[int] = set()
        self.idle: dict[int, str] = {}
        self.given: list[tuple[weakref.ref[FunctionalTensor], str]] = []

    def watching(self) -> str | None:
        """A hook that was never seen to do anything."""
        return next((said for key, said in self.idle.items() if key not in self.acting), None)

    def keeping(self) -> str | None:
        """A hook that holds what it was given when all is over."""
        if any(tensor() is not None for tensor, _ in self.given):
            gc.collect()
        return next((f"{said} keeps tensors" for tensor, said in self.given if tensor() is not None), None)


class _Observed:
    """Stands in for a hook while its model is captured."""

    def __init__(self, hook: Callable[..., Any], early: bool, notes: _Notes) -> None:
        self.hook, self.early, self.notes = hook, early, notes

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        said = f"the hook {_name(self.hook)} on {self.notes.paths.get(id(module), type(module).__name__)}"
        before, writes = _state(module), _Writes()
        tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        try:
            with writes:
                result = self.hook(module, *given)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"{said} cannot be captured with the model ({type(error).__name__}: {error}). Inside of "
                               "a parallel model no module is called; remove the hook") from error
        # What is handed back as it was given changes nothing.
        same = result is None or result is given[-1] or (
            isinstance(result, tuple) and len(result) == 1 and len(given[0]) == 1 and result[0] is given[0][0])
        # Before forward a hook may make what that reads: a weight, out of its parts.
        prepared = self.early and any(
            item not in before and not any(item[1] == id(t) for t in tensors) for item in _state(module))
        if same and not writes.seen and not prepared:
            self.notes.idle[id(self.hook)] = f"{said} returns nothing and changes nothing, so it can only watch"
        else:
            self.notes.acting.add(id(self.hook))
        self.notes.given += [(weakref.ref(t), said) for t in tensors if isinstance(t, FunctionalTensor)]
        return result


class _Writes(TorchDispatchMode):
    """Whether an operator writes into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func._schema.is_mutable
        return func(*args, **(kwargs or {}))


def _state(module: nn.Module) -> list[tuple[str, int]]:
    """A module's attributes, parameters and buffers, by identity."""
    state = vars(module)
    return [(name, id(value)) for held in (state, state["_parameters"], state["_buffers"])
            for name, value in held.items()]


def _name(hook: Any) -> str:
    function = getattr(hook, "func", hook)  # of a partial
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__qualname__} of {named.__module__}"
