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

from xdit_compile.layout import Dim, Position
from xdit_compile.mesh import group_name
from xdit_compile.passes.values import Value
from xdit_compile.program import output_args

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


class Emitter:
    """Builds one local graph. Every node gets ``meta``: its fake value, the module path and source of the global
    node it stands for, and, where it is a whole value of the global program, its layout."""

    def __init__(self, mode: FakeTensorMode, position: Position, sizes: dict[str, int]) -> None:
        self.graph = fx.Graph()
        self.mode, self.position, self.sizes = mode, position, sizes
        self._origin: fx.Node | None = None

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
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty_strided(
                shape, example.stride(), dtype=example.dtype, device=example.device
            ) if tuple(shape) == tuple(example.shape) else torch.empty(
                shape, dtype=example.dtype, device=example.device)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node; PyTorch's own fake kernels check that the local shapes fit together."""
        node = self.graph.call_function(target, args, kwargs)
        args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*args, **kwargs)
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
            node.meta["origin"] = self._origin.name
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
        return self.cat([self.narrow(x, dim, a, b) for a, b in spans], dim)

    # Collectives

    def all_to_all(self, x: fx.Node, receive: Sequence[int], send: Sequence[int], axis: str) -> fx.Node:
        """Dim 0 of ``x``: ``send[j]`` rows to rank j, ``receive[i]`` rows from rank i (as they come from i)."""
        return self.wait(self.start_all_to_all(x, receive, send, axis))

    def start_all_to_all(self, x: fx.Node, receive: Sequence[int], send: Sequence[int], axis: str) -> fx.Node:
        x = self.call(aten.contiguous.default, x)
        return self.call(c10d.all_to_all_single.default, x, list(receive), list(send), group_name(axis, self.sizes))

    def wait(self, x: fx.Node) -> fx.Node:
        return self.call(c10d.wait_tensor.default, x)

    def all_gather(self, x: fx.Node, axis: str) -> fx.Node:
        """Every rank's ``x`` (equal shapes) along dim 0."""
        x = self.call(aten.contiguous.default, x)
        return self.wait(self.call(c10d.all_gather_into_tensor.default, x, self.sizes[axis],
                                   group_name(axis, self.sizes)))

    def all_reduce(self, x: fx.Node, axis: str) -> fx.Node:
        return self.wait(self.call(c10d.all_reduce.default, x, "sum", group_name(axis, self.sizes)))

    # Changes of layout

    def gather(self, v: Value, dim: int) -> fx.Node:
        """All of dimension ``dim`` on every rank. Shares are padded to the largest, because gloo's all-gather wants
        equal sizes; the padding is cut off again before anything sees it."""
        assert v.node is not None
        old = v.dims[dim]
        (axis,) = old.axes
        ranks = [{**self.position, axis: i} for i in range(self.sizes[axis])]
        owned = [self._sharded_spans(old, p) for p in ranks]
        x = self.take(v.node, dim, self._local_sharded(old, self.position))
        sizes = [sum(b - a for a, b in spans) for spans in owned]
        most = max(sizes)
        x = self.call(aten.transpose.int, x, 0, dim) if dim else x
        if x.meta["val"].shape[0] < most:
            pad = [0] * (2 * x.meta["val"].ndim)
            pad[-1] = most - x.meta["val"].shape[0]  # pads are listed from the last dimension to the first
            x = self.call(aten.constant_pad_nd.default, x, pad)
        full = self.all_gather(x, axis)
        full = self.call(aten.transpose.int, full, 0, dim) if dim else full
        # Global order: each span from the rank that owns it, replicated ones from here.
        pieces: list[tuple[int, fx.Node]] = []
        for i, spans in enumerate(owned):
            at = i * most
            for a, b in spans:
                pieces.append((a, self.narrow(full, dim, at, at + b - a)))
                at += b - a
        here = 0
        for segment, base in _bases(old):
            start, stop = segment.bounds(self.position)
            if segment.axis is None:
                pieces.append((base, self.narrow(v.node, dim, here, here + stop - start)))
            here += stop - start
        ordered = [p for _, p in sorted(pieces, key=lambda item: item[0])]
        if len(set(sizes)) == 1 and len(old.segments) == 1:
            return full
        return self.cat(ordered, dim)

    def windows(self, v: Value, dim: int, wanted: Sequence[Sequence[tuple[int, int]]]) -> fx.Node:
        """Index ranges ``wanted[i]`` of dimension ``dim`` on rank i, whoever holds them now; ranges of different
        ranks may overlap (halos). One all-to-all in which only what is missing travels."""
        assert v.node is not None
        old = v.dims[dim]
        (axis,) = old.axes
        me, n = self.position[axis], self.sizes[axis]
        local = [_local_index(old, {**self.position, axis: i}) for i in range(n)]
        plan = [_sources(old, spans, i, axis, self.position, n) for i, spans in enumerate(wanted)]
        x = self.call(aten.transpose.int, v.node, 0, dim) if dim else v.node
        outgoing = [[(a, b) for src, a, b in plan[j] if src == me and j != me] for j in range(n)]
        incoming = [[(a, b) for src, a, b in plan[me] if src == i and i != me] for i in range(n)]
        parts = [self.narrow(x, 0, local[me](a), local[me](b - 1) + 1) for j in range(n) for a, b in outgoing[j]]
        payload = self.cat(parts, 0) if parts else self.narrow(x, 0, 0, 0)
        rows = [[sum(b - a for a, b in group) for group in table] for table in (incoming, outgoing)]
        received = self.all_to_all(payload, rows[0], rows[1], axis)
        at = [sum(rows[0][:i]) for i in range(n)]
        result = []
        for src, a, b in plan[me]:
            if src == me:
                result.append(self.narrow(x, 0, local[me](a), local[me](b - 1) + 1))
            else:
                result.append(self.narrow(received, 0, at[src], at[src] + b - a))
                at[src] += b - a
        out = self.cat(result, 0) if result else self.narrow(x, 0, 0, 0)
        return self.call(aten.transpose.int, out, 0, dim) if dim else out

    @staticmethod
    def _sharded_spans(dim: Dim, position: Position) -> list[tuple[int, int]]:
        """The global ranges of the sharded segments that ``position`` owns."""
        return [(base + a, base + b) for s, base in _bases(dim) if s.axis is not None
                for a, b in [s.bounds(position)] if b > a]

    @staticmethod
    def _local_sharded(dim: Dim, position: Position) -> list[tuple[int, int]]:
        """Where the sharded segments lie in the local tensor."""
        spans, at = [], 0
        for segment in dim.segments:
            a, b = segment.bounds(position)
            if segment.axis is not None and b > a:
                spans.append((at, at + b - a))
            at += b - a
        return spans


