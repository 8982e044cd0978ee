"""What one of N ranks computes, on one device: its program with copies of as many bytes in the place of collectives.

That is the time of N devices whose network is as fast as their memory, and shows what sharding itself costs: shares
that are uneven or small, work that all ranks repeat, pieces that are cut and joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gpu_parts.full_size import flux_of
from gpu_parts.run import Figures, Run
from gpu_parts.steps import timed
from xdit_compile.driver.compile_call import compile_call
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.report.costs import costs_of
from xdit_compile.report.operations import program_flops
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.spec import ShardingSpec

c10d = torch.ops._c10d_functional


def local(run: Run) -> Figures:
    """The local program of one of 2, 4 and 8 ranks of FLUX, against 1/N of the time of one."""
    return alone(run, ("ulysses=1", "ulysses=2", "ulysses=4", "ulysses=8"))


def rings(run: Run) -> Figures:
    """The same of ranks that pass keys and values on."""
    return alone(run, ("ulysses=1", "ring=2", "ulysses=4,ring=2"))


def alone(run: Run, specs: Sequence[str]) -> Figures:
    """One rank's program of FLUX under each of these specs, the first of which is for one device."""
    found = flux_of(run)
    run.put("model", found.name)
    args, kwargs = call_arguments(found.model, found.inputs)
    tensors, _ = flatten((args, kwargs))
    place = next(i for i, t in enumerate(tensors) if t is found.inputs["timestep"])
    times = [tensors[place] * (1 - i / 64) for i in range(64)]
    one: list[float] = []
    for spec in specs:
        def measured(spec: str = spec) -> Figures:
            parsed = ShardingSpec.parse(f"{spec},backend={run.backend}")
            compiled = compile_call(found.model, parsed, args, kwargs)
            executor = Executor(copying(compiled.body), found.model, compiled.invariant and copying(compiled.invariant))

            def step(i: int) -> Any:
                return executor([*tensors[:place], times[i % 64], *tensors[place + 1 :]])

            figures = timed(run, step) | {"ranks": parsed.world_size, "flops": program_flops(compiled.body)}
            costs = costs_of(compiled.local)
            figures |= {"collectives": costs.collective_count, "bytes_sent": costs.sent}
            if parsed.world_size == 1:
                one.append(figures["step_ms"])
            # Of one device's time, times the number of ranks: 1 is ideal.
            figures["of_ideal"] = figures["step_ms"] * parsed.world_size / one[0] if one else None
            return figures

        run.attempt(spec, measured, 0 if run.tiny else 20)
        run.free()
    return run.figures


def copying(program: Program) -> Program:
    """``program`` without processes: each collective copies what it is given, and waits for nobody."""
    graphs = {}
    for name, module in program.functions():
        made, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in module.graph.nodes:
            if node.target is c10d.wait_tensor.default:
                env[node] = env[node.args[0]]
                continue
            env[node] = made.node_copy(node, env.__getitem__)
            if rows := _rows(node):
                env[node].target, env[node].args = COPY, (env[node.args[0]], rows)
        graphs[name] = made
    return program.rebuilt(graphs)


def _rows(node: fx.Node) -> int | None:
    """How many rows the result of a collective has; None for any other node."""
    if node.target in (c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default, c10d.all_reduce.default):
        return node.meta["val"].shape[0]
    return None


def _copied(x: Tensor, rows: int) -> Tensor:
    """``rows`` rows of ``x``, which begins anew where it has fewer."""
    if rows == x.shape[0]:
        return x.clone(memory_format=torch.contiguous_format)
    made = x.new_empty(rows, *x.shape[1:])
    for start in range(0, rows, max(x.shape[0], 1)):
        made[start : start + x.shape[0]] = x[: min(x.shape[0], rows - start)]
    return made


_library = torch.library.Library("xdit_campaign", "DEF")
_library.define("copied(Tensor x, int rows) -> Tensor")
_library.impl("copied", _copied, "CompositeExplicitAutograd")
torch.library.register_fake("xdit_campaign::copied", lambda x, rows: x.new_empty(rows, *x.shape[1:]), lib=_library)
COPY = torch.ops.xdit_campaign.copied.default
