"""Calls of a model as a denoising loop makes them, and what is saved by keeping what they have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import displaced
import torch
import zoo
from cases import Inputs, made
from emulation import difference
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import xdit_compile
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.program import Program, is_collective
from xdit_compile.ir.pytree import flatten
from xdit_compile.ir.step_inputs import step_inputs
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.runtime.execution.executor import Executor


def stepped(model: nn.Module, inputs: Inputs, step: int) -> Inputs:
    """The call with another sample and time: new tensors, and all others the same."""
    changes = {n.partition("[")[0] for n in step_inputs(model, *call_arguments(model, inputs)).values()}

    def moved(t: Tensor) -> Tensor:
        return t * (1 - 0.07 * step) if t.is_floating_point() else (t - 9 * step).clamp(min=1)

    return {n: pytree.tree_map_only(torch.Tensor, moved, a) if n in changes else a for n, a in inputs.items()}


def again(inputs: Inputs) -> Inputs:
    """The same values in new tensors: another prompt."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, inputs)


def results(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return flatten(materialize(model(**inputs)))[0]


def error(model: nn.Module, run: Callable[..., Any], inputs: Inputs) -> float:
    """The largest difference between the model as it is and ``run``, of the output's scale."""
    expected = results(model, copy.deepcopy(inputs))
    return max(map(difference, results(run, inputs), expected))


def flops(run: Callable[..., Any], inputs: Inputs) -> int:
    """What a call executes. Of attention kernels the counter knows only some, so that there is none here."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        results(run, inputs)
    return counter.get_total_flops()


def executor_of(run: Any) -> Executor:
    """What runs the one kind of call that a parallel model has seen."""
    (ready,) = run.runners["forward"].programs.values()
    return ready.executor


def collectives(program: Program) -> int:
    return sum(is_collective(n) for _, m in program.functions() for n in m.graph.nodes)


def steps_on_ranks(name: str, spec: str, steps: int = 4) -> dict[str, Any]:
    """On one rank: whether each step is, bit for bit, what it is when nothing is kept. The last rank is given a prompt
    of its own at each step, of equal values."""
    model, case = made(zoo.CASES[name]), zoo.CASES[name]
    inputs = case.inputs(2, True)
    world = xdit_compile.ShardingSpec.parse(spec).world_size
    on, off = (xdit_compile.parallelize(copy.deepcopy(model), f"{spec}{more}", ranks=range(world), timeout=100)
               for more in ("", ",keep=off"))  # fmt: skip
    last, equal, errors = torch.distributed.get_rank() == world - 1, [], []
    for step, time in enumerate(displaced.times(inputs, steps)):
        moved = stepped(model, inputs, step) | {"timestep": time}
        given = {n: a if n in ("hidden_states", "timestep") else again(a) for n, a in moved.items()} if last else moved
        kept, plain = results(on, given), results(off, moved)
        equal.append(all(map(torch.equal, kept, plain)))
        errors.append(max(map(difference, kept, results(model, moved))))
    (ready,) = on.runners["forward"].programs.values()
    invariant = ready.compiled.stage.invariant if ready.compiled.stage else ready.compiled.invariant
    return {"equal": equal, "errors": errors, "used again": on.runners["forward"].group.counts["kept"],
            "collectives": collectives(invariant), "off": off.runners["forward"].group.counts["kept"]}
