"""What ranks do in the tests of spec="auto"."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pipelines
import torch
import zoo
from cases import made

import xdit_compile
from xdit_compile.planner.calibrate import measure, written

TOML = """
name = "two"
devices = 2
[device]
memory_gb = 8
element_wise_gb_per_s = 100
launch_us = 5
collective_us = 20
[rates.float32]
products_tflops = 10
attention_tflops = 5
[[links]]
latency_us = 10
gb_per_s = 1.0
"""
"""The file of a machine of two devices."""


def measured() -> tuple[str, float]:
    """This machine's file, and what a product takes, for which it has a rate: the same on all ranks at once."""
    toml = written(measure())
    x, w, found = torch.randn(512, 512), torch.randn(512, 512), []
    for _ in range(40):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        found.append(time.perf_counter() - start)
    return toml, median(found)


def chosen(name: str, spec: str) -> dict[str, Any]:
    """A model under ``spec``: its difference to the plain one, and what was chosen."""
    case = zoo.CASES[name]
    model, inputs = made(case), case.inputs(1, False)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        parallel = xdit_compile.parallelize(model, spec, ranks=range(2))
        got = parallel(**inputs, return_dict=False)[0] + 0
        again = parallel(**inputs, return_dict=False)[0] + 0
    error = max(float((x - expected).abs().max() / expected.abs().max()) for x in (got, again))
    return {"error": error, "spec": str(parallel.runners["forward"].group.spec)}


def refused(spec: str) -> str:
    """The error that ``spec`` ends with."""
    case = zoo.CASES["dit"]
    model, inputs = made(case), case.inputs(1, False)
    try:
        xdit_compile.parallelize(model, spec, ranks=range(2))(**inputs)
    except xdit_compile.XditError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def pipeline(name: str, root: str, spec: str, output_type: str = "") -> dict[str, Any]:
    """A pipeline under ``spec``, called twice with one generator each: differences to the plain one."""
    given = {"output_type": output_type} if output_type else {}
    case = pipelines.PIPELINES[name]
    folder = Path(root) / name
    plain = pipelines.run(pipelines.load(folder), case, **given)
    parallel = xdit_compile.parallelize(pipelines.load(folder), spec, ranks=range(2))
    kind = type(parallel).__name__
    results = [pipelines.run(parallel, case, **given) for _ in range(2)]
    return {"error": max(float((r - plain).abs().max() / plain.abs().max()) for r in results), "kind": kind,
            "spec": str(parallel.parallel_group.spec), "vae": parallel.parallel_group.spec.vae_degree}
