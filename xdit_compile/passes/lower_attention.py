"""The pass that replaces every distributed attention by its collectives and kernels."""

from __future__ import annotations

from typing import Any

from torch import fx

from xdit_compile.ir.program import Program
from xdit_compile.passes.attention_collectives import lower
from xdit_compile.passes.attention_plan import sharded_attention
from xdit_compile.passes.emitter import Emitter


def lower_attention(program: Program, sizes: dict[str, int], mode: Any) -> Program:
    """Needs a sharded program; guarantees that it can be executed."""
    assert program.position is not None and program.spec is not None
    functions = {}
    for name, module in program.functions():
        e = Emitter(mode, program.position, sizes)
        env: dict[fx.Node, fx.Node] = {}
        for node in module.graph.nodes:
            if node.target is sharded_attention:
                args = fx.map_arg(node.args, lambda n, env=env: env[n])
                with e.standing_for(node):
                    env[node] = lower(e, node, args, program.spec.attention_kernel)
                env[node].meta["layout"] = node.meta["layout"]
            else:
                env[node] = e.graph.node_copy(node, lambda n, env=env: env[n])
        functions[name] = e.graph
    return program.rebuilt(functions, "lowered")
