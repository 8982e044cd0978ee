"""Parameters whose memory a rank has given up: on the meta device, remembering where they were."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import nn

from xdit_compile.errors import XditError
from xdit_compile.ir.given_up import GivenUp
from xdit_compile.ir.packed_tensors import is_packed, named_parts, parts, whole_name, with_parts

_HOME = "_xdit_compile_home"
LOOK = attrgetter("_version", "dtype", _HOME)
"""Of a parameter that was given up: what changes when somebody writes into it, casts it or moves it."""


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, or was before it was given up, or waits to be brought to. Models that began on the meta device
    count as CPU models: their programs serve once the weights are there."""
    return getattr(tensor, _HOME, torch.device("cpu") if tensor.is_meta else tensor.device)


def release_parameters(model: nn.Module, within: Collection[str], names: Collection[str]) -> None:
    """Give up all parameters and buffers of the submodules at the paths ``within`` but these, and those that are one
    with them."""
    inside, names = tuple(f"{path}." for path in within), {*names, *map(whole_name, names)}
    held = _held(model)
    kept = {id(store[leaf]) for store, leaf, name in held if name in names or not name.startswith(inside)}
    _give_up(model, [entry for entry in held if id(entry[0][entry[1]]) not in kept])


def release_named(model: nn.Module, names: Collection[str]) -> None:
    """Give up these parameters, and parts of parameters, under all their names."""
    held = _held(model)
    named = [(entry, named_parts({entry[2]: entry[0][entry[1]]})) for entry in held]
    gone = {id(t) for _, found in named for name, t in found.items() if name in names}
    _give_up(model, [entry for entry, found in named if not gone.isdisjoint(map(id, found.values()))], gone)


_Held = tuple[dict[str, torch.Tensor], str, str]
"""The parameters or the buffers of a module, a name among these and in the model."""


def _held(model: nn.Module) -> list[_Held]:
    return [(store, leaf, f"{path}.{leaf}" if path else leaf) for path, module in model.named_modules()
            for store in (module._parameters, module._buffers)
            for leaf, t in store.items() if t is not None]  # type: ignore[misc]


def _give_up(model: nn.Module, held: Iterable[_Held], parts_gone: Collection[int] | None = None) -> None:
    """Of packed ones all parts, or those of these identities."""
    def left(part: torch.Tensor) -> torch.Tensor:
        return part if part.is_meta or not (parts_gone is None or id(part) in parts_gone) else _gone(part)

    one: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for store, leaf, _ in held:
        tensor = store[leaf]
        if id(tensor) in one:  # what is one tensor stays one
            store[leaf] = one[id(tensor)][1]
        elif not hasattr(tensor, _HOME) or not all(t.is_meta for t in parts(tensor).values()):
            home = device_of(tensor)
            made = with_parts(tensor, left) if is_packed(tensor) else _gone(tensor)
            for known in (made, *(t for t in parts(made).values() if t.is_meta)):
                setattr(known, _HOME, home)
            store[leaf] = made
            one[id(tensor)] = tensor, made
    # On the whole model alone: hooks on its parts would make blocks that are alike look different.
    if _refused_state not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(_refused_state)
        model.register_load_state_dict_pre_hook(_refused_load)


