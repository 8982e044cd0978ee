"""Offloading of others: hooks that bring the weights of a module to a device when the module is called.

Inside of a program no module is called. Programs under ``offload=block`` bring weights themselves, so these hooks are
taken off, whether they were put on the original or on the parallel model, and the program does what they were for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from xdit_compile.errors import CaptureError
from xdit_compile.ir.released_parameters import check_whole

DIFFUSERS, ACCELERATE = "diffusers.hooks.group_offloading", "accelerate.hooks"
"""Where they come from: without these modules, there are none."""


def is_offloading(hook: Any) -> bool:
    """Whether a hook moves weights between the host and one device, or is there to help another that does."""
    groups, devices = sys.modules.get(DIFFUSERS), sys.modules.get(ACCELERATE)
    if groups is not None and isinstance(hook, (groups.GroupOffloadingHook, groups.LazyPrefetchGroupOffloadingHook,
                                                groups.LayerExecutionTrackerHook)):
        return True
    if devices is None or not isinstance(hook, devices.ModelHook):
        return False
    # The one around all of a model only aligns what goes in with what comes out.
    inner = hook.hooks if isinstance(hook, devices.SequentialHook) else (hook,)
    return all(isinstance(h, devices.AlignDevicesHook) and (h.offload or h.execution_device is None) for h in inner)


def is_brought(model: nn.Module) -> bool:
    """Whether hooks bring a model's weights to its device only while it, or a part of it, runs."""
    devices = sys.modules.get(ACCELERATE)
    as_a_whole = devices is not None and isinstance(vars(model).get("_hf_hook"), devices.CpuOffload)
    return as_a_whole or any(True for _ in _offloading(model))


def take_off(model: nn.Module) -> torch.device | None:
    """Take the hooks of group and sequential offloading off all modules, whose weights are left on the host.

    Returns:
        The device that they were brought to; None if there were no such hooks.

    Raises:
        CaptureError: they were brought to several devices, or wait on a disk. XditError: some were given up.
    """
    found = list(_offloading(model))
    devices = {torch.device(device) for _, _, hook in found for device in _devices(hook)}
    if not devices:
        return None
    if len(devices) > 1:
        raise CaptureError(f"offloading brings weights of this {type(model).__name__} to "
                           f"{' and '.join(sorted(map(str, devices)))}; a program runs on one device. Use one, or "
                           "spread the model over ranks (pipefusion=N, shard=N)")
    for path, _, hook in found:
        if getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None:
            raise CaptureError(f"group offloading keeps weights of {path or 'the model'} on a disk, and a program "
                               "reads none there in between. Leave offload_to_disk_path out; or make the model on the "
                               "meta device and give weights=FOLDER and offload=block, with shard=N for less of the "
                               "host's memory")
    check_whole(model, "offloaded")  # before anything is taken off
    for _, module, hook in found:
        registry: Any = vars(module).get("_diffusers_hook")
        for name in [n for n, h in getattr(registry, "hooks", {}).items() if h is hook]:
            registry.remove_hook(name, recurse=False)
    if any(vars(module).get("_hf_hook") is hook for _, module, hook in found):
        # A parallel model has its parts and attributes in common with the original, but a forward of its own.
        put_on = getattr(vars(model).get("_old_forward"), "__self__", model)
        sys.modules[ACCELERATE].remove_hook_from_module(put_on, recurse=True)
    device = devices.pop()
    return torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device


def _offloading(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """All such hooks, with the modules that they are on."""
    for path, module in model.named_modules():
        held = vars(module)
        for hook in (*getattr(held.get("_diffusers_hook"), "hooks", {}).values(), held.get("_hf_hook")):
            if is_offloading(hook):
                yield path, module, hook


def _devices(hook: Any) -> list[Any]:
    """Where one brings weights."""
    if hasattr(hook, "group"):
        return [hook.group.onload_device]
    return [h.execution_device for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)]
