"""Cut a program into the stages of a pipeline (PipeFusion, arXiv 2405.14430, section 3.1).

Values that depend on neither the sample nor joint text are computed ``once`` per step, by every stage that needs them:
embeddings of time and text, modulations, masks, positions, keys and values of cross attention. What depends on them
flows: it is computed patch by patch, and sent to the stage that goes on with it. Blocks are shared out so that the
busiest stage has least to do; what lies between follows its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx

from xdit_compile.errors import SpecError
from xdit_compile.ir.flops import flops
from xdit_compile.ir.program import Input, Program, module_of, output_args
from xdit_compile.ir.weights_in_graphs import unpacked
from xdit_compile.passes.hoist import extract, following, needed, part_of
from xdit_compile.passes.token_axis import arguments


@dataclass(frozen=True)
class Stage:
    """What one stage computes, as global programs.

    Attributes:
        once: run once per step; returns what ``body`` takes as ``once`` inputs, then the results that do not flow.
        body: run for each patch; returns the values in ``sends``, then, in the last stage, the model's ``results``.
        blocks: paths of its blocks.
        sends: name of each value that later stages need, and which do.
        results: places among the model's results of what ``body``, and of what ``once`` returns.
    """

    once: Program
    body: Program
    blocks: tuple[str, ...]
    sends: Mapping[str, tuple[int, ...]]
    results: tuple[int, ...]
    fixed: tuple[int, ...]

    @property
    def held(self) -> tuple[str, ...]:
        """Names of what ``body`` takes of what ``once`` computes."""
        return tuple(i.name for i in self.body.inputs if i.kind == "once")


def stages(program: Program, flowing: Collection[str], count: int, given: Sequence[int],
           known: Mapping[str, int]) -> tuple[Stage, ...]:
    """The stages of a hoisted program.

    Args:
        given: how many blocks each stage has; by their operations if it is empty.
        known: the stages of blocks that have them already.

    Raises:
        SpecError: there are fewer blocks than stages, or not as many as given.
    """
    graph = program.main.graph
    flow = [n for n in graph.nodes if n.name in flowing and n.op in ("call_function", "call_module")]
    blocks = blocks_in(program, flow)
    if known:
        stage_of_block = {path: known.get(path, count - 1) for path in blocks}
    else:
        stage_of_block = _shared_out(program, blocks, count, given)
    stage: dict[fx.Node, int] = {n: 0 for n in graph.nodes if n.name in flowing and n.op == "placeholder"}
    for node in flow:
        before = max((stage[n] for n in node.all_input_nodes if n in stage), default=0)
        stage[node] = before if node.target is operator.getitem else max(before, stage_of_block.get(block_of(node), 0))
    outputs = output_args(graph)
    asked = following(graph, arguments(program))
    made = []
    for index in range(count):
        mine = [n for n in flow if stage[n] == index]
        sends = {n: tuple(sorted({stage[u] for u in n.users if stage.get(u, index) > index})) for n in mine
                 if isinstance(n.meta["val"], torch.Tensor)}
        end = index == count - 1
        sends = {n: to if end or n not in outputs else tuple({*to, count - 1}) for n, to in sends.items()}
        sends = {n: to for n, to in sends.items() if to}
        results = [i for i, n in enumerate(outputs) if n in stage] if end else []
        fixed = [i for i, n in enumerate(outputs) if n not in stage] if end else []
        body, taken = extract(graph, _with_weights(graph, mine, flowing, asked),
                              [*sends, *(outputs[i] for i in results)])
        held = [n for n in taken if n.name not in flowing and n.op != "placeholder"]
        wanted = [*held, *(outputs[i] for i in fixed)]
        made_once = needed(wanted)
        once, once_taken = extract(graph, [n for n in graph.nodes if n in made_once], wanted)
        made.append(Stage(
            _program(program, once, once_taken, ()), _program(program, body, taken, held),
            tuple(b for b, s in stage_of_block.items() if s == index), {n.name: to for n, to in sends.items()},
            tuple(results), tuple(fixed)))
    return tuple(made)


def _with_weights(graph: fx.Graph, nodes: Collection[fx.Node], flowing: Collection[str],
                  asked: Collection[fx.Node]) -> list[fx.Node]:
    """These, and before them what unpacks weights that they use."""
    again = needed([w for n in nodes for w in n.all_input_nodes if w.name not in flowing and unpacked(w, asked)])
    every = again | set(nodes)
    return [n for n in graph.nodes if n in every]


def _program(program: Program, main: fx.Graph, taken: Sequence[fx.Node], held: Collection[fx.Node]) -> Program:
    known = dict(zip((n.name for n in program.main.graph.find_nodes(op="placeholder")), program.inputs, strict=True))
    inputs = tuple(known[n.name] if n.op == "placeholder" else Input("once" if n in held else "received", n.name)
                   for n in taken)
    return part_of(program, main, inputs, part=True)


# Blocks


def block_of(node: fx.Node) -> str:
    """The path of the block that made ``node``: that of the outermost numbered module."""
    names = module_of(node).split(".")
    numbered = next((i for i, name in enumerate(names) if name.isdecimal()), -1)
    return ".".join(names[: numbered + 1])


def blocks_in(program: Program, flow: Sequence[fx.Node]) -> dict[str, int]:
    """Blocks in the order in which they run, and their operations; those with less than a tenth of the largest's are
    none, but heads and embeddings."""
    functions = dict(program.functions())
    cost: dict[str, int] = {}
    for node in flow:
        own = _work(functions[str(node.target)].graph) if node.op == "call_module" else _flops(node)
        if path := block_of(node):
            cost[path] = cost.get(path, 0) + own
    most = max(cost.values(), default=0)
    return {path: c for path, c in cost.items() if 10 * c >= most}


def work(program: Program, flowing: Collection[str]) -> int:
    """Operations of what does not flow in a hoisted program."""
    functions = dict(program.functions())
    return sum(_work(functions[str(n.target)].graph) if n.op == "call_module" else _flops(n)
               for n in program.main.graph.nodes if n.name not in flowing)


def _work(graph: fx.Graph) -> int:
    return sum(map(_flops, graph.nodes))


def _flops(node: fx.Node) -> int:
    if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor):
        return 0
    args = fx.map_arg(tuple(node.args), lambda n: getattr(n.meta["val"], "shape", None))
    return flops(node.target, args, node.meta["val"].shape)


def _shared_out(program: Program, blocks: Mapping[str, int], count: int, given: Sequence[int]) -> dict[str, int]:
    """The stage of each block, in their order: as given, or so that the busiest stage has least to do."""
    if len(blocks) < count:
        raise SpecError(f"{program.spec} asks for {count} stages, but the model has {len(blocks)} blocks to share out "
                        f"({', '.join(blocks)}); use at most pipefusion={max(len(blocks), 1)}")
    if given and sum(given) != len(blocks):
        raise SpecError(f"{program.spec} gives stages {sum(given)} blocks, but the model has {len(blocks)}")
    sizes = given or balanced(list(blocks.values()), count)
    borders = list(accumulate(sizes))
    return {path: sum(i >= b for b in borders) for i, path in enumerate(blocks)}


def balanced(costs: Sequence[int], count: int) -> list[int]:
    """How many of these, in order, go to each of ``count`` stages, so that the largest sum is least."""
    total = [0, *accumulate(costs)]
    best: dict[tuple[int, int], tuple[int, list[int]]] = {(0, 0): (0, [])}
    for n in range(1, count + 1):
        for end in range(n, len(costs) + 1):
            options = [(max(best[n - 1, start][0], total[end] - total[start]), best[n - 1, start][1] + [end - start])
                       for start in range(n - 1, end) if (n - 1, start) in best]
            if options:
                best[n, end] = min(options)
    return best[count, len(costs)][1]
