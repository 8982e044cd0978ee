"""Sharding is interpretation: walk the global graph once; the rule of each operator says what a rank computes.

Like JAX's batching rules (``jax/_src/interpreters/batching.py``): a rule takes arguments with layouts, emits the
local operator and returns the result's layout, so propagation and rewriting cannot disagree. An operator none of
whose arguments is sharded is copied. One without a rule, or whose rule gives up, gets its arguments gathered, is
computed whole, and is noted by name. Without an emitter the same walk only counts what it would cost.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.flops import flops
from xdit_compile.ir.layout import BATCH, PATCH, SEQUENCE, TENSOR, Dim, Layout, Position, length
from xdit_compile.ir.program import Note, Program, graph_module, module_of, source_of
from xdit_compile.ir.stale_cache import update_and_read
from xdit_compile.passes.attention_plan import AttentionPlan
from xdit_compile.passes.cost import Cost, CostMemo, LaidOut, Relay, Result, Step, Turned
from xdit_compile.passes.emitter import Emitter
from xdit_compile.passes.rules import find_rule
from xdit_compile.passes.sharded_value import NoRule, Value

Leave = Callable[["FunctionInterpreter", int, Value], Value]
Seeds = Mapping[str, Layout]
"""Where to begin: how values of ``main``, by the names of their nodes, are laid out. Parameters come so."""
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

TURNS: Mapping[Any, Callable[..., list[int]]] = MappingProxyType({
    torch.ops.aten.t.default: lambda dims: dims[::-1],
    torch.ops.aten.transpose.int: lambda dims, a, b: [dims[b] if i == a % len(dims) else dims[
        a] if i == b % len(dims) else i for i in dims],
    torch.ops.aten.permute.default: lambda dims, order: [dims[i] for i in order],
    torch.ops.aten._to_copy.default: lambda dims: dims,
})
"""Operators that turn a weight before it is used, and where each dimension of the result was before."""


class FunctionInterpreter:
    """Interprets one function of the program for one rank. Rules call its public methods."""

    def __init__(self, interpreter: ProgramInterpreter, emitter: Emitter | None, function: str) -> None:
        self.interpreter, self.emitter, self.function = interpreter, emitter, function
        self.spec, self.position, self.sizes = interpreter.spec, interpreter.position, interpreter.sizes
        self.cost = Cost()
        self.node: fx.Node
        # Who only counts finds again what another walk has made; who emits makes all anew.
        self._known = interpreter.memo.relaid if emitter is None else {}
        self._relaid: set[Relay] = set()
        self._step = Step()
        self._inputs: dict[int, Turned] = {}
        self._keep: list[Result] = []
        self.wanted: dict[int, set[Layout | None]] = defaultdict(set)
        """Of each input that is whole, by its number: as what it was laid out over tensor ranks; None: as it was."""

    # For rules

    def emit(self, layout: Layout, /, *args: Any, target: Any = None, **kwargs: Any) -> Value:
        """The operator (the current one unless ``target``) on local pieces; the result is laid out as said."""
        target = target or self.node.target
        self._used(args, kwargs)
        made = self.local(target, *args, **kwargs)
        if made is not None:
            made.meta["layout"] = layout
        example = (made or self.node).meta["val"]
        value = Value(made, layout, (example if isinstance(example, torch.Tensor) else example[0]).dtype)
        self._count(target, args, value)
        return value

    def emit_many(self, layouts: Sequence[Layout], /, *args: Any, target: Any = None,
                  **kwargs: Any) -> tuple[Value, ...]:
        """As ``emit``, for an operator that returns several tensors."""
        self._used(args, kwargs)
        made = self.local(target or self.node.target, *args, **kwargs)
        values = []
        for i, (layout, example) in enumerate(zip(layouts, self.node.meta["val"], strict=True)):
            piece = self.local(operator.getitem, made, i)
            if piece is not None:
                piece.meta["layout"] = layout
            values.append(Value(piece, layout, example.dtype))
            self._count(None, (), values[-1])
        return tuple(values)

    def local(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node | None:
        """A node that is no whole value of the global program (a slice of a piece, a raw collective)."""
        if self.emitter is None:
            return None
        args, kwargs = _map_values(lambda v: v.node, (args, kwargs))
        return self.emitter.call(target, *args, **kwargs)

    def lay(self, value: Value, dim: int, new: Dim) -> Value:
        """``value`` with dimension ``dim`` laid out as ``new``: sliced for free, gathered, or exchanged."""
        dim %= value.ndim
        for other, held in enumerate(value.dims):
            # One axis cuts one dimension: two cut by it would leave pieces that no rank holds.
            if other != dim and held.axes & new.axes:
                value = self.lay(value, other, Dim.replicated(held.size))
        old, layout = value.dims[dim], value.layout.replace(dim, new)
        if old == new:
            return value
        self._wanted(value, layout)
        if (known := self._laid_before(value, layout)) is None:
            if not old.sharded or old in (new.gathered(SEQUENCE), new.gathered(TENSOR)):
                node = None if self.emitter is None else self.emitter.take(
                    self._node(value), dim, old.places(new.spans(self.position), self.position))
            elif len(ranks := old.axes - {PATCH}) == 1 and old.gathered(*ranks) == new:
                node = self._gather(value, dim)
            elif PATCH in old.axes | new.axes and BATCH not in old.axes:
                if len(ranks) > 1:
                    return self.lay(self._apart(value, dim), dim, new)
                if ranks:
                    return self.lay(self.lay(value, dim, old.gathered(*ranks)), dim, new)
                if new.sharded:
                    return self.lay(self.lay(value, dim, Dim.replicated(old.size)), dim, new)
                node = self._stale(value, dim)
            elif old.axes == new.axes and all(old.spans(p) == new.spans(p) for p in self.positions(new)):
                return Value(value.node, layout, value.dtype)  # every rank has it already, in other segments
            elif old.axes == new.axes and len(old.axes) == 1:
                spans = [new.spans(p) for p in self.positions(new)]
                node = self.windows(value, dim, spans, f"re-laid from {old} to {new}")
            elif len(old.axes) > 1:
                return self.lay(self._apart(value, dim), dim, new)
            else:
                return self.lay(self.lay(value, dim, Dim.replicated(old.size)), dim, new)
            known = self._laid(value, layout, node)
        return known

    def _laid_before(self, value: Value, layout: Layout) -> Value | None:
        key = (id(value), layout)
        found = key in self._relaid
        if self.emitter is None:
            self._step.asked.setdefault(key, found)
        return self._known[key][1] if found else None

    def _laid(self, value: Value, layout: Layout, node: fx.Node | None) -> Value:
        """``value`` as ``node`` lays it out."""
        key = (id(value), layout)
        if node is not None:
            node.meta["layout"] = layout
        self._relaid.add(key)
        self._step.relaid.append(key)
        return self._known.setdefault(key, (value, Value(node, layout, value.dtype)))[1]

    def _apart(self, value: Value, dim: int) -> Value:
        """``value`` with all of ``dim``, of which segments are shared out along different axes."""
        parts, at = [], 0
        for segment in value.dims[dim].segments:
            held, size = Dim.of([segment]), Dim.of([segment]).local_size(self.position)
            node = None if self.emitter is None else self.emitter.narrow(self._node(value), dim, at, at + size)
            part = Value(node, value.layout.replace(dim, held), value.dtype)
            parts.append(self.lay(part, dim, Dim.replicated(held.size)))
            at += size
        node = None if self.emitter is None else self.emitter.cat([self._node(p) for p in parts], dim)
        return Value(node, value.layout.replace(dim, Dim.replicated(value.shape[dim])), value.dtype)

    def _stale(self, value: Value, dim: int) -> fx.Node | None:
        """All patches of dimension ``dim``: those that have not come in this step as they were in the one before."""
        shape = list(value.local_shape(self.position))
        shape[dim] = value.shape[dim]
        self.note("stale", f"dimension {dim} of {value.layout} is read with other patches as they were a step before",
                  math.prod(shape) * value.dtype.itemsize)
        cache = self.cache(shape, value.dtype)
        return cache and self.emitter.call(update_and_read, cache, value.node, dim,
                                            value.dims[dim].spans(self.position))

    def cache(self, shape: Sequence[int], dtype: torch.dtype) -> fx.Node | None:
        """Memory that outlives the call, a further input of the function."""
        self.cost.stale_bytes += math.prod(shape) * dtype.itemsize
        return None if self.emitter is None else self.emitter.cache(shape, dtype, self.node.meta["val"])

    def positions(self, dim: Dim) -> list[Position]:
        """All that hold pieces of ``dim``, seen from here."""
        axes = sorted(dim.axes)
        return [{**self.position, **dict(zip(axes, at, strict=True))}
                for at in itertools.product(*(range(self.sizes[a]) for a in axes))]

    def whole(self, value: Value, *dims: int) -> Value:
        """``value`` with these dimensions (all if none is named) on every rank, and no sum pending."""
        value = self.summed(value)
        for dim in dims or range(value.ndim):
            value = self.lay(value, dim, Dim.replicated(value.shape[dim]))
        return value

    def filled(self, value: Value, dims: Iterable[int], least: int = 1) -> Value:
        """``value`` with those of ``dims`` whole of which some rank, or some time, holds less than ``least``."""
        for i in dims:
            d = value.dims[i]
            if PATCH in d.axes or any(d.local_size(p) < least for p in self.positions(d)):
                value = self.whole(value, i)
        return value

    def summed(self, value: Value) -> Value:
        """``value`` with a pending sum over ranks carried out."""
        axis = value.layout.partial
        if axis is None:
            return value
        layout = Layout(value.dims)
        if (known := self._laid_before(value, layout)) is None:
            size = value.local_bytes(self.position)
            self._traffic("all_reduce", axis, 2 * size * (self.sizes[axis] - 1) // self.sizes[axis],
                          "sum of partial results")
            known = self._laid(value, layout, None if self.emitter is None else self.emitter.all_reduce(
                self._node(value), axis))
        return known

    def one_of_each(self, value: Value) -> Value:
        """``value`` as it goes into and out of blocks: no sum pending, and, so that one block is as the other, no
        features shared among tensor ranks. But weights are, and what a part of a block computes for another part."""
        value = self.summed(value)
        if self.sizes[TENSOR] > 1 and "parted" not in self.interpreter.program.facts and id(value) not in self._inputs:
            for i, dim in enumerate(value.dims):
                if TENSOR in dim.axes:
                    value = self.lay(value, i, dim.gathered(TENSOR))
        return value

    @property
    def displaced(self) -> bool:
        """Whether ranks may have of others what these had a step before, while what they have now travels."""
        return self.spec.displaced == "yes"

    def displaced_whole(self, value: Value, dim: int) -> Value:
        """``value`` with dimension ``dim`` on every rank: this rank's share as it is, others' as they were a step
        before, but in exact steps."""
        dim %= value.ndim
        value = self.summed(value)
        if value.dims[dim].axes != {SEQUENCE}:
            return self.whole(value, dim)
        self.note("stale", f"dimension {dim} of {value.layout} is read with other ranks' shares as they were a step "
                  "before", value.local_bytes(self.position))
        layout = value.layout.replace(dim, Dim.replicated(value.shape[dim]))
        node = self._gather(value, dim, late=True)
        if node is not None:
            node.meta["layout"] = layout
        return Value(node, layout, value.dtype)

    def windows(self, value: Value, dim: int, spans: Sequence[Sequence[tuple[int, int]]], why: str,
                late: bool = False) -> fx.Node | None:
        """Ranges ``spans[i]`` of ``dim`` on rank i of its axis, each fetched from whoever holds it; if ``late``, as
        they were there a step before."""
        old = value.dims[dim]
        (axis,) = old.axes
        me = self.position[axis]
        mine = old.spans(self.position)
        missing = sum(max(min(b, d) - max(a, c), 0) for i, wanted in enumerate(spans) if i != me
                      for a, b in mine for c, d in wanted)
        row = value.local_bytes(self.position) // max(old.local_size(self.position), 1)
        self._traffic("all_to_all", axis, missing * row, why, late)
        return None if self.emitter is None else self.emitter.windows(value, dim, spans, late)

    def broadcast(self, *values: Value) -> tuple[list[Value], tuple[Dim, ...]]:
        """Lay out operands of an element-wise operator alike; returns them and the result's dimensions.

        The largest operand that is sharded decides each dimension; others are sliced (free) or exchanged. But features
        that tensor ranks share are gathered where they meet a larger tensor that all have: a modulation, say, and the
        tokens that it scales, of which each rank needs all features next.
        """
        shape = torch.broadcast_shapes(*(v.shape for v in values))
        values = tuple(self.summed(v) for v in values)
        dims: list[Dim] = []
        for i, size in enumerate(shape):
            held = [(v, v.dims[i - len(shape)]) for v in values if len(shape) - i <= v.ndim]
            sharded = [(math.prod(v.shape), d) for v, d in held if d.sharded and d.size == size]
            most = max((math.prod(v.shape) for v, d in held if d.size == size), default=0)
            sharded = [(n, d) for n, d in sharded if n == most or TENSOR not in d.axes]
            taken = {a for d in dims for a in d.axes}
            choice = max(sharded, key=lambda item: item[0])[1] if sharded else Dim.replicated(size)
            dims.append(Dim.replicated(size) if choice.axes & taken else choice)
        laid = []
        for value in values:
            for i in range(value.ndim):
                at = i - value.ndim
                if value.shape[at] != 1 or shape[at] == 1:
                    value = self.lay(value, at, dims[at])
            laid.append(value)
        return laid, tuple(dims)

    def like(self, value: Value, dims: Sequence[Dim], at: Sequence[int]) -> Value:
        """``value`` with its dimensions ``at`` laid out as ``dims``."""
        for i, dim in zip(at, dims, strict=True):
            value = self.lay(value, i, dim)
        return value

    def attend(self, plan: AttentionPlan) -> None:
        """Count a distributed attention and say how it is done."""
        self.cost.attentions += 1
        self.cost.flops += plan.flops(self.position)
        self.cost.attention_flops += plan.flops(self.position)
        self.cost.sent += plan.sent(self.position)
        self.cost.traffic.update(plan.traffic(self.position))
        self.note("attention", str(plan), plan.sent(self.position))

    def note(self, kind: Any, text: str, size: int = 0) -> None:
        """Say what was decided here; the text must be the same on every rank."""
        if self.emitter is not None:
            self.cost.notes.append(Note(kind, self.node.name, text, module_of(self.node), source_of(self.node),
                                         self.function, size))

    # The walk

    def run(self, graph: fx.Graph, arguments: Sequence[Value], seeds: Seeds) -> list[Value]:
        """Interpret ``graph``; returns its outputs."""
        env: dict[fx.Node, Result] = {}
        given = iter(arguments)
        outputs: list[Value] = []
        self._inputs = {id(v): (i, tuple(range(v.ndim))) for i, v in enumerate(arguments)}
        for node in graph.nodes:
            self.node = node
            if node.op == "output":
                outputs = [env[n] for n in node.args[0]]  # type: ignore[misc]
                continue
            if node.op == "placeholder":
                env[node] = next(given)
            else:
                env[node] = self._remembered(node, env)
            if node.name in seeds:
                value = env[node]
                assert isinstance(value, Value)
                env[node] = self._standing(node, lambda v=value, n=node.name: self._seed(v, seeds[n]))
        if self.function == "main":
            self.cost.cut = {n.name for n, v in env.items() if isinstance(v, Value) and v.sharded and any(
                d.axes - {BATCH} and all(seg.cut for seg in d.segments) for d in v.dims)}
        return outputs

    def _seed(self, value: Value, layout: Layout) -> Value:
        if value.layout != layout:
            self.note("seed", f"{list(value.shape)} is laid out as {layout}")
        value = self.summed(value)
        for dim in range(value.ndim):
            # Where tokens begin to be cut says nothing of the batch.
            if layout.dims[dim].sharded or value.dims[dim].axes != {BATCH}:
                value = self.lay(value, dim, layout.dims[dim])
        return value

    def _remembered(self, node: fx.Node, env: Mapping[fx.Node, Result]) -> Result:
        """As ``_interpret``, once for all walks that only count and come here with the same values."""
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if not self.interpreter.walks_again:
            return self._interpret(node, env)
        given = tuple(env[n] for n in node.all_input_nodes)
        key = (node, *map(id, given))
        known, _ = self.interpreter.memo.steps.get(key, ((), ()))
        for step in known:
            if all((relay in self._relaid) is found for relay, found in step.asked.items()):
                break
        else:
            before, self.cost = self.cost, Cost()
            step = self._step = Step(cost=self.cost)
            step.result = self._interpret(node, env)
            self.cost, self._step = before, Step()
            # What it was given is kept too: no other value gets its identity.
            self.interpreter.memo.steps[key] = [*known, step], given
        self.cost.add(step.cost)
        self._relaid.update(step.relaid)
        self._inputs.update(step.turned)
        for index, layout in step.wanted:
            self.wanted[index].add(layout)
        return step.result

    def _interpret(self, node: fx.Node, env: Mapping[fx.Node, Result]) -> Result:
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        if node.op == "call_module":
            return self._standing(node, lambda: self._call(node, args))
        values = [a for a in _leaves((args, kwargs)) if isinstance(a, Value)]
        if not any(v.sharded for v in values):
            self._used(args, kwargs)
            result = self._counted(node, args, kwargs) if self.emitter is None else self._standing(
                node, lambda: self._whole(args, kwargs))
        else:
            result = self._standing(node, lambda: self._apply(node, args, kwargs))
        if node.target in TURNS and isinstance(result, Value) and (known := self._inputs.get(id(args[0]))):
            turned = TURNS[node.target](list(range(result.ndim)), *args[1:])
            self._inputs[id(result)] = self._step.turned[id(result)] = known[0], tuple(known[1][i] for i in turned)
            self._keep.append(result)
        return result

    def _used(self, *trees: Any) -> None:
        """Remember inputs among these as used whole."""
        if self.sizes[TENSOR] > 1 and self.node.target not in TURNS:
            for known in (self._inputs.get(id(leaf)) for leaf in _leaves(trees)):
                if known:
                    self._want(known[0], None)

    def _want(self, index: int, layout: Layout | None) -> None:
        self.wanted[index].add(layout)
        self._step.wanted.append((index, layout))

    def _wanted(self, value: Value, layout: Layout) -> None:
        """Remember that ``value``, if it is an input, is laid out like this."""
        if self.sizes[TENSOR] > 1 and (known := self._inputs.get(id(value))):
            index, order = known
            axes = {axis for d in layout.dims for axis in d.axes}
            dims = tuple(layout.dims[order.index(i)] for i in range(len(order)))
            self._want(index, Layout(dims) if axes == {TENSOR} and not value.sharded else None)

    def _standing(self, node: fx.Node, body: Callable[[], Result]) -> Result:
        if self.emitter is None:
            return body()
        with self.emitter.standing_for(node):
            return body()

    def _apply(self, node: fx.Node, args: Any, kwargs: Any) -> Result:
        rule = find_rule(node.target)
        reason = "no rule for this operator"
        args, kwargs = _map_values(self.summed, (args, kwargs))
        if not any(a.sharded for a in _leaves((args, kwargs)) if isinstance(a, Value)):
            return self._whole(args, kwargs)  # there were but sums pending
        if rule is not None:
            try:
                return rule(self, *args, **kwargs)
            except NoRule as refusal:
                reason = str(refusal)
        self.note("fallback", f"{node.target} computed whole: {reason}")
        return self._whole(*_map_values(self.whole, (args, kwargs)))

    def _whole(self, args: Any, kwargs: Any) -> Result:
        """The current operator on whole arguments."""
        meta = self.node.meta["val"]
        if isinstance(meta, torch.Tensor):
            return self.emit(Layout.replicated(meta.shape), *args, **kwargs)
        if isinstance(meta, (tuple, list)):
            return self.emit_many([Layout.replicated(m.shape) for m in meta], *args, **kwargs)
        raise NoRule(f"{self.node.target} returns {type(meta).__name__}")

    def _counted(self, node: fx.Node, args: Any, kwargs: Any) -> Result:
        """As ``_whole``, once for all walks."""
        known = self.interpreter.memo.whole
        if node not in known:
            before, self.cost = self.cost, Cost()
            known[node] = self._whole(args, kwargs), self.cost
            self.cost = before
        result, cost = known[node]
        self.cost.add(cost)
        return result

    def _call(self, node: fx.Node, args: Sequence[Value]) -> tuple[Value, ...]:
        args = [self.one_of_each(a) for a in args]
        name, layouts, cost, wanted = self.interpreter.function(str(node.target), tuple(a.layout for a in args))
        self.cost.add(cost)
        for i, wants in wanted.items():
            if known := self._inputs.get(id(args[i])):
                for layout in wants:
                    self._want(known[0], layout)
        dtypes = [m.dtype for m in node.meta["val"]]
        if self.emitter is None:
            return tuple(Value(None, lay, t) for lay, t in zip(layouts, dtypes, strict=True))
        results = self.interpreter.results[name]
        caches = [self.emitter.cache(c.shape, c.dtype, c) for c in self.interpreter.caches[name]]
        call = self.emitter.call_function_module(name, [*(self._node(a) for a in args), *caches], results)
        pieces = []
        for i, (layout, dtype) in enumerate(zip(layouts, dtypes, strict=True)):
            piece = self.emitter.call(operator.getitem, call, i)
            piece.meta["layout"] = layout
            pieces.append(Value(piece, layout, dtype))
        self.emitter.sent += [self.emitter.call(operator.getitem, call, i) for i in range(len(layouts), len(results))]
        return tuple(pieces)

    # Counting

    def _count(self, target: Any, args: Sequence[Any], out: Value) -> None:
        shape = out.local_shape(self.position)
        self.cost.moved += math.prod(shape) * out.dtype.itemsize
        shapes = [a.local_shape(self.position) if isinstance(a, Value) else a for a in args]
        done = flops(target, shapes, shape)
        self.cost.flops += done
        self.cost.attention_flops += done if target is ATTENTION else 0

    def _traffic(self, kind: str, axis: str, size: int, why: str, late: bool = False) -> None:
        # What travels while the whole step runs costs no time, as long as links keep up.
        self.cost.sent += 0 if late else size
        self.cost.traffic.update({("count", kind, axis): 1, ("bytes", kind, axis): size})
        self.note("collective", f"{kind}: {why}", size)

    def _gather(self, value: Value, dim: int, late: bool = False) -> fx.Node | None:
        old = value.dims[dim]
        (axis,) = old.axes - {PATCH}
        row = value.local_bytes(self.position) // max(old.local_size(self.position), 1)
        held = max(length(old.spans({**self.position, axis: i}, sharded=True)) for i in range(self.sizes[axis]))
        self.cost.gathers += self.function != "main" and not late
        self._traffic("all_gather", axis, held * row * (self.sizes[axis] - 1),
                      f"dimension {dim} of {value.layout} is needed whole", late)
        return None if self.emitter is None else self.emitter.gather(value, dim, late)

    @staticmethod
    def _node(value: Value) -> fx.Node:
        assert value.node is not None
        return value.node


@dataclass(frozen=True)
class Interpretation:
    """What a walk found: what it counted, how the results are left, and how inputs that are whole were laid out."""

    cost: Cost
    layouts: tuple[Layout, ...]
    wanted: LaidOut


class ProgramInterpreter:
    """One interpretation of a whole program: ``main`` and its block functions, each once per layout of inputs."""

    def __init__(self, program: Program, seeds: Seeds, position: Position, sizes: Mapping[str, int],
                 mode: Any = None, memo: CostMemo | None = None) -> None:
        assert program.spec is not None
        self.program, self.seeds, self.spec = program, seeds, program.spec
        self.position, self.sizes, self.mode = position, dict(sizes), mode
        self.notes: list[Note] = []
        self.functions: dict[str, fx.GraphModule] = {}
        self.results: dict[str, tuple[Any, ...]] = {}
        self.caches: dict[str, list[torch.Tensor]] = {}
        self.sent: dict[str, int] = {}
        """How many further results of each function are for the next step."""
        self.memo, self.walks_again = memo or CostMemo(), memo is not None
        self._graphs = dict(program.functions())

    def main(self, given: Mapping[str, Layout] = MappingProxyType({}), leave: Leave | None = None) -> Interpretation:
        """Interpret ``main``.

        Args:
            given: how its inputs are laid out, by name, where they are not whole on every rank.
            leave: what becomes of its n-th result; by default it is made whole on every rank.
        """
        graph = self._graphs["main"].graph
        given = {**parameter_layouts(self.program, self.seeds), **given}
        layouts = tuple(given.get(n.name) or Layout.replicated(n.meta["val"].shape)
                        for n in graph.find_nodes(op="placeholder"))
        self._leave = leave or (lambda s, i, value: s.whole(value))
        left, cost, wanted = self._interpret("main", "main", layouts, self.seeds)
        return Interpretation(cost, left, wanted)

    def function(self, name: str, layouts: tuple[Layout, ...]) -> tuple[str, tuple[Layout, ...], Cost, LaidOut]:
        """The local form of block function ``name`` for inputs laid out like this, made once."""
        key = (name, layouts)
        done = self.memo.functions
        if key not in done:
            count = sum(n == name for n, _ in done)
            local = f"{name}_as_{count}" if count else name
            done[key] = (local, *self._interpret(name, local, layouts, {}))
        return done[key]

    def _interpret(self, name: str, local: str, layouts: Sequence[Layout],
                   seeds: Seeds) -> tuple[tuple[Layout, ...], Cost, LaidOut]:
        graph = self._graphs[name].graph
        emitter = Emitter(self.mode, self.position, self.sizes) if self.mode is not None else None
        interpreter = FunctionInterpreter(self, emitter, local)
        arguments: list[Value] = []
        for node, layout in zip(graph.find_nodes(op="placeholder"), layouts, strict=True):
            example = node.meta["val"]
            holder = None
            if emitter:
                holder = emitter.placeholder(node.name, example, layout.local_shape(self.position))
                holder.meta["layout"] = layout
            value = Value(holder, layout, example.dtype)
            if emitter is None:
                value = self.memo.arguments.setdefault((name, len(arguments), layout), value)
            arguments.append(value)
        outputs = interpreter.run(graph, arguments, seeds)
        # The caller of main expects whole tensors, main takes what a block returns as it is laid out.
        interpreter.cost.results = tuple(v.layout for v in outputs)
        interpreter._used(outputs)
        outputs = [self._leave(interpreter, i, v) if local == "main" else interpreter.one_of_each(v)
                   for i, v in enumerate(outputs)]
        if emitter:
            self.notes += interpreter.cost.notes
            ends = (*(interpreter._node(v) for v in outputs), *emitter.sent)
            out = emitter.graph.output(ends)
            out.meta["val"] = tuple(n.meta["val"] for n in ends)
            self.sent[local] = len(emitter.sent)
            self.results[local] = out.meta["val"]
            self.caches[local] = [c.meta["val"] for c in emitter.caches]
            self.functions[local] = graph_module(
                local, emitter.graph, self.functions if local == "main" else None)
        return tuple(v.layout for v in outputs), interpreter.cost, interpreter.wanted


def parameter_layouts(program: Program, seeds: Seeds) -> dict[str, Layout]:
    """How parameters come, by the names of their inputs, where ranks share them out."""
    holders = program.main.graph.find_nodes(op="placeholder")
    return {n.name: seeds[n.name] for n, what in zip(holders, program.inputs, strict=False)
            if what.kind == "parameter" and n.name in seeds}


def _map_values(f: Callable[[Value], Any], tree: Any) -> Any:
    """``f`` of every value in nested lists, tuples and dicts; all else as it is."""
    if isinstance(tree, (list, tuple)):
        mapped = [_map_values(f, t) for t in tree]
        return mapped if isinstance(tree, list) else tuple(mapped)
    if isinstance(tree, dict):
        return {k: _map_values(f, v) for k, v in tree.items()}
    return f(tree) if isinstance(tree, Value) else tree


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (list, tuple)):
        return [x for t in tree for x in _leaves(t)]
    if isinstance(tree, dict):
        return [x for t in tree.values() for x in _leaves(t)]
    return [tree]
