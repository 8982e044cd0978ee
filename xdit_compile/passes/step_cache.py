"""Where a program is cut so that a step may leave blocks out, and the three programs that this gives.

The ``head`` goes up to where the blocks that may be left out begin, and says how far what it has computed is from that
of a step before; the ``blocks`` give what leaves them and what they have added to the residual stream; the ``rest``
makes the model's results of that. A step that leaves blocks out adds what they added before (FBCache of ParaAttention;
TeaCache, arXiv 2411.19108; TaylorSeer, arXiv 2503.06923). All are programs over the same seeds, so that any sharding
does.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from xdit_compile.errors import SpecError
from xdit_compile.ir.flops import FORMULAS
from xdit_compile.ir.layout import BATCH, SEQUENCE, TENSOR, Layout
from xdit_compile.ir.mesh import axis_sizes, position_of
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Input, Program, output_args
from xdit_compile.ir.step_inputs import PROBE
from xdit_compile.passes import localize
from xdit_compile.passes.hoist import extract, following, needed, part_of
from xdit_compile.passes.interpreter import FunctionInterpreter, Leave, ProgramInterpreter, Seeds
from xdit_compile.passes.residual_stream import CUTS, Streams, streams_of
from xdit_compile.passes.sharded_value import Value
from xdit_compile.passes.stage_partition import block_of, blocks_in

aten = torch.ops.aten
DATA = {aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Which argument of a contraction is the data, where it is not the first."""


@dataclass(frozen=True)
class Cut:
    """Where to cut the canonical ``program``.

    Attributes:
        enters: the residual stream where blocks that may be left out begin.
        probe: what two steps are compared by: the node, or the nodes of which it is the difference.
        inside: of a probe inside of a block function: the call whose first nodes make it, else None.
        flow: the nodes that change from step to step; head, blocks, rest: those of each program.
        leaving: what leaves the blocks, and which value of the head each is compared with: None for a value that is not
            part of a stream that the head has, and is used again as it was.
        left_out: the paths of the blocks that may be left out; ``all_blocks``: of all.
    """

    program: Program
    enters: fx.Node
    probe: tuple[fx.Node, ...]
    inside: fx.Node | None
    flow: frozenset[fx.Node]
    head: frozenset[fx.Node]
    blocks: frozenset[fx.Node]
    rest: frozenset[fx.Node]
    leaving: tuple[tuple[fx.Node, fx.Node | None], ...]
    left_out: tuple[str, ...]
    all_blocks: tuple[str, ...]


@dataclass(frozen=True)
class CachedParts:
    """Three programs; of which values each takes, and gives, by name.

    Attributes:
        passed: what the head returns, after its probe and the two sums that say how far it has moved.
        streams: for each value that leaves the blocks, the value of the head that is added to, or None.
    """

    head: Program
    blocks: Program
    rest: Program
    passed: tuple[str, ...]
    leaving: tuple[str, ...]
    streams: tuple[str | None, ...]
    left_out: tuple[str, ...]
    all_blocks: tuple[str, ...]


