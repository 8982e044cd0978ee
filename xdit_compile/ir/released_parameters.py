"""Parameters whose memory a rank has given up: on the meta device, remembering where they were."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

_HOME = "_xdit_compile_home"


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, or was before it was given up. Models that began on the meta device count as CPU models: their
    programs serve once the weights are there."""
    return getattr(tensor, _HOME, torch.device("cpu")) if tensor.is_meta else tensor.device


def release_parameters(model: nn.Module, within: Collection[str], names: Collection[str]) -> None:
    """Give up all parameters and buffers of the submodules at the paths ``within`` but these, and those that are one
    with them."""
    inside = tuple(f"{path}." for path in within)
    held = [(store, leaf, f"{path}.{leaf}") for path, module in model.named_modules()
            for store in (module._parameters, module._buffers) for leaf, t in store.items() if t is not None]
    kept = {id(store[leaf]) for store, leaf, name in held if name in names or not name.startswith(inside)}
    for store, leaf, _ in held:
        tensor = store[leaf]
        if id(tensor) not in kept and not tensor.is_meta:
            gone = tensor.detach().to("meta")
            made = nn.Parameter(gone, requires_grad=tensor.requires_grad) if isinstance(
                tensor, nn.Parameter) else gone
            setattr(made, _HOME, tensor.device)
            store[leaf] = made


def missing_parameters(model: nn.Module, names: Collection[str]) -> list[str]:
    """Which of these parameters and buffers have no values."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in held if tensor.is_meta and name in names]


def device_of_model(model: nn.Module) -> torch.device:
    """Where its parameters are, or were."""
    held = [*model.parameters(), *model.buffers()]
    return device_of(next((t for t in held if not t.is_meta), held[0])) if held else torch.device("cpu")