def _gone(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # where writes are counted
        gone = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        made = GivenUp(gone, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else gone
    setattr(made, _HOME, device_of(tensor))
    return made


def given_up(module: nn.Module) -> list[torch.Tensor]:
    """Its parameters and buffers, and parts of packed ones, that were."""
    held = (t for store, leaf, _ in _held(module) for t in (parts(store[leaf]).values() if is_packed(store[leaf]) else (
        store[leaf],)))
    return [t for t in held if t.is_meta and hasattr(t, _HOME)]


def wait_for(model: nn.Module, device: torch.device) -> None:
    """Parameters of ``model``, on the host, count as on ``device``, where programs bring them. Buffers go there."""
    for store, leaf, _ in _held(model):
        if isinstance(tensor := store[leaf], nn.Parameter):
            for known in (tensor, *(parts(tensor).values() if is_packed(tensor) else ())):
                setattr(known, _HOME, device)
        elif tensor.device != device:
            store[leaf] = tensor.to(device)


def arrive(model: nn.Module) -> None:
    """Bring parameters of ``model`` that wait, and were not given up, to where they count as."""
    one: dict[int, torch.Tensor] = {}
    for store, leaf, _ in _held(model):
        tensor = store[leaf]
        if isinstance(tensor, nn.Parameter) and not tensor.is_meta and hasattr(tensor, _HOME):
            if id(tensor) not in one:
                home = device_of(tensor)
                one[id(tensor)] = tensor if home == tensor.device else nn.Parameter(
                    tensor.detach().to(home), requires_grad=tensor.requires_grad)
            store[leaf] = one[id(tensor)]
    for tensor in one.values():
        _forget_home(tensor)


def _forget_home(tensor: torch.Tensor) -> None:
    """Of one that is where it counts as, so that nothing stale is believed when it is moved."""
    for known in (tensor, *(parts(tensor).values() if is_packed(tensor) else ())):
        if hasattr(known, _HOME) and not known.is_meta:
            delattr(known, _HOME)


def absent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter that would be on ``device``, given up before it was there."""
    made = GivenUp(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    setattr(made, _HOME, device)
    return made


def absence(model: nn.Module, absent: Sequence[str], remedy: str) -> XditError:
    """The error to raise where parameters that this rank needs, under these names, have no values.

    Args:
        remedy: what to do about those that never had any.
    """
    module, _, leaf = absent[0].rpartition(".")
    which = f"{absent[0]} and {len(absent) - 1} more of {type(model).__name__} that this rank needs"
    if type(getattr(model.get_submodule(module), leaf, None)) is GivenUp:
        return XditError(f"{which} were given up, for shares or to another stage, by another parallel model that has "
                         "the same modules: use that one, or load the model anew")
    return XditError(f"{which} are on the meta device: {remedy}")


def missing_parameters(model: nn.Module, names: Collection[str]) -> list[str]:
    """Which of these parameters and buffers have no values."""
    held = named_parts(dict([*model.named_parameters(remove_duplicate=False),
                             *model.named_buffers(remove_duplicate=False)]))
    return [name for name, tensor in held.items() if tensor.is_meta and (name in names or whole_name(name) in names)]


def device_of_model(model: nn.Module) -> torch.device:
    """Where its parameters are, or were."""
    held = [*model.parameters(), *model.buffers()]
    return device_of(next((t for t in held if not t.is_meta), held[0])) if held else torch.device("cpu")


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse to have a model ``what`` that has given up parameters.

    Raises:
        XditError: naming one of them.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    if gone := [name for name, tensor in held if tensor.is_meta and hasattr(tensor, _HOME)]:
        raise XditError(f"this {type(model).__name__} cannot be {what}: this rank holds a part of the model, a stage "
                        f"under pipefusion or a share under tensor, shard and offload, and gave up {len(gone)} of "
                        f"{len(held)} parameters and buffers at the first call ({gone[0]}, for one). Do it before the "
                        "first call, or with the model as it was loaded")


def _refused_state(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state dictionary is made."""
    check_whole(model, "saved, nor asked for its state_dict")


def _refused_load(model: nn.Module, *_: object) -> None:
    """Before a state dictionary is loaded."""
    check_whole(model, "given other weights")


@contextmanager
def unmoved(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, ``model`` lacks packed parameters that were given up and that ``function`` would leave as they are:
    PyTorch would put others in the places of their parts."""
    out: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for module in model.modules():
        for leaf, tensor in module._parameters.items():
            if tensor is not None and is_packed(tensor) and hasattr(tensor, _HOME):
                home = torch.empty(0, dtype=tensor.dtype, device=device_of(tensor))
                like = function(home)
                if (like.dtype, like.device) == (home.dtype, home.device):
                    out.append((module._parameters, leaf, tensor))
    for store, leaf, _ in out:
        store[leaf] = None
    try:
        yield
    finally:
        for store, leaf, tensor in out:
            store[leaf] = tensor


def moving(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``function``, which moves or casts a tensor, for those too that were given up: they remember where they would
    be."""
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta or not hasattr(tensor, _HOME):
            _forget_home(tensor)  # of one that waits: it is moved now
            return function(tensor)
        like = function(torch.empty(0, dtype=tensor.dtype, device=getattr(tensor, _HOME)))
        made = tensor.detach().to(like.dtype)
        for known in (tensor, made, *parts(tensor).values(), *parts(made).values()):
            setattr(known, _HOME, like.device)
        return made

    return move
