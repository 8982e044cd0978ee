"""The verifier between passes: what the graphs say about themselves must hold."""

from __future__ import annotations

import torch

from xdit_compile.errors import PlanError
from xdit_compile.ir.program import Program, output_args, source_of
from xdit_compile.passes.attention_plan import sharded_attention


def check(program: Program) -> None:
    """Every piece has the shape its layout gives this rank, every output is whole, nothing is left to lower.

    Raises:
        PlanError: naming the node, its source, the layout and the shape.
    """
    for name, module in program.functions():
        module.graph.lint()
        for node in module.graph.nodes:
            layout = node.meta.get("layout")
            where = f"{name}.{node.name} ({source_of(node) or node.target})"
            if layout is not None and program.position is not None and layout.partial is None:
                want, have = layout.local_shape(program.position), tuple(node.meta["val"].shape)
                if want != have:
                    raise PlanError(f"{where} is laid out as {layout}, which is {want} here, but holds {have}")
            axes = [axis for dim in layout.dims for axis in dim.axes] if layout else []
            if len(set(axes)) < len(axes):
                raise PlanError(f"{where} is laid out as {layout}: one mesh axis cuts two dimensions")
            if node.target is sharded_attention and "lowered" in program.facts:
                raise PlanError(f"{where} is still a distributed attention after lowering")
    if program.part:
        return
    if "sharded" in program.facts:
        for node in output_args(program.main.graph):
            layout = node.meta.get("layout")
            if layout is not None and layout.sharded:
                raise PlanError(f"output {node.name} is {layout}; the caller expects all of it on every rank")
    values = [n.meta["val"] for n in output_args(program.main.graph)]
    wanted = len(program.written) + program.outputs.tensor_count + program.for_next_step
    if not all(isinstance(v, torch.Tensor) for v in values) or len(values) != wanted:
        raise PlanError(f"the program returns {len(values)} values, the model {wanted} tensors")
