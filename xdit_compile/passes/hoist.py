"""Part a program into what one set of its inputs leaves alone, and the rest.

What does not flow from the inputs where the flow ``begin``s is found in ``main`` and in each block function, which is
parted in two: what does not flow, called first, and the rest. Stages of a pipeline so compute once per step what the
sample leaves alone (``stage_partition.py``); ``split_loop_invariant`` finds what a denoising loop need compute only
once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.flops import aten
from xdit_compile.ir.host_copy import is_fetch
from xdit_compile.ir.program import Input, Program, graph_module, is_collective, is_write, output_args
from xdit_compile.ir.weights_in_graphs import is_weight

COPIES = {aten._to_copy.default, aten.clone.default, operator.getitem}
"""Operators that are no views and cost as little."""
Spared = Callable[[fx.Node, Collection[fx.Node]], bool]
"""Of a value that does not flow, and those that depend on arguments: whether to compute it with the rest all the
same."""


def split_loop_invariant(program: Program, begin: Collection[str]) -> tuple[Program | None, Program]:
    """What of a local program does not depend on the arguments ``begin`` (by their inputs' names, ``arg_0``), and the
    rest, which takes the results of the first as its ``invariant`` inputs. None where there is nothing worth keeping.

    The first has no collectives: whether it runs is each rank's own affair. It leaves to the rest what costs next to
    nothing, and what parameters alone become before they are used as weights, of which there would else be two.
    """
    holders = program.main.graph.find_nodes(op="placeholder")
    names = {n.name for n, i in zip(holders, program.inputs, strict=True)
             if i.kind == "received" or (i.kind == "argument" and i.name in begin)}
    parted, flowing = hoist(program, names, _spared)
    graph = parted.main.graph
    holders = graph.find_nodes(op="placeholder")
    inputs = dict(zip(holders, program.inputs, strict=True))
    parts = _parted(graph, {n for n in graph.nodes if n.name in flowing},
                    following(graph, [n for n in holders if inputs[n].kind == "argument"]), _spared)
    if not parts.held:
        return None, program
    invariant = part_of(parted, parts.once, [inputs[n] for n in parts.once_takes], part=True)
    takes = [inputs.get(n) or Input("invariant", n.name) for n in parts.rest_takes]
    body = part_of(parted, parts.rest, takes, program.part)
    return invariant, body


def hoist(program: Program, begin: Collection[str],
          spared: Spared = lambda *_: False) -> tuple[Program, set[str]]:
    """``program`` with every block function parted into what does not flow, called first, and the rest; and the names
    of values of ``main`` that flow. What ranks exchange or write into memory always flows.

    Args:
        begin: names of values of ``main`` where the flow begins: what is cut, and what uses the others.
        spared: what does not flow and is left to the rest all the same.
    """
    functions = dict(program.functions())
    parted: dict[tuple[str, tuple[tuple[bool, bool], ...]], _Parts] = {}
    graphs: dict[str, fx.Graph] = {}
    new = fx.Graph()
    env: dict[Any, fx.Node] = {}
    flowing: set[fx.Node] = set()
    given = {n: i.kind in ("argument", "received") for n, i in zip(
        program.main.graph.find_nodes(op="placeholder"), program.inputs, strict=True)}
    asked = following(program.main.graph, [n for n, argument in given.items() if argument])
    starts = {name for name, module in functions.items() if any(map(_starts, module.graph.nodes))}
    for node in program.main.graph.nodes:
        flows = (given.get(node, False) and node.name in begin) or any(
            n in flowing or n.name in begin for n in node.all_input_nodes) or _starts(node) or (
            node.op == "call_module" and node.target in starts)
        if node.op == "call_module" and flows:
            mask = tuple((a in flowing or a.name in begin, a in asked) for a in node.args)
            key = (str(node.target), mask)
            if key not in parted:
                inside = functions[key[0]].graph
                pairs = list(zip(inside.find_nodes(op="placeholder"), mask, strict=True))
                parted[key] = _parted(inside, following(inside, [n for n, (f, _) in pairs if f], _starts),
                                      following(inside, [n for n, (_, a) in pairs if a]), spared)
                parts, name = parted[key], f"{key[0]}{'_' * sum(k[0] == key[0] for k in list(parted)[:-1])}"
                graphs |= {f"{name}_once": parts.once, f"{name}_flow": parts.rest}
                parts.names += [f"{name}_once", f"{name}_flow"]
            parts = parted[key]
            place = {n: i for i, n in enumerate(functions[key[0]].graph.find_nodes(op="placeholder"))}
            held: list[fx.Node] = []
            if parts.held:
                taken = [env[node.args[place[n]]] for n in parts.once_takes]
                call = _call(new, parts.names[0], taken, parts.once, node, "_once")
                held = [_item(new, call, i, node) for i in range(len(parts.held))]
            taken = [env[node.args[place[n]]] for n in parts.rest_takes if n in place]
            rest = _call(new, parts.names[1], taken + held, parts.rest, node, "")
            env[node] = rest
            flowing.add(node)
            flowing.add(rest)
            continue
        if node.op == "call_module":
            graphs[str(node.target)] = functions[str(node.target)].graph
        env[node] = new.node_copy(node, lambda n: env[n])
        if flows:
            flowing |= {node, env[node]}
    names = {n.name for n in new.nodes if n in flowing}
    return program.rebuilt({"main": new, **graphs}, "parted"), names


@dataclass
class _Parts:
    """A graph, parted: ``once`` returns the values ``held``, which the rest takes last, and what each of them takes."""

    held: list[fx.Node]
    once: fx.Graph
    rest: fx.Graph
    once_takes: list[fx.Node]
    rest_takes: list[fx.Node]
    names: list[str] = field(default_factory=list)


def _parted(graph: fx.Graph, flowing: Collection[fx.Node], asked: Collection[fx.Node], spared: Spared) -> _Parts:
    edge = [n for n in graph.nodes if n not in flowing and n.op == "call_function" and isinstance(
        n.meta["val"], torch.Tensor) and any(u in flowing or u.op == "output" for u in n.users)]
    held = [n for n in edge if not spared(n, asked)]
    first, again = needed(held), needed([n for n in edge if n not in held], held)
    once, once_takes = extract(graph, [n for n in graph.nodes if n in first], held)
    mine = [n for n in graph.nodes if n.op in ("call_function", "call_module") and (n in flowing or n in again)]
    rest, rest_takes = extract(graph, mine, list(output_args(graph)), held)
    return _Parts(held, once, rest, once_takes, rest_takes)


def _starts(node: fx.Node) -> bool:
    """Whether all ranks must come to ``node``, at each step; or it brings parameters, which do not stay."""
    return is_collective(node) or is_write(node) or is_fetch(node)


def following(graph: fx.Graph, begin: Collection[fx.Node],
               starts: Callable[[fx.Node], bool] = lambda _: False) -> set[fx.Node]:
    """These nodes, those that start by themselves, and all that depends on any of them."""
    found = set(begin)
    for node in graph.nodes:
        if starts(node) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _spared(node: fx.Node, asked: Collection[fx.Node]) -> bool:
    """Whether a value costs next to nothing, or is what parameters become before they are used as weights."""
    origin = node
    while origin.op == "call_function" and len(origin.all_input_nodes) == 1 and (
            origin.target in COPIES or _may_be_view(origin)):
        origin = origin.all_input_nodes[0]
    bare = origin.op != "call_module" and not origin.all_input_nodes
    return bare or (node not in asked and is_weight(node))


def _may_be_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info for r in schema.returns)


def needed(nodes: Sequence[fx.Node], known: Collection[fx.Node] = ()) -> set[fx.Node]:
    """All that makes these, but inputs of the graph and what is ``known``."""
    found, queue = set(), [n for n in nodes if n.op != "placeholder"]
    while queue:
        if (node := queue.pop()) not in found:
            found.add(node)
            queue += [n for n in node.all_input_nodes if n.op != "placeholder" and n not in known]
    return found


def extract(graph: fx.Graph, nodes: Sequence[fx.Node], results: Sequence[fx.Node],
            extra: Sequence[fx.Node] = ()) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of ``nodes`` and the results; and what it takes, in order: inputs of ``graph``, then ``extra``."""
    inside = set(nodes)
    wanted = {n for node in nodes for n in node.all_input_nodes} | set(results)
    takes = [n for n in graph.nodes if n in wanted and n not in inside and n not in extra] + list(extra)
    new, env = fx.Graph(), {}
    for node in takes:
        env[node] = new.placeholder(node.name)
        env[node].meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    for node in nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
    out = new.output(tuple(env[n] for n in results))
    out.meta["val"] = tuple(n.meta["val"] for n in results)
    return new, takes


def part_of(program: Program, main: fx.Graph, inputs: Sequence[Input], part: bool) -> Program:
    """The program of ``main``, with those block functions that it calls."""
    called = {n.target for n in main.find_nodes(op="call_module")}
    children = {name: module for name, module in program.functions() if name in called}
    return program.having(main=graph_module("main", main, children), inputs=tuple(inputs), part=part)


def _call(graph: fx.Graph, name: str, args: Sequence[fx.Node], function: fx.Graph, like: fx.Node,
          suffix: str) -> fx.Node:
    node = graph.create_node("call_module", name, tuple(args), {}, like.name + suffix)
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    node.meta["val"] = tuple(n.meta["val"] for n in output_args(function))
    return node


def _item(graph: fx.Graph, call: fx.Node, index: int, like: fx.Node) -> fx.Node:
    # Names of the values that were there before stay theirs.
    node = graph.create_node("call_function", operator.getitem, (call, index), {}, f"{call.name}_{index}")
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    node.meta["val"] = call.meta["val"][index]
    return node
