"""The one place that adds nodes to a graph: it computes what each node returns and says where it came from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from xdit_compile.ir.carried_types import CARRIED
from xdit_compile.ir.layout import LATE, PATCH, Dim, Layout, Position, Spans, length
from xdit_compile.ir.mesh import group_name
from xdit_compile.ir.program import output_args
from xdit_compile.passes.sharded_value import Value

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

TRUSTING = frozenset({aten._int_mm.default})
"""Operators that believe the stride of a dimension of size one, which may be anything, also of what is contiguous, and
read other memory then (torch 2.13, on the CPU)."""


class Emitter:
    """Builds one local graph. Every node gets ``meta``: its fake value, the module path and source of the global
    node it stands for, and, where it is a whole value of the global program, its layout."""

    def __init__(self, mode: FakeTensorMode, position: Position, sizes: dict[str, int]) -> None:
        self.graph = fx.Graph()
        self.mode, self.position, self.sizes = mode, position, sizes
        self._origin: fx.Node | None = None
        self._last_input: fx.Node | None = None
        self.caches: list[fx.Node] = []
        self.sent: list[fx.Node] = []
        """Collectives of which a later step reads the result."""
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        """Of what a collective gives, the type of what was given to it."""

    @contextmanager
    def standing_for(self, node: fx.Node) -> Iterator[None]:
        """Within: nodes are made on behalf of ``node`` of the global graph."""
        self._origin = node
        try:
            yield
        finally:
            self._origin = None

    def placeholder(self, name: str, example: torch.Tensor, shape: Sequence[int]) -> fx.Node:
        """An input like ``example``, of which this rank holds ``shape``."""
        node = self._last_input = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty_strided(
                shape, example.stride(), dtype=example.dtype, device=example.device
            ) if tuple(shape) == tuple(example.shape) else torch.empty(
                shape, dtype=example.dtype, device=example.device)
        return node

    def cache(self, shape: Sequence[int], dtype: torch.dtype, like: Any) -> fx.Node:
        """A further input, after all others: memory on the device of ``like``."""
        assert self._last_input is not None
        device = next(t.device for t in pytree.tree_leaves(like) if isinstance(t, torch.Tensor))
        with self.graph.inserting_after(self._last_input):
            node = self._last_input = self.graph.placeholder(f"cache_{len(self.caches)}")
        with self.mode:
            node.meta["val"] = torch.empty(list(shape), dtype=dtype, device=device)
        self.caches.append(node)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node; PyTorch's own fake kernels check that the local shapes fit together."""
        if target in (aten.view_as_complex.default, aten.view.dtype):
            # Bytes must lie together in memory, and exchanges leave other strides than the model saw. What is empty is
            # contiguous whatever its strides.
            how = (aten.contiguous.default, {}) if args[0].meta["val"].numel() else (
                aten.clone.default, {"memory_format": torch.contiguous_format})
            args = (self.call(how[0], args[0], **how[1]), *args[1:])
        if target in TRUSTING:
            args = tuple(self.call(aten.clone.default, a, memory_format=torch.contiguous_format)
                         if isinstance(a, fx.Node) and 1 in a.meta["val"].shape else a for a in args)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            val = target(*given[0], **given[1])
        if _computes_nothing(target, val):
            args, kwargs = (list(val.shape),), {"dtype": val.dtype, "device": val.device}
            target = aten.zeros.default
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = val
        return self._describe(node)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def inline(self, function: Callable[..., Any], *nodes: fx.Node) -> tuple[fx.Node, ...]:
        """The operators of ``function`` on these nodes; returns its results."""
        with self.mode, torch.no_grad():
            traced = make_fx(function)(*(n.meta["val"] for n in nodes)).graph
        env: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
        for node in traced.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = self.call(node.target, *args, **kwargs)
        return tuple(env[n] for n in output_args(traced))

    def call_function_module(self, name: str, args: Sequence[fx.Node], results: Sequence[Any]) -> fx.Node:
        node = self.graph.call_module(name, tuple(args))
        node.meta["val"] = tuple(results)
        return self._describe(node)

    def _describe(self, node: fx.Node) -> fx.Node:
        if self._origin is not None:
            node.meta |= {k: self._origin.meta[k] for k in ("nn_module_stack", "stack_trace")
                          if k in self._origin.meta}
            # A node lowered from a local one still stands for the global node behind that.
            node.meta["origin"] = self._origin.meta.get("origin", self._origin.name)
        return node

    # Local pieces

    def narrow(self, x: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        whole = start == 0 and stop == x.meta["val"].shape[dim]
        return x if whole else self.call(aten.slice.Tensor, x, dim, start, stop)

    def cat(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        kept = [p for p in parts if p.meta["val"].shape[dim]] or list(parts[:1])
        return kept[0] if len(kept) == 1 else self.call(aten.cat.default, list(kept), dim)

    def take(self, x: fx.Node, dim: int, spans: Sequence[tuple[int, int]]) -> fx.Node:
        """The given index ranges of ``x``, one after the other."""
        if not spans:
            return self.call(aten.slice.Tensor, x, dim, 0, 0)
        (a, b), rows, shape = spans[0], len(spans), list(x.meta["val"].shape)
        period = shape[dim] // rows
        if rows > 1 and shape[dim] % rows == 0 and b <= period and all(
                span == (a + i * period, b + i * period) for i, span in enumerate(spans)):
            # The same columns of each row of a grid: one slice instead of one for each row.
            x = self.call(aten.reshape.default, x, [*shape[:dim], rows, period, *shape[dim + 1 :]])
            x = self.narrow(x, dim + 1, a, b)
            return self.call(aten.reshape.default, x, [*shape[:dim], rows * (b - a), *shape[dim + 1 :]])
        return self.cat([self.narrow(x, dim, a, b) for a, b in spans], dim)

    # Collectives

    def all_to_all(self, x: fx.Node, receive: Sequence[int], send: Sequence[int], axis: str) -> fx.Node:
        """Dim 0 of ``x``: ``send[j]`` rows to rank j, ``receive[i]`` rows from rank i (as they come from i)."""
        return self.wait(self.start_all_to_all(x, receive, send, axis))

    def start_all_to_all(self, x: fx.Node, receive: Sequence[int], send: Sequence[int], axis: str) -> fx.Node:
        return self._start(c10d.all_to_all_single.default, x, list(receive), list(send), axis)

    def _start(self, collective: Callable[..., Any], x: fx.Node, *args: Any) -> fx.Node:
        """``collective`` along an axis, the last of ``args``; of what backends do not carry, on its bytes."""
        dtype, sent = x.meta["val"].dtype, self.call(aten.contiguous.default, x)
        if dtype not in CARRIED:
            sent = self.call(aten.view.dtype, self.call(aten.unsqueeze.default, sent, -1), torch.uint8)
        start = self.call(collective, sent, *args[:-1], group_name(args[-1], self.sizes))
        self.dtypes[start] = dtype
        return start

    def wait(self, x: fx.Node) -> fx.Node:
        dtype, got = self.dtypes.get(x), self.call(c10d.wait_tensor.default, x)
        if dtype is None or dtype in CARRIED:
            return got
        return self.call(aten.squeeze.dims, self.call(aten.view.dtype, got, dtype), [-1])

    def all_gather(self, x: fx.Node, axis: str, late: bool = False) -> fx.Node:
        """Every rank's ``x`` (equal shapes) along dim 0; if ``late``, others' of a step before (`arrived`)."""
        start = self._start(c10d.all_gather_into_tensor.default, x, self.sizes[axis], axis)
        return self.arrived(start) if late else self.wait(start)

    def arrived(self, start: fx.Node) -> fx.Node:
        """What a collective gives that has the whole step for its way: in a step that is exact its result, in others
        that of the same collective in the step before. Its own is left for the next step."""
        self.sent.append(start)
        if not self.position.get(LATE):
            return self.wait(start)
        val = start.meta["val"]
        before = self.cache(val.shape, val.dtype, val)
        self.dtypes[before] = self.dtypes[start]
        return self.wait(before)

    def all_reduce(self, x: fx.Node, axis: str) -> fx.Node:
        return self.wait(self.call(c10d.all_reduce.default, x, "sum", group_name(axis, self.sizes)))

    # Changes of layout

    def gather(self, v: Value, dim: int, late: bool = False) -> fx.Node:
        """All of dimension ``dim`` on every rank; if ``late``, others' shares as `arrived` has them. Shares are padded
        to the largest, because gloo's all-gather wants equal sizes; the padding is cut off again before anything sees
        it."""
        assert v.node is not None
        old, shape = v.dims[dim], list(v.node.meta["val"].shape)
        (axis,) = old.axes - {PATCH}
        owned = [old.spans(p, sharded=True) for p in self.along(axis)]
        if not any(owned):
            return v.node  # what they share is of another patch
        if (rows := len(old.segments)) > 1 and len(set(old.segments)) == 1:
            # Rows of a grid, cut alike: their columns are gathered as a dimension of their own.
            held = [*shape[:dim], rows, shape[dim] // rows, *shape[dim + 1 :]]
            grid = self.call(aten.reshape.default, v.node, held)
            split = (Dim.replicated(rows), Dim.of(old.segments[:1]))
            full = self.gather(Value(grid, Layout((*v.dims[:dim], *split, *v.dims[dim + 1 :])), v.dtype), dim + 1, late)
            return self.call(aten.reshape.default, full, [*shape[:dim], old.size, *shape[dim + 1 :]])
        most = max(map(length, owned))
        x = self.take(v.node, dim, old.local_spans(self.position, sharded=True))
        x = self.call(aten.transpose.int, x, 0, dim) if dim else x
        if x.meta["val"].shape[0] < most:
            pad = [0] * (2 * x.meta["val"].ndim)
            pad[-1] = most - x.meta["val"].shape[0]  # pads are listed from the last dimension to the first
            x = self.call(aten.constant_pad_nd.default, x, pad)
        full = self.all_gather(x, axis, late)
        full = self.call(aten.transpose.int, full, 0, dim) if dim else full
        if late and self.position.get(LATE):
            # This rank's own share is of this step.
            own = self.position[axis] * most
            x = self.call(aten.transpose.int, x, 0, dim) if dim else x
            full = self.cat([self.narrow(full, dim, 0, own), x,
                             self.narrow(full, dim, own + most, full.meta["val"].shape[dim])], dim)
        if len(old.segments) == 1 and len(set(map(length, owned))) == 1:
            return full
        # Global order: each span from the rank that owns it, replicated ones from here.
        parts: list[tuple[int, fx.Node]] = []
        for i, spans in enumerate(owned):
            at = i * most
            for start, stop in spans:
                parts.append((start, self.narrow(full, dim, at, at + stop - start)))
                at += stop - start
        for p in old.pieces(self.position):
            if not p.sharded:
                parts.append((p.start, self.narrow(v.node, dim, p.at, p.at + p.stop - p.start)))
        return self.cat([part for _, part in sorted(parts, key=lambda item: item[0])], dim)

    def windows(self, v: Value, dim: int, wanted: Sequence[Spans], late: bool = False) -> fx.Node:
        """Index ranges ``wanted[i]`` of dimension ``dim`` on rank i, whoever holds them now; ranges of different
        ranks may overlap (halos). One all-to-all in which only what is missing travels; if ``late``, it is used as
        `arrived` has it."""
        assert v.node is not None
        old = v.dims[dim]
        (axis,) = old.axes
        me, ranks = self.position[axis], self.along(axis)
        x = self.call(aten.transpose.int, v.node, 0, dim) if dim else v.node
        plan = [_sources(old, spans, i, ranks) for i, spans in enumerate(wanted)]

        def mine(start: int, stop: int) -> fx.Node:
            at = next(p.at + start - p.start for p in old.pieces(self.position) if p.start <= start < p.stop)
            return self.narrow(x, 0, at, at + stop - start)

        leaving, coming = ([[(a, b) for source, a, b in plan[to] if source == of and of != to] for of, to in pairs]
                           for pairs in ([(me, i) for i in range(len(ranks))], [(i, me) for i in range(len(ranks))]))
        parts = [mine(a, b) for spans in leaving for a, b in spans] or [self.narrow(x, 0, 0, 0)]
        receive, send = [length(spans) for spans in coming], [length(spans) for spans in leaving]
        start = self.start_all_to_all(self.cat(parts, 0), receive, send, axis)
        received = self.arrived(start) if late else self.wait(start)
        at = [sum(receive[:i]) for i in range(len(ranks))]
        result = []
        for source, a, b in plan[me]:
            if source == me:
                part = mine(a, b)
            else:
                part = self.narrow(received, 0, at[source], at[source] + b - a)
                at[source] += b - a
            # Turned back one by one: joined, they lie in memory as the tensor they are a part of.
            result.append(self.call(aten.transpose.int, part, 0, dim) if dim else part)
        return self.cat(result, dim) if result else self.narrow(v.node, dim, 0, 0)

    def along(self, axis: str) -> list[Position]:
        """Where the ranks of ``axis`` stand, in order."""
        return [{**self.position, axis: i} for i in range(self.sizes[axis])]


def _sources(dim: Dim, wanted: Spans, me: int, ranks: Sequence[Position]) -> list[tuple[int, int, int]]:
    """``wanted`` cut into (owner, start, stop), in order; what rank ``me`` has it takes from itself."""
    held = [(rank, p) for rank, position in enumerate(ranks) for p in dim.pieces(position)
            if p.sharded or rank == me]
    plan = []
    for start, stop in wanted:
        found = [(rank, max(p.start, start), min(p.stop, stop)) for rank, p in held]
        plan += sorted((f for f in found if f[1] < f[2]), key=lambda f: f[1])
    return plan


def _computes_nothing(target: Any, val: Any) -> bool:
    """Whether it is attention without heads, by which one of PyTorch's kernels divides."""
    return target is aten.scaled_dot_product_attention.default and not val.numel()
