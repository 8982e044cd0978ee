"""Every rule, by brute force: rules on random pieces, gathered, give what the operator gives on the whole."""

from __future__ import annotations

import operator
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import lockstep
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.layout import SEQUENCE, Dim, Layout, Segment
from xdit_compile.mesh import axis_sizes, position_of
from xdit_compile.passes.check import check
from xdit_compile.passes.emit import Emitter
from xdit_compile.passes.lower import lower_attention
from xdit_compile.passes.rules import RULES
from xdit_compile.passes.shard import Sharder, Walk
from xdit_compile.passes.values import Value
from xdit_compile.program import Program
from xdit_compile.spec import ShardingSpec
from xdit_compile.structure import flatten


@dataclass
class Drawn:
    """Draws example calls for rules; see ``rules.Draw``."""

    rng: random.Random

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(*shape, dtype=dtype, generator=generator)

    def indices(self, limit: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randint(limit, shape, generator=generator)

    def size(self, low: int = 1, high: int = 9) -> int:
        return self.rng.randint(low, high)

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)


def random_dim(rng: random.Random, size: int, parts: int) -> Dim:
    """One to three segments, each replicated or cut at random places, shares of zero included."""
    borders = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 2)))})
    segments = []
    for a, b in pairwise(borders):
        if rng.random() < 0.25:
            segments.append(Segment((0, b - a)))
        else:
            cuts = sorted(rng.randint(0, b - a) for _ in range(parts - 1))
            segments.append(Segment((0, *cuts, b - a), SEQUENCE))
    return Dim.of(segments)


def random_layout(rng: random.Random, shape: tuple[int, ...], parts: int) -> Layout:
    """At most one dimension is sharded, as over any one mesh axis; sometimes evenly, sometimes not at all."""
    dims = [Dim.replicated(n) for n in shape]
    wide = [i for i, n in enumerate(shape) if n > 1]
    if wide and rng.random() < 0.85:
        i = rng.choice(wide)
        even = rng.random() < 0.5 and shape[i] >= parts
        dims[i] = Dim.even(shape[i], parts) if even else random_dim(rng, shape[i], parts)
        rows = [n for n in (2, 3) if shape[i] % n == 0 and shape[i] // n >= parts]
        if rows and rng.random() < 0.3:
            # The columns of a grid of that many rows.
            dims[i] = Dim.even(shape[i] // rows[-1], parts).repeat(rows[-1])
    return Layout(tuple(dims))


def piece(tensor: torch.Tensor, layout: Layout, position: dict[str, int]) -> torch.Tensor:
    """What the rank at ``position`` holds of ``tensor``."""
    for i, dim in enumerate(layout.dims):
        index = [j for a, b in dim.spans(position) for j in range(a, b)]
        tensor = tensor.index_select(i, torch.tensor(index, dtype=torch.long))
    return tensor


def program_of(op: Any, args: tuple[Any, ...]) -> tuple[Program, list[torch.Tensor]]:
    """A program of this one call."""
    graph = fx.Graph()
    tensors: list[torch.Tensor] = []

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["val"] = value
            return node
        return [place(v) for v in value] if isinstance(value, list) else value

    placed = tuple(place(a) for a in args)
    call = graph.call_function(op, placed)
    call.meta["val"] = op(*args)
    outs = [call]
    if not isinstance(call.meta["val"], torch.Tensor):
        outs = []
        for i, value in enumerate(call.meta["val"]):
            outs.append(graph.call_function(operator.getitem, (call, i)))
            outs[-1].meta["val"] = value
    graph.output(tuple(outs)).meta["val"] = tuple(n.meta["val"] for n in outs)
    _, outputs = flatten([n.meta["val"] for n in outs])
    return Program(fx.GraphModule({}, graph), (), {}, outputs), tensors


def local_program(program: Program, layouts: list[Layout], rank: int) -> tuple[Program, list[Layout]]:
    """What ``rank`` runs for arguments laid out like this, and how its results are laid out."""
    assert program.spec is not None
    position, sizes = position_of(rank, program.spec), axis_sizes(program.spec)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    emitter = Emitter(mode, position, sizes)
    sharder = Sharder(Walk(program, {}, position, sizes, mode), emitter, "main")
    values = []
    for node, layout in zip(program.main.graph.find_nodes(op="placeholder"), layouts, strict=True):
        holder = emitter.placeholder(node.name, node.meta["val"], layout.local_shape(position))
        values.append(Value(holder, layout, node.meta["val"].dtype))
    results = sharder.run(program.main.graph, values, {})
    out = emitter.graph.output(tuple(v.node for v in results))
    out.meta["val"] = tuple(v.node.meta["val"] for v in results)
    made = Program(fx.GraphModule({}, emitter.graph), (), {}, program.outputs, frozenset({"captured"}), program.spec,
                   position)
    made = lower_attention(made, sizes, mode)
    check(made)
    return made, [v.layout for v in results]


def assert_exact(op: Any, args: tuple[Any, ...], layouts: list[Layout], spec: ShardingSpec) -> None:
    program, tensors = program_of(op, args)
    program = replace(program, spec=spec)
    locals_ = [local_program(program, layouts, rank) for rank in range(spec.world_size)]
    positions = [position_of(rank, spec) for rank in range(spec.world_size)]
    results = lockstep.run(
        [p.main for p, _ in locals_],
        [[piece(t, lay, position) for t, lay in zip(tensors, layouts, strict=True)] for position in positions])
    whole = program.main(*tensors)
    for i, expected in enumerate(whole):
        layout = locals_[0][1][i]
        assert all(lays[i] == layout for _, lays in locals_)
        held = [r[i] for r in results]
        if layout.partial:
            held = [sum(held[1:], held[0])] * len(held)
        for got, position in zip(held, positions, strict=True):
            torch.testing.assert_close(got, piece(expected, layout, position), rtol=1e-6, atol=1e-6, equal_nan=True)


SPECS = [ShardingSpec(ulysses_degree=u, ring_degree=r) for u, r in ((2, 1), (1, 2), (3, 1), (2, 2), (1, 3), (4, 1))]


@pytest.mark.parametrize("op", list(RULES), ids=str)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**31), spec=st.sampled_from(SPECS))
def test_rule_on_pieces_equals_operator_on_whole(op: Any, seed: int, spec: ShardingSpec) -> None:
    rng = random.Random(seed)
    args = RULES[op].example(Drawn(rng))
    tensors, _ = flatten(args)
    layouts = [random_layout(rng, tuple(t.shape), spec.world_size) for t in tensors]
    assert_exact(op, args, layouts, spec)


