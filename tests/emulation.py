"""A case on all ranks of a small world inside one process, against plain PyTorch: no processes, no groups."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lockstep
import torch
from cases import Case, made
from torch import nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.program import Note, Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes import local_groups, localize, plan
from xdit_compile.passes.shard import Seeds
from xdit_compile.report.operations import program_flops
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class Found:
    """The largest difference over the largest value, of results and of what is left in the arguments."""

    error: float
    notes: tuple[Note, ...]
    work: float = 1.0
    """The busiest rank's operations, times the number of ranks, over those of one device."""

    @property
    def methods(self) -> set[str]:
        """How attention is distributed: ``ulysses``, ``ring``, ``usp``; none where every rank attends for itself."""
        texts = [n.text.partition(":")[0] for n in self.notes if n.kind == "attention"]
        return {t for t in texts if t in ("ulysses", "ring", "usp")}


@lru_cache(maxsize=1)
def _captured(case: Case, batch: int, odd: bool) -> tuple[nn.Module, tuple[Any, Any], list[torch.Tensor], Program]:
    model = made(case)
    arguments = call_arguments(model, case.inputs(batch, odd))
    left = copy.deepcopy(arguments)
    with torch.no_grad():
        result = model(*left[0], **left[1])
        program = capture(model, *arguments)
        again = copy.deepcopy(arguments)
        repeated = model(*again[0], **again[1])
        assert all(map(torch.equal, flatten(result)[0], flatten(repeated)[0])), "capture changed the model"
    return model, arguments, flatten((result, left))[0], program


def emulate(case: Case, batch: int, odd: bool, spec: str) -> Found:
    """``case`` under ``spec``, each rank's program run in turn, against one call of the model."""
    return together(*_captured(case, batch, odd), spec)


@torch.no_grad()
def together(model: nn.Module, arguments: tuple[Any, Any], expected: list[torch.Tensor], program: Program,
             spec: str) -> Found:
    """All ranks' programs of ``program``, that of this call, against ``expected``: the tensors of the result and of
    what is left in the arguments."""
    return sharded(model, arguments, expected, *plan(program, ShardingSpec.parse(spec)))


@torch.no_grad()
def on_ranks(model: nn.Module, arguments: tuple[Any, Any], program: Program,
             spec: str) -> tuple[list[Program], list[tuple[Any, ...]]]:
    """The ranks' programs of ``program``, that of this call, and what each returns in lock-step."""
    canonical, seeds = plan(program, ShardingSpec.parse(spec))
    groups = parameter_groups(model)
    ranks = [localize(canonical, seeds, r, groups=groups) for r in range(ShardingSpec.parse(spec).world_size)]
    tensors, _ = flatten(arguments)
    return ranks, lockstep.run([r.main for r in ranks], [held(model, r, tensors) for r in ranks])


@torch.no_grad()
def sharded(model: nn.Module, arguments: tuple[Any, Any], expected: list[torch.Tensor], whole: Program,
            seeds: Seeds) -> Found:
    """All ranks' programs of ``whole``, a canonical program under a spec, sharded from these seeds."""
    assert whole.spec is not None
    groups = [local_groups(whole, seeds, parameter_groups(model), rank) for rank in range(whole.spec.world_size)]
    ranks = [localize(whole, seeds, rank, groups=own) for rank, own in enumerate(groups)]
    tensors, _ = flatten(arguments)
    error = 0.0
    given = [held(model, r, tensors, own) for r, own in zip(ranks, groups, strict=True)]
    for results in lockstep.run([r.main for r in ranks], given):
        mine = copy.deepcopy(arguments)
        actual, _ = flatten((whole.output_spec.finish(mine, flatten(mine)[0], results), mine))
        assert len(actual) == len(expected)
        error = max([error, *map(difference, actual, expected)])
    work = max(map(program_flops, ranks)) * len(ranks) / program_flops(whole)
    return Found(error, ranks[0].notes, work)


def held(model: nn.Module, local: Program, tensors: list[torch.Tensor],
         groups: Sequence[ParameterGroup] = ()) -> list[torch.Tensor]:
    """What a rank's program is given: its inputs, in order. ``groups``: of its parameters, by default the model's."""
    state = named_parts(dict([*model.named_parameters(remove_duplicate=False),
                              *model.named_buffers(remove_duplicate=False)]))
    given, shares = iter(tensors), shares_of(model, local, groups)
    return [next(given) if i.kind == "argument" else part_of({
        "constant": local.constants, "parameter_share": shares}.get(i.kind, state)[i.name], i.part)
        for i in local.inputs]


def part_of(tensor: torch.Tensor, part: Any) -> torch.Tensor:
    """The indices ``part`` of each dimension."""
    for dim, spans in enumerate(part or ()):
        index = [i for a, b in spans for i in range(a, b)]
        tensor = tensor.index_select(dim, torch.tensor(index, dtype=torch.long))
    return tensor


def shares_of(model: nn.Module, local: Program, groups: Sequence[ParameterGroup]) -> dict[str, torch.Tensor]:
    """What a rank holds of each group of the parameters that its program takes in shares."""
    if local.spec is None or local.position is None or not local.spec.parts:
        return {}
    groups = {g.name: g for g in groups or parameter_groups(model)}
    tensors = named_parts(dict(model.named_parameters(remove_duplicate=False)))
    made = {}
    for name in (i.name for i in local.inputs if i.kind == "parameter_share"):
        group = groups[name]
        length = group.share(local.spec.shard_degree) * local.spec.shard_degree
        memory = torch.full((length,), torch.nan).to(group.dtype)
        for member in group.members:
            place = memory[member.offset : member.offset + member.size]
            torch.as_strided(place, member.shape, member.stride, place.storage_offset()).copy_(
                part_of(tensors[member.name], member.part))
        made[name] = memory.chunk(local.spec.shard_degree)[local.position["shard"]].clone()
    return made


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value; infinite where anything but numbers differs, or is none."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else torch.inf
    scale = expected.abs().max().item()
    found = (actual - expected).abs().max().item() / (scale or 1.0)
    return torch.inf if math.isnan(found) else found
