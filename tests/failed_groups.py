"""Scenes in which collectives fail outside of any call of a model, and what another model gives afterwards."""

from __future__ import annotations

import time
import warnings
from typing import Any

import cases
import displaced
import pipefusion_runs
import torch
import torch.distributed as dist
from emulation import difference

import xdit_compile
from xdit_compile.errors import XditError
from xdit_compile.runtime.deferred.deferred_tensor import materialize

SPECS = {"timeline": "pipefusion=2,patches=2", "results": "pipefusion=2,patches=2", "turns": "cfg=2",
         "verification": "ulysses=2", "late mismatch": "ulysses=2", "one leaves": "ring=2"}


def failing(way: str) -> tuple[str, float]:
    """What rank 0 is told where rank 1 does not come along, and how far another model is from plain PyTorch."""
    entry, spec = displaced.MODELS["dit"], SPECS[way]
    inputs = entry.case.inputs(1, False)
    group = xdit_compile.parallelize(cases.made(entry.case), spec, ranks=[0, 1], timeout=15)
    pipefusion_runs.materialize(pipefusion_runs.loop(group, entry, inputs, 2))
    try:
        failed(way, group, inputs)
        told = ""
    except XditError as error:
        told = f"{type(error).__name__}: {error}"
    other = xdit_compile.parallelize(cases.made(entry.case), f"{spec},warmup=all" if "pipe" in spec else spec,
                                     ranks=[0, 1], timeout=60)
    with torch.no_grad():
        return told, difference(materialize(other(**inputs)[0]), cases.made(entry.case)(**inputs)[0])


def failed(way: str, model: Any, inputs: dict[str, Any]) -> None:
    control = model.runners["forward"].group.control
    if way == "late mismatch":  # and nobody calls the model again
        with torch.no_grad():
            result = model(**inputs | {"class_labels": inputs["class_labels"] + dist.get_rank()})[0]
        control.settle()
        materialize(result)
        return
    if dist.get_rank() == 1:
        time.sleep(1.0)
        control.close()
        return
    if way == "timeline":
        xdit_compile.timeline(model)
    elif way == "verification":
        with control.guard("the verification", model.runners["forward"].group.process_groups.bind()):
            dist.all_reduce(torch.ones(1), group=model.runners["forward"].group.process_groups.all()[0])
    else:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            materialize(model(**inputs)[0])
