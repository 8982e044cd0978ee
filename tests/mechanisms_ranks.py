"""Mechanisms that take several processes, tried on two: by their rows' names, a difference to plain PyTorch, or what
was raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from emulation import difference
from mechanisms import answer, call, flux, tiny

import xdit_compile

WORDS = {"`fully_shard`": "refused", "`DistributedDataParallel` inside": "refused", "`enable_parallelism`": "refused",
         "saving after the first call of pipefusion": "refused",
         "`.to()` after the first call of pipefusion": "honoured"}
SAYS = {"`fully_shard`": "DTensor", "`DistributedDataParallel` inside": "blocks.0 is wrapped in",
        "`enable_parallelism`": "context parallelism",
        "saving after the first call of pipefusion": "holds a part of the model"}


def raised(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, xdit_compile.XditError) else repr(error)
    return "nothing"


def parallel(model: Any, spec: str = "ulysses=2") -> Any:
    return xdit_compile.parallelize(model, spec, ranks=range(2), timeout=60)


def sharded() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    for block in model.blocks:
        fully_shard(block, mesh=DeviceMesh("cpu", [0, 1]))
    parallel(model)


def wrapped() -> None:
    model = tiny().requires_grad_(True)
    model.blocks[0] = torch.nn.parallel.DistributedDataParallel(model.blocks[0], process_group=dist.new_group([0, 1]))
    parallel(model)


def context_parallel() -> None:
    from diffusers.hooks.context_parallel import ContextParallelConfig, apply_context_parallel

    model = flux()
    config = ContextParallelConfig(ulysses_degree=2)
    apply_context_parallel(model, config, model._cp_plan)
    parallel(model)


def scenes() -> dict[str, Any]:
    found: dict[str, Any] = {"`fully_shard`": raised(sharded), "`DistributedDataParallel` inside": raised(wrapped),
                             "`enable_parallelism`": raised(context_parallel)}
    made, plain = parallel(tiny(), "pipefusion=2,warmup=all"), tiny()
    with torch.no_grad():
        first = difference(made(**call()) + 0, answer(plain))
        given = {n: t.double() for n, t in call().items()}
        moved = difference((made.to("cpu").double().to("cpu")(**given) + 0).float(), plain(**call()))
    found["`.to()` after the first call of pipefusion"] = max(first, moved)
    found["saving after the first call of pipefusion"] = raised(made.state_dict)
    return found