def find_cut(program: Program, begin: Collection[str]) -> Cut:
    """Where to cut a canonical program for the cache that its spec asks for; changes nothing.

    Args:
        begin: the names of the inputs that change from step to step (``arg_0``).

    Raises:
        SpecError: the call is no step of a loop, or blocks do not follow each other on a residual stream.
    """
    spec = program.spec
    assert spec is not None
    if not begin or program.output_spec.changes_arguments:
        why = "writes into its arguments" if begin else "has no time among its arguments, and is no step of a loop"
        raise SpecError(f"{spec}: a call of the model that {why} keeps nothing for the next; leave cache out")
    graph = program.main.graph
    given = dict(zip(graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    flow = following(graph, [n for n, i in given.items() if i.kind == "argument" and i.name in begin])
    blocks = blocks_in(program, [n for n in graph.nodes if n in flow and n.op in ("call_function", "call_module")])
    streams = streams_of(program, lambda n: path if (path := block_of(n)) in blocks else "")
    sample = max((n for n, i in given.items() if i.kind == "argument" and i.name in begin),
                 key=lambda n: n.meta["val"].numel())
    shown = following(graph, [sample])
    # Of streams that come through as many blocks, that of the sample's own tokens goes farthest back.
    last = max((n for n in graph.nodes if n in shown), key=lambda n: (
        streams.depth.get(n, 0) if streams.line(n)[-1] in shown else 0, len(streams.line(n))))
    through, line = _through(streams, last, blocks), streams.line(last)[::-1]
    before = [*takewhile(lambda n: block_of(n) != through[0], line)] or [n for n in line[:1] if _is_cut(n)]
    if len(through) < 2 or not before:
        found = ", ".join(blocks) or "none"
        raise SpecError(f"{spec}: steps leave blocks out that add to one stream of features, one after the other, but "
                        f"in this model there are not two (blocks: {found}); leave cache out")
    order = list(blocks)
    first = through[0] if spec.cache == "first_block" else None
    entered = enters = before[-1]
    call = None
    probe: tuple[fx.Node, ...] = (entered,)
    if first is not None:
        enters = [n for n in line if block_of(n) == first][-1]
        probe = (enters, entered)
    # What a block makes of the time alone is needed at each step, if others read it.
    later, streaming = order[order.index(through[0]):], following(graph, [enters])
    inside = {n for n in graph.nodes if n in streaming and block_of(n) in later and block_of(n) != first} - {enters}
    dependent = following(graph, inside)
    between = (needed(sorted(inside)) & dependent) | inside
    between |= {u for n in between if n.op == "call_module" for u in n.users}
    leaving, between = _leaving(graph, streams, dependent, between)
    anchors = [a for _, a in leaving if a is not None]
    if spec.cache == "teacache":
        probe, call = _modulated(program, graph, entered, through[0])
    # Above what blocks begin with, all is computed at each step.
    head = needed([enters, entered, *anchors, *(n for n in probe if n not in dependent)])
    head |= {n for call_ in head for n in call_.users if n.target is operator.getitem and n not in dependent}
    if call is not None:
        head |= needed([n for n in call.all_input_nodes if n not in dependent])
    return Cut(program, enters, probe, call, frozenset(flow), frozenset(head), frozenset(between),
               frozenset(dependent - between), tuple(leaving),
               tuple(p for p in order if p in {block_of(n) for n in inside}), tuple(order))


def _through(streams: Streams, last: fx.Node, blocks: Collection[str]) -> list[str]:
    """The blocks that a stream comes through, in order."""
    paths = [block_of(n) for n in streams.line(last)[::-1]]
    return list(dict.fromkeys(p for p in paths if p in blocks))


def _is_cut(node: fx.Node) -> bool:
    """Whether this is a part of what was there before any block, though the block that it enters has cut it off."""
    while node.target in CUTS or node.target in (aten.slice.Tensor, operator.getitem):
        node = node.args[0]  # type: ignore[assignment]
        if not block_of(node):
            return True
    return False


def _leaving(graph: fx.Graph, streams: Streams, dependent: Collection[fx.Node], between: Collection[fx.Node]
             ) -> tuple[list[tuple[fx.Node, fx.Node | None]], set[fx.Node]]:
    """What leaves the blocks, with the value before them that it continues; and the nodes between, with those that only
    cut and turn what leaves until it is such a value."""
    between, outputs = set(between), output_args(graph)

    def anchor(value: fx.Node) -> fx.Node | None:
        known = next((n for n in streams.line(value) if n not in dependent), None)
        return known if known is not None and known.meta["val"].shape == value.meta["val"].shape else None

    while True:
        edge = [n for n in graph.nodes if n in between and isinstance(n.meta["val"], torch.Tensor)
                and (n in outputs or any(u not in between for u in n.users))]
        more = {u for n in edge if anchor(n) is None and n not in outputs for u in n.users if u not in between
                and len(u.all_input_nodes) == 1 and (u in streams.before or u.target is aten.slice.Tensor)}
        if not more:
            return [(n, anchor(n)) for n in edge], between
        between |= more


def _modulated(program: Program, graph: fx.Graph, entered: fx.Node, first: str
               ) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
    """What the first contraction of the first block is given of the stream: normalised and modulated by the time."""
    functions = dict(program.functions())
    call = next((n for n in graph.nodes if n.op == "call_module" and block_of(n) == first and entered in n.args), None)
    where, start = graph, entered
    if call is not None:
        where = functions[str(call.target)].graph
        start = where.find_nodes(op="placeholder")[call.args.index(entered)]
    flow = following(where, [start])
    for node in where.nodes:
        if node.target in FORMULAS and (call is not None or block_of(node) == first):
            given = node.args[DATA.get(node.target, 0)]
            if given in flow and given is not start:
                return (given,), call
    raise SpecError(f"{program.spec}: the block {first} begins with no projection of what it is given, by which steps "
                    "could be compared; use cache=first_block")


# The three programs


def parts_of(cut: Cut) -> CachedParts:
    """The programs, still whole."""
    program, graph = cut.program, cut.program.main.graph
    assert program.spec is not None
    inputs = dict(zip(graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    leaving, outputs = [y for y, _ in cut.leaving], output_args(graph)
    streams = [a for _, a in cut.leaving]
    wanted = {n for part in (cut.blocks, cut.rest) for node in part for n in node.all_input_nodes}
    wanted |= {a for a in streams if a is not None} | set(outputs)
    # What does not change from step to step each part has for itself, and keeps it.
    passed = [n for n in graph.nodes if n in cut.head and n in wanted and isinstance(n.meta["val"], torch.Tensor)
              and (n in cut.flow or program.spec.keep == "off" or program.spec.parts)]

    asked = [] if cut.inside is None else _asked(program, cut.inside, cut.probe[0])
    head, takes = extract(graph, [n for n in graph.nodes if n in cut.head], [*passed, *asked])
    results = output_args(head)[: len(passed)]
    here = {n.name: n for n in head.nodes}
    probe, sums = _compared(head, [here[n.name] for n in cut.probe] if cut.inside is None else [
        _copied(program, head, here, cut.inside, cut.probe[0])])
    _returning(head, [probe, sums, *results])
    holders = [inputs[n] for n in takes]
    place = [n.name for n in head.find_nodes(op="placeholder")].index(PROBE)
    holders.insert(place, Input("received", PROBE))

    def part(nodes: Collection[fx.Node], ends: Sequence[fx.Node], come: Sequence[fx.Node]) -> tuple[
            fx.Graph, list[Input]]:
        # What nobody has computed yet is computed here: it depends on no block.
        read = {*ends, *(i for m in nodes for i in m.all_input_nodes)} - set(come) - set(nodes)
        inside = set(nodes) | needed(sorted(read), set(come))
        made, taken = extract(graph, [n for n in graph.nodes if n in inside], ends)
        return made, [inputs.get(n) or Input("received", n.name) for n in taken]

    middle, of_middle = part(cut.blocks, [*leaving, *dict.fromkeys(a for a in streams if a is not None)], passed)
    here = {n.name: n for n in middle.nodes}
    added = [_emit(middle, aten.sub.Tensor, here[y.name], here[a.name]) for y, a in cut.leaving if a is not None]
    _returning(middle, [*(here[y.name] for y in leaving), *added])
    rest, of_rest = part(cut.rest, outputs, [*passed, *leaving])
    return CachedParts(
        part_of(program, head, holders, True), part_of(program, middle, of_middle, True),
        part_of(program, rest, of_rest, program.part), tuple(n.name for n in passed),
        tuple(y.name for y in leaving), tuple(a and a.name for a in streams), cut.left_out, cut.all_blocks)


def _asked(program: Program, call: fx.Node, wanted: fx.Node) -> list[fx.Node]:
    """Which arguments of ``call`` a value inside of the function is made of."""
    inside = dict(program.functions())[str(call.target)].graph
    read = {i for n in needed([wanted]) for i in n.all_input_nodes}
    return [a for n, a in zip(inside.find_nodes(op="placeholder"), call.args, strict=True) if n in read]


def _copied(program: Program, graph: fx.Graph, here: dict[str, fx.Node], call: fx.Node, wanted: fx.Node) -> fx.Node:
    """A value inside of the function that ``call`` calls, computed in ``graph``."""
    inside = dict(program.functions())[str(call.target)].graph
    env = {n: here[a.name] for n, a in zip(inside.find_nodes(op="placeholder"), call.args, strict=True)
           if a.name in here}
    end = next(n for n in graph.nodes if n.op == "output")
    nodes = needed([wanted])
    with graph.inserting_before(end):
        for node in (n for n in inside.nodes if n in nodes):
            env[node] = graph.node_copy(node, lambda n: env[n])
    return env[wanted]


def _compared(graph: fx.Graph, given: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The probe, and (2,) sums: of the absolute changes since the step before, and of the absolute values then."""
    probe = given[0] if len(given) == 1 else _emit(graph, aten.sub.Tensor, *given)
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        before = graph.placeholder(PROBE)
    before.meta["val"] = torch.empty_like(probe.meta["val"])
    both = [_emit(graph, aten._to_copy.default, x, dtype=torch.float32) for x in (probe, before)]
    changes = [_emit(graph, aten.abs.default, x) for x in (_emit(graph, aten.sub.Tensor, *both), both[1])]
    # Dimension by dimension: what ranks share out is summed when little is left of it.
    changes = [_emit(graph, aten.sum.dim_IntList, x, [-1]) for x in changes]
    sums = _emit(graph, aten.stack.default, changes)
    while sums.meta["val"].ndim > 1:
        sums = _emit(graph, aten.sum.dim_IntList, sums, [-1])
    return probe, sums


def _emit(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    end = next(n for n in reversed(graph.nodes) if n.op == "output")
    with graph.inserting_before(end):
        node = graph.call_function(target, args, kwargs)
    given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        node.meta["val"] = target(*given[0], **given[1])
    return node


def _returning(graph: fx.Graph, results: Sequence[fx.Node]) -> None:
    """Let ``graph`` return these."""
    graph.erase_node(next(n for n in reversed(graph.nodes) if n.op == "output"))
    out = graph.output(tuple(results))
    out.meta["val"] = tuple(n.meta["val"] for n in results)


# One rank's


def localize_parts(parts: CachedParts, seeds: Seeds, rank: int, groups: Sequence[ParameterGroup] = ()) -> CachedParts:
    """The programs of ``rank``: values go from one to the next as they are laid out."""
    spec = parts.head.spec
    assert spec is not None
    sizes, position = axis_sizes(spec), position_of(0, spec)
    seen = ProgramInterpreter(parts.head, seeds, position, sizes).main(leave=_as_it_is).layouts
    layouts = dict(zip((PROBE, "", *parts.passed), seen, strict=True))

    def local(program: Program, leave: Leave) -> Program:
        given = {n.name: layouts[n.name] for n, i in zip(
            program.main.graph.find_nodes(op="placeholder"), program.inputs, strict=True) if i.kind == "received"}
        return localize(program, seeds, rank, given=given, leave=leave, groups=groups)

    count = len(parts.leaving)
    plain = ProgramInterpreter(parts.blocks, seeds, position, sizes).main(
        {n: lay for n, lay in layouts.items() if n}, _as_it_is).layouts
    for name, stream, layout in zip(parts.leaving, parts.streams, plain, strict=False):
        layouts[name] = layouts[stream] if stream else layout
    ends = [layouts[n] for n in parts.leaving]
    ends += [layouts[n] for n, s in zip(parts.leaving, parts.streams, strict=True) if s]
    assert len(ends) == len(plain) and count <= len(ends)

    def leave_head(s: FunctionInterpreter, index: int, value: Value) -> Value:
        return _agreed(s, value, layouts[PROBE]) if index == 1 else _as_it_is(s, index, value)

    def leave_blocks(s: FunctionInterpreter, index: int, value: Value) -> Value:
        return s.like(s.summed(value), ends[index].dims, range(value.ndim))

    return replace(parts, head=local(parts.head, leave_head), blocks=local(parts.blocks, leave_blocks),
                   rest=local(parts.rest, lambda s, i, value: s.whole(value)))


def _as_it_is(s: FunctionInterpreter, index: int, value: Value) -> Value:
    return s.summed(value)


def _agreed(s: FunctionInterpreter, value: Value, probe: Layout) -> Value:
    """Sums on which all ranks agree to the last bit, also where they have computed the same things each for itself. Of
    two sums the quotient is wanted: copies may be added up as well as shares."""
    value = s.whole(value)
    shared = {a for d in probe.dims if all(seg.axis for seg in d.segments) for a in d.axes}
    for axis in (BATCH, SEQUENCE, TENSOR):
        if s.sizes[axis] > 1 and axis not in shared:
            value = s.summed(Value(value.node, Layout(value.dims, axis), value.dtype))
    return value