def test_columns_of_a_grid_are_taken_and_gathered_in_one_piece() -> None:
    """However many rows there are: a graph with a slice for each of them would be no use."""
    aten, spec = torch.ops.aten, ShardingSpec(ulysses_degree=2)
    x, table = torch.randn(2, 60, 5, dtype=torch.float64), torch.randn(60, 1, dtype=torch.float64)
    columns = Layout((Dim.replicated(2), Dim.even(4, 2).repeat(15), Dim.replicated(5)))
    whole = Layout.replicated(table.shape)
    taken, gathered = (aten.mul.Tensor, (x, table), [columns, whole]), (aten.cumsum.default, (x, 1), [columns])
    for op, args, layouts in (taken, gathered):
        assert_exact(op, args, layouts, spec)
        program, _ = program_of(op, args)
        made, _ = local_program(replace(program, spec=spec), layouts, 0)
        assert sum(n.target is aten.slice.Tensor for n in made.main.graph.nodes) <= 1
        assert sum(n.op == "call_function" for n in made.main.graph.nodes) < 12


def test_a_convolution_of_one_tap_follows_any_layout() -> None:
    """Over frames, of tokens of which each rank has some columns in each row."""
    args = torch.randn(1, 3, 5, 12, dtype=torch.float64), torch.randn(4, 3, 3, 1, dtype=torch.float64), None
    layouts = [Layout((*map(Dim.replicated, (1, 3, 5)), Dim.even(4, 2).repeat(3))), Layout.replicated((4, 3, 3, 1))]
    call, spec = (*args, [1, 1], [1, 0], [1, 1], 1), ShardingSpec(ring_degree=2)
    assert_exact(torch.ops.aten.conv2d.default, call, layouts, spec)
    program, _ = program_of(torch.ops.aten.conv2d.default, call)
    made, _ = local_program(replace(program, spec=spec), layouts, 0)
    assert not any("c10d" in str(n.target) for n in made.main.graph.nodes)
