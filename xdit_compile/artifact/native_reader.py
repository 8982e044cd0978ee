"""Functions that were compiled ahead, as modules that a program calls."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from xdit_compile.errors import ArtifactError


def target_of(device: torch.device) -> dict[str, str]:
    """What machine code depends on: it runs where this is the same."""
    if device.type == "cuda":
        kind = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "capability": kind}
    return {"torch": torch.__version__, "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability()}


def check_target(made_for: Any, device: torch.device, where: Path) -> None:
    """Raises ArtifactError if code made for one target does not run on this one."""
    here = target_of(device)
    if differing := [f"{k} {made_for.get(k)!r}, here {v!r}" for k, v in here.items() if made_for.get(k) != v]:
        raise ArtifactError(f"the compiled functions of {where} are for {'; '.join(differing)}; load it with "
                            "native=False, or export the model on this machine")


class CompiledFunction(nn.Module):
    """One function of a program, in machine code.

    Args:
        package: the file; graph: what it was compiled from, for the inputs that it takes.
    """

    def __init__(self, package: Path, graph: fx.Graph) -> None:
        super().__init__()
        from torch._inductor import aoti_load_package  # as slow to import as PyTorch itself

        takes = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
        # Else the code runs where it was compiled, whatever device it is given tensors of.
        index = next((t.device.index for t in takes if t.device.type == "cuda"), None)
        with _no_probe():
            self._run = aoti_load_package(str(package), device_index=-1 if index is None else index)
        self._strides = [strides_for(t) for t in takes]

    def forward(self, *tensors: torch.Tensor) -> Any:
        # The code does not look at how tensors lie in memory, but relies on it.
        # Below autograd, whose kernels of collectives are written in Python, which must not see what is sent: the
        # writer's `_unseen` says why.
        with torch._C._AutoDispatchBelowAutograd():
            return self._run(*map(_laid, tensors, self._strides))


@contextmanager
def _no_probe() -> Iterator[None]:
    """To tell what the processor can do, PyTorch would compile and load something, in a process of its own, which takes
    longer than all else. `check_target` has looked at that."""
    from torch._inductor import config, cpu_vec_isa

    with config.patch({"cpp.vec_isa_ok": True}):
        try:
            yield
        finally:
            cpu_vec_isa.valid_vec_isa_list.cache_clear()  # who compiles later wants it probed


def strides_for(example: torch.Tensor) -> tuple[int, ...]:
    """How an input lies for which code is compiled: as in the example, but each element in a place of its own. What was
    one number expanded there need not be in a later call."""
    if any(stride == 0 and size > 1 for size, stride in zip(example.shape, example.stride(), strict=True)):
        return torch.empty(example.shape, device="meta").stride()
    return example.stride()


def _laid(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
