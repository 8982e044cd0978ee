"""All stages of a pipeline one after the other inside one process, the ranks of each in lock-step, against plain
PyTorch: no processes, no groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import lockstep
import torch
from cases import Case, made
from emulation import difference, part_of, shares_of

from xdit_compile.driver.compile_stage import staged
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.mesh import STAGE, position_of
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes import local_groups
from xdit_compile.passes.pipefusion import plan_pipeline
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


@dataclass(frozen=True)
class Rank:
    """What one rank of a stage runs, holds and keeps."""

    program: StageProgram
    groups: Sequence[ParameterGroup]
    once: dict[Any, torch.Tensor]
    """By the names of values, and the places of results."""
    caches: list[torch.Tensor]


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
    parsed = ShardingSpec.parse(spec)
    pipeline = plan_pipeline(capture(model, *arguments), parsed)
    stages = []
    for index in range(len(pipeline.stages)):
        ranks = [r for r in range(parsed.world_size) if position_of(r, parsed)[STAGE] == index]
        groups = [local_groups(pipeline.whole, pipeline.seeds, parameter_groups(model), r) for r in ranks]
        programs = [staged(pipeline, r, groups=g)[1] for r, g in zip(ranks, groups, strict=True)]
        once = lockstep.run([p.once.main for p in programs], [
            _given(p.once, model, tensors, g) for p, g in zip(programs, groups, strict=True)])
        stages.append([Rank(p, g, dict(zip((*p.held, *p.fixed), o, strict=True)), _caches(p))
                       for p, g, o in zip(programs, groups, once, strict=True)])
    last = stages[-1][0].program
    found = []
    for units in ((WHOLE,), last.patches):
        pieces = [_unit(stages, model, tensors, unit) for unit in units]
        worst = 0.0
        for rank in range(len(stages[-1])):
            results = [cut.joined([p[rank][i] for p in pieces]) if cut and units[0] != WHOLE else pieces[-1][rank][i]
                       for i, cut in enumerate(last.cuts)]
            worst = max([worst, *map(difference, results, expected)])
        found.append(worst)
    return Staged(*found, all(c is not None for c in last.cuts))


def _caches(stage: StageProgram) -> list[torch.Tensor]:
    """Memory of a stage in which what was not written shows."""
    whole = stage.units[WHOLE]
    values = [n.meta["val"] for n, i in zip(whole.main.graph.find_nodes(op="placeholder"), whole.inputs, strict=True)
              if i.kind == "cache"]
    return [torch.full(v.shape, torch.nan if v.is_floating_point() else 0, dtype=v.dtype) for v in values]


def _given(program: Program, model: torch.nn.Module, tensors: Sequence[torch.Tensor],
           groups: Sequence[ParameterGroup], values: Mapping[str, torch.Tensor] = MappingProxyType({}),
           caches: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """The inputs of a stage's program: arguments and what others computed, memory, and the model's own."""
    state = named_parts(dict([*model.named_parameters(remove_duplicate=False),
                              *model.named_buffers(remove_duplicate=False)]))
    of_kind = {"constant": program.constants, "parameter_share": shares_of(model, program, groups), "once": values,
               "received": values, "argument": {f"arg_{i}": t for i, t in enumerate(tensors)}}
    memory = iter(caches)
    return [next(memory) if i.kind == "cache" else of_kind[i.kind][i.name] if i.kind in of_kind else
            part_of(state[i.name], i.part) for i in program.inputs]


def _unit(stages: Sequence[Sequence[Rank]], model: torch.nn.Module, tensors: Sequence[torch.Tensor],
          unit: int) -> list[list[torch.Tensor]]:
    """The results of each rank of the last stage."""
    sent = [dict[str, torch.Tensor]() for _ in stages[-1]]
    for stage in stages:
        given: list[list[torch.Tensor]] = []
        for rank, before in zip(stage, sent, strict=True):
            samples = rank.program.samples
            pieces = [samples[i].piece(t, unit) if unit != WHOLE and i in samples else t
                      for i, t in enumerate(tensors)]
            given.append(_given(rank.program.units[unit], model, pieces, rank.groups, before | rank.once, rank.caches))
        results = lockstep.run([r.program.units[unit].main for r in stage], given)
        for rank, last, mine, out in zip(stage, stages[-1], sent, results, strict=True):
            mine |= dict(zip(rank.program.returns, out, strict=False))
            for name in rank.program.returns:
                if (name, unit) in last.program.shapes:
                    assert (tuple(mine[name].shape), mine[name].dtype) == last.program.shapes[name, unit]
    found = []
    for rank, out in zip(stages[-1], results, strict=True):
        named = dict(zip(rank.program.results, out[len(rank.program.returns):], strict=True))
        named |= {i: rank.once[i] for i in rank.program.fixed}
        found.append([named[i] for i in sorted(named)])
    return found
