"""Tidy the local graphs: equal nodes become one, unused ones go."""

from __future__ import annotations

from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

from xdit_compile.ir.program import Program, drop_unused, graph_module, is_collective


def simplify(program: Program) -> Program:
    """Needs nothing; guarantees that no function computes the same thing twice (a table sliced for every use, a
    value gathered for two consumers) or something nobody reads."""
    functions = {}
    for name, module in program.functions():
        # What must stay apart: two exchanges that look alike on one rank may differ on another.
        apart = get_CSE_banned_ops() | {getattr(n.target, "overloadpacket", n.target) for n in module.graph.nodes
                                        if is_collective(n) or n.op == "call_module"}
        merged = CSEPass(banned_ops=apart)(graph_module(name, module.graph, dict(module.named_children())))
        assert merged is not None
        graph = merged.graph_module.graph
        drop_unused(graph)
        functions[name] = graph
    return program.rebuilt(functions)
