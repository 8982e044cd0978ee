"""Cuts a graph into what a compiler takes: runs of nodes between those that have to stay where they are.

The order of nodes stays what it was, as it is the order in which collectives start on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from xdit_compile.ir.program import graph_module

Function = Callable[..., Any]


def outline_segments(main: fx.GraphModule, apart: Callable[[fx.Node], bool],
                     build: Callable[[fx.GraphModule], Function], called: Mapping[str, Function]) -> fx.GraphModule:
    """``main`` with the runs of nodes between those that are ``apart`` called as functions.

    Args:
        main: any graph; it is not changed.
        apart: which operators stay in ``main`` and end a run. Calls of modules always do.
        build: makes what a run is called as from a graph of its nodes, which returns a tuple of what others read.
        called: what ``main`` calls already, by name.
    """
    runs = _runs(main.graph, apart)
    inside = {n for nodes in runs.values() for n in nodes}
    graph, env, functions = fx.Graph(), dict[fx.Node, fx.Node](), dict(called)
    for node in main.graph.nodes:
        if nodes := runs.get(node):
            name = f"run_{len(functions)}"
            given, results, made = _function(nodes)
            functions[name] = build(made)
            call = graph.call_module(name, tuple(env[n] for n in given))
            env |= {n: graph.call_function(operator.getitem, (call, i)) for i, n in enumerate(results)}
        if node not in inside:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(functions, graph, "main")


def _runs(graph: fx.Graph, apart: Callable[[fx.Node], bool]) -> dict[fx.Node, list[fx.Node]]:
    """By the node before which it is called: the nodes of each run, in order."""
    runs, found, current = dict[fx.Node, list[fx.Node]](), dict[fx.Node, list[fx.Node]](), list[fx.Node]()
    for node in graph.nodes:
        if node.target is operator.getitem:
            # A part of a tuple stays with the tuple, which is no result of a run.
            if (nodes := found.get(node.args[0])) is not None:
                nodes.append(node)
                found[node] = nodes
        elif node.op == "call_function" and not apart(node):
            current.append(node)
            found[node] = current
        elif node.op in ("call_function", "call_module", "output"):
            if current:
                runs[node] = current
            current = []
    return runs


def _function(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], fx.GraphModule]:
    """What ``nodes`` read of others, what others read of them, and a graph of them."""
    inside = set(nodes)
    given = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    results = [n for n in nodes if any(u not in inside for u in n.users)]
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in results))
    return given, results, graph_module("run", graph)
