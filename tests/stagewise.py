"""All stages of a pipeline one after the other inside one process, against plain PyTorch: no processes, no groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case, made
from emulation import difference

from xdit_compile.driver.compile_stage import staged
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.runtime.pipefusion.schedule import WHOLE
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class Staged:
    """The largest difference over the largest value of an exact step, and of patches that read what an equal step left;
    and whether results come in patches."""

    exact: float
    patched: float
    flows: bool


@torch.no_grad()
def emulate(case: Case, batch: int, odd: bool, spec: str,
            change: Callable[[torch.nn.Module], None] = lambda model: None) -> Staged:
    """``case`` under ``spec``, stage after stage and patch after patch, against one call of the model; which was
    changed before."""
    model = made(case)
    change(model)
    arguments = call_arguments(model, case.inputs(batch, odd))
    args, kwargs = copy.deepcopy(arguments)
    expected, _ = flatten(model(*args, **kwargs))
    tensors, _ = flatten(arguments)
    pipeline = plan_pipeline(capture(model, *arguments), ShardingSpec.parse(spec))
    stages = [staged(pipeline, rank)[1] for rank in range(len(pipeline.stages))]
    kept = [_caches(s) for s in stages]
    once = [Executor(s.once, model)(tensors) for s in stages]
    last = stages[-1]
    found = []
    for units in ((WHOLE,), last.patches):
        pieces = [_unit(stages, model, tensors, once, kept, unit) for unit in units]
        results = [cut.joined([p[i] for p in pieces]) if cut and units[0] != WHOLE else pieces[-1][i]
                   for i, cut in enumerate(last.cuts)]
        found.append(max(map(difference, results, expected)))
    return Staged(*found, all(c is not None for c in last.cuts))


def _caches(stage: StageProgram) -> list[torch.Tensor]:
    """Memory of a stage in which what was not written shows."""
    whole = stage.units[WHOLE]
    values = [n.meta["val"] for n, i in zip(whole.main.graph.find_nodes(op="placeholder"), whole.inputs, strict=True)
              if i.kind == "cache"]
    return [torch.full(v.shape, torch.nan if v.is_floating_point() else 0, dtype=v.dtype) for v in values]


def _unit(stages: list[StageProgram], model: torch.nn.Module, tensors: list[torch.Tensor],
          once: list[tuple[torch.Tensor, ...]], kept: list[list[torch.Tensor]], unit: int) -> list[torch.Tensor]:
    sent: dict[str, torch.Tensor] = {}
    for stage, shared, caches in zip(stages, once, kept, strict=True):
        given = [stage.samples[i].piece(t, unit) if unit != WHOLE and i in stage.samples else t
                 for i, t in enumerate(tensors)]
        values = sent | dict(zip(stage.held, shared, strict=False))
        out = Executor(stage.units[unit], model)(given, values, caches)
        sent |= dict(zip(stage.returns, out, strict=False))
        for name, tensor in zip(stage.returns, out, strict=False):
            if (name, unit) in stages[-1].shapes:
                assert (tuple(tensor.shape), tensor.dtype) == stages[-1].shapes[name, unit]
    results = dict(zip(stages[-1].results, out[len(stages[-1].returns):], strict=True))
    results |= dict(zip(stages[-1].fixed, once[-1][len(stages[-1].held):], strict=True))
    return [results[i] for i in sorted(results)]