def _bases(dim: Dim) -> list[tuple[Any, int]]:
    pairs, base = [], 0
    for segment in dim.segments:
        pairs.append((segment, base))
        base += segment.length
    return pairs


def _local_index(dim: Dim, position: Position) -> Callable[[int], int]:
    """Global index to local index, for indices that ``position`` holds."""
    table, at = [], 0
    for segment, base in _bases(dim):
        a, b = segment.bounds(position)
        table.append((base + a, base + b, at))
        at += b - a

    def local(index: int) -> int:
        return next(at + index - a for a, b, at in table if a <= index < b)

    return local


def _sources(dim: Dim, wanted: Sequence[tuple[int, int]], me: int, axis: str, position: Position,
             n: int) -> list[tuple[int, int, int]]:
    """``wanted`` cut into (owner, start, stop), in order; what a rank has it takes from itself."""
    plan = []
    for start, stop in wanted:
        for segment, base in _bases(dim):
            ranks = [me] if segment.axis is None else [me, *(i for i in range(n) if i != me)]
            found = []
            for rank in ranks:
                a, b = (base + o for o in segment.bounds({**position, axis: rank}))
                a, b = max(a, start), min(b, stop)
                if a < b:
                    found.append((rank, a, b))
            plan += sorted(found, key=lambda item: item[1])
    return plan
