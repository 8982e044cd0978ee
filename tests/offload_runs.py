"""What the workers of the pool run for the tests of offloading that others have switched on."""

from __future__ import annotations

from typing import Any

import mechanisms
import torch
from emulation import difference

import xdit_compile
from xdit_compile.runtime.deferred.deferred_tensor import materialize

KINDS = ("leaf_level", "block_level", "sequential", "beside other hooks")


def change(model: Any, kind: str) -> None:
    if kind == "sequential":
        from accelerate import cpu_offload

        cpu_offload(model, torch.device("cpu"))
    elif kind == "beside other hooks":
        model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
        mechanisms.in_groups("leaf_level")(model)
    else:
        mechanisms.in_groups(kind)(model)


@torch.no_grad()
def taken_over(kind: str, before: bool, spec: str) -> dict[str, Any]:
    """A model with two shapes of calls, offloaded before it is parallel or before its first call."""
    plain, model = mechanisms.flux(), mechanisms.flux()
    if before:
        change(model, kind)
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    made = xdit_compile.parallelize(model, spec, ranks=ranks, timeout=60)
    if not before:
        change(made, kind)
    errors = []
    for tokens in (12, 12, 8, 12):
        given = mechanisms.flux_call()
        given |= {n: given[n][:, :tokens] if n == "hidden_states" else given[n][:tokens]
                  for n in ("hidden_states", "img_ids")}
        errors.append(difference(materialize(made(**given)[0]), plain(**given)[0]))
    runner = made.runners["forward"]
    return {"error": max(errors), "programs": len(runner.programs), "offload": runner.store.offload,
            "spec": str(next(iter(runner.programs.values())).compiled.body.spec)}
