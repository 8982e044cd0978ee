"""Every rule, by brute force: rules on random pieces, gathered, give what the operator gives on the whole."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import operator
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import lockstep
import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from xdit_compile.errors import PlanError
from xdit_compile.ir.layout import (
    BATCH,
    EVERY,
    PATCH,
    SEQUENCE,
    TENSOR,
    Dim,
    Layout,
    Segment,
    concatenate,
    even_offsets,
)
from xdit_compile.ir.mesh import STAGE, axis_sizes, position_of
from xdit_compile.ir.program import Program, is_collective
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes.emitter import Emitter
from xdit_compile.passes.interpreter import FunctionInterpreter, ProgramInterpreter
from xdit_compile.passes.lower_attention import lower_attention
from xdit_compile.passes.rules import RULES
from xdit_compile.passes.sharded_value import Value
from xdit_compile.passes.verifier import check
from xdit_compile.report.costs import costs_of
from xdit_compile.spec import ShardingSpec


@dataclass
class Drawn:
    """Draws example calls for rules; see ``rules.Draw``."""

    rng: random.Random
    choices: int = 0

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(shape, dtype=dtype, generator=generator)

    def indices(self, limit: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randint(limit, shape, generator=generator)

    def size(self, low: int = 1, high: int = 9) -> int:
        self.choices += 1
        return self.rng.randint(low, high)

    def pick(self, *choices: Any) -> Any:
        self.choices += 1
        return self.rng.choice(choices)


CUTS = ("even", "uneven", "empty shares", "segments", "grid")
"""Ways in which a dimension may be cut; each is tried on each dimension."""


def random_dim(rng: random.Random, size: int, parts: int, axis: str = SEQUENCE, cut: str = "segments") -> Dim:
    """Cut among ranks: evenly, at random places, so that some have nothing, in two or three segments of which some are
    replicated, or as the columns of a grid."""
    def shares(length: int, least: int) -> Segment:
        if length < least * parts:
            return Segment(even_offsets(length, parts), axis)
        cuts = sorted(rng.randint(0, length - least * parts) for _ in range(parts - 1))
        return Segment((0, *(c + least * (i + 1) for i, c in enumerate(cuts)), length), axis)

    rows = [n for n in (2, 3) if size % n == 0 and size // n >= parts]
    if cut == "grid" and rows:
        rng.shuffle(rows)
        return Dim.of([shares(size // rows[0], rng.randint(0, 1))]).repeat(rows[0])
    if cut == "even":
        return Dim.even(size, parts, axis)
    if cut == "empty shares":
        place = rng.choice([0, size])
        return Dim.of([Segment((0, *sorted(rng.choice([place, rng.randint(0, size)]) for _ in range(parts - 1)), size),
                               axis)])
    if cut == "segments" and size > 1:
        borders = sorted({0, size, rng.randint(1, size - 1), rng.randint(0, size)})
        kinds = [rng.random() < 0.7 for _ in pairwise(borders)]
        kinds[rng.randrange(len(kinds))] = True
        return Dim.of(shares(b - a, 0) if cut else Segment((0, b - a)) for cut, (a, b) in zip(
            kinds, pairwise(borders), strict=True))
    return Dim.of([shares(size, 1)])


def random_layout(rng: random.Random, shape: tuple[int, ...], spec: ShardingSpec, number: int = -1) -> Layout:
    """One dimension, if any is longer than one, is cut by the sequence axis, and others by those of the batch and of
    features, where there are ranks along them; sometimes none is. ``number`` goes through the dimensions and the ways
    to cut them."""
    dims = [Dim.replicated(n) for n in shape]
    wide = [i for i, n in enumerate(shape) if n > 1]
    degrees = (SEQUENCE, spec.sequence_degree), (BATCH, spec.batch_degree), (TENSOR, spec.tensor_degree)
    axes = [(axis, parts) for axis, parts in degrees if parts > 1]
    rng.shuffle(axes)
    for axis, parts in axes:
        if wide and (number >= 0 or rng.random() < 0.8):
            i = wide[number % len(wide)] if number >= 0 else rng.choice(wide)
            cut = CUTS[number // len(wide) % len(CUTS)] if number >= 0 else rng.choice(CUTS)
            dims[i] = random_dim(rng, shape[i], parts, axis, cut)
            wide.remove(i)
            number = -1
    return Layout(tuple(dims))


def piece(tensor: torch.Tensor, layout: Layout, position: dict[str, int]) -> torch.Tensor:
    """What the rank at ``position`` holds of ``tensor``."""
    for i, dim in enumerate(layout.dims):
        index = [j for a, b in dim.spans(position) for j in range(a, b)]
        tensor = tensor.index_select(i, torch.tensor(index, dtype=torch.long))
    return tensor


def trimmed(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without the last arguments that are as they would be by default."""
    schema = op._schema.arguments
    while args and schema[len(args) - 1].has_default_value() and not isinstance(args[-1], torch.Tensor) and (
            args[-1] == schema[len(args) - 1].default_value):
        args = args[:-1]
    return args


def program_of(op: Any, args: tuple[Any, ...]) -> tuple[Program, list[torch.Tensor]]:
    """A program of this one call, whose arguments end in those by name, if any; without what is a default, which
    captured programs leave away."""
    graph = fx.Graph()
    args, kwargs = (args[:-1], args[-1]) if isinstance(args[-1], dict) else (args, {})
    args = trimmed(op, args)
    tensors: list[torch.Tensor] = []

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["val"] = value
            return node
        return [place(v) for v in value] if isinstance(value, list) else value

    placed = tuple(place(a) for a in args)
    call = graph.call_function(op, placed, {name: place(value) for name, value in kwargs.items()})
    call.meta["val"] = op(*args, **kwargs)
    outs = [call]
    if not isinstance(call.meta["val"], torch.Tensor):
        outs = []
        for i, value in enumerate(call.meta["val"]):
            outs.append(graph.call_function(operator.getitem, (call, i)))
            outs[-1].meta["val"] = value
    graph.output(tuple(outs)).meta["val"] = tuple(n.meta["val"] for n in outs)
    _, outputs = flatten([n.meta["val"] for n in outs])
    return Program(fx.GraphModule({}, graph), (), {}, outputs), tensors


def local_program(program: Program, layouts: list[Layout], rank: int, patch: int = EVERY,
                  seeds: Mapping[str, Layout] = MappingProxyType({})) -> tuple[Program, list[Layout]]:
    """What ``rank`` runs for arguments laid out like this, and how its results are laid out; ``seeds`` says of nodes
    how they are to be."""
    assert program.spec is not None
    position, sizes = {**position_of(rank, program.spec), PATCH: patch}, axis_sizes(program.spec)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    emitter = Emitter(mode, position, sizes)
    interpreter = FunctionInterpreter(ProgramInterpreter(program, {}, position, sizes, mode), emitter, "main")
    values = []
    for node, layout in zip(program.main.graph.find_nodes(op="placeholder"), layouts, strict=True):
        holder = emitter.placeholder(node.name, node.meta["val"], layout.local_shape(position))
        values.append(Value(holder, layout, node.meta["val"].dtype))
    results = interpreter.run(program.main.graph, values, seeds)
    out = emitter.graph.output(tuple(v.node for v in results))
    out.meta["val"] = tuple(v.node.meta["val"] for v in results)
    made = Program(fx.GraphModule({}, emitter.graph), (), {}, program.outputs, frozenset({"captured"}), program.spec,
                   position, notes=tuple(interpreter.cost.notes))
    made = lower_attention(made, sizes, mode)
    check(made)
    return made, [v.layout for v in results]


def combined(i: int, layout: Layout, rank: int, positions: list[dict[str, int]],
             results: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """A rank's i-th result: if it holds summands, the sum over those ranks that differ along that axis alone."""
    held = [r[i] for r, other in zip(results, positions, strict=True) if layout.partial and all(
        other[a] == positions[rank][a] for a in (BATCH, SEQUENCE, TENSOR) if a != layout.partial)] or [results[rank][i]]
    return sum(held[1:], held[0])


def assert_exact(op: Any, args: tuple[Any, ...], layouts: list[Layout], spec: ShardingSpec,
                 apart: float = 1e-6) -> None:
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
        for rank, position in enumerate(positions):
            got = combined(i, layout, rank, positions, results)
            torch.testing.assert_close(got, piece(expected, layout, position), rtol=apart, atol=apart, equal_nan=True)


SPECS = [ShardingSpec(ulysses_degree=u, ring_degree=r, cfg_degree=c, tensor_degree=t) for u, r, c, t in (
    (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2), (3, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 1), (1, 3, 1, 1), (1, 1, 2, 1),
    (1, 1, 1, 3), (2, 1, 2, 1), (4, 1, 1, 1), (1, 2, 1, 2), (1, 2, 2, 1))]

SHARED = Counter(rule.apply for rule in RULES.values())
"""How many operators a rule serves."""


def cases(op: Any) -> int:
    """More for a rule whose example has more choices, fewer for each of many operators that are treated alike."""
    draw = Drawn(random.Random(0))
    RULES[op].example(draw)
    return 6 if SHARED[RULES[op].apply] > 8 else min(12 + 4 * draw.choices, 24)


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_rule_on_pieces_equals_operator_on_whole(op: Any) -> None:
    for seed in range(cases(op)):
        pieces_once(op, RULES[op].example, seed)


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_results_are_of_the_operator_s_own_precision(op: Any) -> None:
    """Also where a rule computes in a wider one."""
    def halved(r: Drawn) -> tuple[Any, ...]:
        return tree_map_only(torch.Tensor, lambda t: t.bfloat16() if t.dtype == torch.float64 else t,
                             RULES[op].example(r))

    for seed in range(3):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # some take no such numbers
            program_of(op, halved(Drawn(random.Random(f"{op} {seed}"))))
            pieces_once(op, halved, seed, 0.1)


def pieces_once(op: Any, example: Callable[[Drawn], tuple[Any, ...]], seed: int, apart: float = 1e-6) -> None:
    rng = random.Random(f"{op} {seed}")
    args, spec = example(Drawn(rng)), SPECS[seed % len(SPECS)]
    tensors, _ = flatten(args)
    # One of the tensors, in turn, is cut in a way that is next; the others anyhow.
    chosen = seed % len(tensors)
    layouts = [random_layout(rng, tuple(t.shape), spec, seed // len(tensors) if i == chosen else -1)
               for i, t in enumerate(tensors)]
    try:
        assert_exact(op, args, layouts, spec, apart)
    except Exception as error:
        shown = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        raise AssertionError(f"case {seed}: {spec}, {[str(lay) for lay in layouts]}, {shown}") from error


def broadcast_product(r: Drawn) -> tuple[Any, ...]:
    """Matrices of batches that have fewer dimensions, or ones, where the other has more."""
    batch = r.pick((2,), (2, 5), (3, 2))
    a, b = (tuple(n if r.pick(True, True, False) else 1 for n in batch)[r.pick(0, 0, 1, 2):] for _ in range(2))
    return r.tensor(*a, 6, 4), r.tensor(*b, 4, 3)


def any_average(n: int) -> Callable[[Drawn], tuple[Any, ...]]:
    return lambda r: (r.tensor(*r.pick((3,), (3,), ()), 2, *[9, 6, 5][:n]), [r.pick(2, 3)] * n, [r.pick(1, 2)] * n,
                      [r.pick(0, 1)] * n, r.pick(False, True), r.pick(False, True),
                      *([r.pick(None, 3)] if n > 1 else []))


aten = torch.ops.aten
WIDER: dict[Any, Callable[[Drawn], tuple[Any, ...]]] = {
    aten.matmul.default: broadcast_product,
    aten.avg_pool1d.default: any_average(1), aten.avg_pool2d.default: any_average(2),
    aten.avg_pool3d.default: any_average(3),
    aten.roll.default: lambda r: (r.tensor(2, 6, 4), [r.pick(1, -3, 8)]),
    aten.conv2d.default: lambda r: (r.tensor(2, 9, 6), r.tensor(4, 2, 3, 3), None, [1, 1], [1, 1]),
    aten.max_pool2d.default: lambda r: (r.tensor(2, 9, 6), [2, 2], [2, 2], [0, 0], [1, 1], r.pick(False, True)),
    aten.conv_transpose2d.input: lambda r: (r.tensor(2, 9, 6), r.tensor(2, 4, 2, 2)),
    aten.im2col.default: lambda r: (r.tensor(2, 9, 6), [3, 2], [1, 1], [1, 0], [2, 1])}
"""Calls beside those that rules give as examples."""


@pytest.mark.parametrize("op", list(WIDER), ids=str)
def test_wider_calls(op: Any) -> None:
    for seed in range(40):
        pieces_once(op, WIDER[op], seed)


def mixed_dim(rng: random.Random, size: int, spec: ShardingSpec) -> Dim:
    """Of which segments may be cut along different axes."""
    kinds = [(SEQUENCE, spec.sequence_degree), (BATCH, spec.batch_degree), (TENSOR, spec.tensor_degree)]
    at = rng.randint(0, size)

    def cut(n: int) -> Dim:
        axis, parts = rng.choice(kinds)
        return random_dim(rng, n, parts, axis, rng.choice(CUTS)) if parts > 1 and n and rng.random() < 0.8 else (
            Dim.replicated(n))

    return concatenate(cut(n) for n in rng.choice([(size,), (at, size - at)]))


def mixed_layout(rng: random.Random, shape: tuple[int, ...], spec: ShardingSpec) -> Layout:
    """No axis cuts two dimensions; what only one rank holds of a dimension of one is given to all at once."""
    layout, taken = Layout.replicated(shape), set[str]()
    for i in rng.sample(range(len(shape)), len(shape)):
        drawn = mixed_dim(rng, shape[i], spec)
        if shape[i] > 1 and not drawn.axes & taken and rng.random() < 0.6:
            layout, taken = layout.replace(i, drawn), taken | drawn.axes
    return layout


@pytest.mark.parametrize("seed", range(150))
def test_any_layout_becomes_any_other(seed: int) -> None:
    """Of a result that is to be laid out anew, a rank holds its piece, and as many bytes as its layout says."""
    rng = random.Random(seed)
    spec, shape = rng.choice(SPECS), (rng.randint(1, 9), rng.randint(1, 9), 2)
    given, wanted = (mixed_layout(rng, shape, spec) for _ in range(2))
    program, (x,) = program_of(aten.relu.default, (Drawn(rng).tensor(*shape),))
    program, seeds = replace(program, spec=spec), {program.main.graph.output_node().args[0][0].name: wanted}
    positions = [position_of(rank, spec) for rank in range(spec.world_size)]
    made = [local_program(program, [given], rank, seeds=seeds) for rank in range(spec.world_size)]
    assert all(len(n.args[0]) > 1 for p, _ in made for n in p.main.graph.nodes if n.target is aten.cat.default)
    results = lockstep.run([p.main for p, _ in made], [[piece(x, given, position)] for position in positions])
    for position, (_, (layout,)), (got,) in zip(positions, made, results, strict=True):
        for had, found, asked in zip(given.dims, layout.dims, wanted.dims, strict=True):
            # Where nothing is said of it, a batch stays as it was.
            assert found == asked or (found == had and had.axes == {BATCH} and not asked.sharded)
        assert torch.equal(got, piece(x.relu(), layout, position))
        assert Value(None, layout, got.dtype).local_bytes(position) == got.nbytes


PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.scaled_dot_product_attention.default}


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_rule_on_pieces_of_batch_and_tokens(op: Any) -> None:
    """Where one dimension holds shares of both, one after the other."""
    for seed in range(30 if op in PRODUCTS else 3):
        rng = random.Random(f"{op} {seed}")
        args, spec = RULES[op].example(Drawn(rng)), ShardingSpec(ulysses_degree=2, cfg_degree=2)
        layouts = [mixed_layout(rng, tuple(t.shape), spec) for t in flatten(args)[0]]
        assert_exact(op, args, layouts, spec)


def halved(rng: random.Random, shape: tuple[int, ...]) -> Layout:
    """One dimension, if any is even, is cut in two halves."""
    even = [i for i, n in enumerate(shape) if n and n % 2 == 0]
    layout = Layout.replicated(shape)
    return layout.replace(i, Dim.even(shape[i], 2)) if even and (i := rng.choice(even)) >= 0 else layout


@pytest.mark.parametrize("op", [op for op in RULES if op is not aten.select.int], ids=str)
def test_what_is_counted_is_what_is_sent(op: Any) -> None:
    """Of even shares: others are padded here and there, as is the one slice of ``select``, which lies on one rank."""
    for seed in range(4):
        rng = random.Random(f"{op} {seed}")
        program, tensors = program_of(op, RULES[op].example(Drawn(rng)))
        spec, layouts = SPECS[seed % 2], [halved(rng, tuple(t.shape)) for t in tensors]
        for rank in range(2):
            local, _ = local_program(replace(program, spec=spec), layouts, rank)
            sent = sum(c.size * c.times for c in costs_of(local).collectives)
            assert sent == sum(n.size for n in local.notes), (seed, rank, *layouts, local.notes)


def served(op: Any, seed: int) -> bool:
    """Whether, of a draw in which one tensor is cut, the result is in parts or summands."""
    rng = random.Random(f"{op} {seed}")
    args, spec = RULES[op].example(Drawn(rng)), SPECS[0]
    program, tensors = program_of(op, args)
    cut = seed % len(tensors)
    layouts = [random_layout(rng, tuple(t.shape), spec, seed // len(tensors)) if i == cut else
               Layout.replicated(t.shape) for i, t in enumerate(tensors)]
    _, results = local_program(replace(program, spec=spec), layouts, 0)
    return any(r.sharded for r in results)


def per_sample(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether the first dimension of all tensors is a batch: of a sample alone comes what comes of it among others."""
    tensors, structure = flatten(args)
    n = tensors[0].shape[0] if all(t.ndim for t in tensors) else 0
    if n < 2 or any(t.shape[:1] != (n,) for t in tensors):
        return False

    def results(*given: Any) -> list[torch.Tensor]:
        given, named = (given[:-1], given[-1]) if isinstance(given[-1], dict) else (given, {})
        return flatten(op(*given, **named))[0]

    whole = results(*args)
    try:
        parts = [results(*structure.build([t[i : i + 1] for t in tensors])) for i in range(n)]
    except (RuntimeError, IndexError):
        return False
    return all(w.ndim and all(p[i].shape == (1, *w.shape[1:]) for p in parts) and w.shape[0] == n and torch.allclose(
        w, torch.cat([p[i] for p in parts]), equal_nan=True) for i, w in enumerate(whole))


NOT_FOLLOWED = {(aten.baddbmm.default, 0), (aten.scaled_dot_product_attention.default, 3), (aten.roll.default, 0)}
"""What is added to a product is laid out as that is; and a roll of all samples around is one, though it moves none."""


def test_a_batch_that_one_tensor_has_cut_is_not_gathered() -> None:
    """What the others hold whole is sliced, and nothing is sent."""
    spec, tried = ShardingSpec(ulysses_degree=2), 0
    for op, seed in itertools.product(RULES, range(4)):
        args = RULES[op].example(Drawn(random.Random(f"{op} {seed}")))
        program, tensors = program_of(op, args)
        chosen = [i for i, t in enumerate(tensors) if (op, i) not in NOT_FOLLOWED and t.is_floating_point()]
        for i in chosen if tensors and per_sample(op, args) else ():
            layouts = [Layout.replicated(t.shape) for t in tensors]
            layouts[i] = layouts[i].replace(0, Dim.even(len(tensors[i]), 2))
            local, results = local_program(replace(program, spec=spec), layouts, 0)
            assert not any(is_collective(n) for n in local.main.graph.nodes), (op, i, args)
            assert all(r.dims[0] == layouts[i].dims[0] for r in results), (op, i, args)
            tried += 1
    assert tried > 300


WHOLE = {f"aten.{name}.default" for name in ("new_zeros", "new_ones", "new_full", "max", "min", "any", "all")}
"""Whose results have nothing to cut, or depend on no values."""


@pytest.mark.parametrize("op", [op for op in RULES if str(op) not in WHOLE], ids=str)
def test_rules_do_not_give_up(op: Any) -> None:
    assert any(served(op, seed) for seed in range(24))


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


# Patches: rules on what is there at one time and what is kept of the time before.


def patched_dim(rng: random.Random, size: int, patches: int, parts: int) -> Dim:
    """Patches one after the other, of random or even lengths, each shared out to ranks; or columns of a grid, or after
    text, which is of the first patch or there at all times; or anything."""
    def shared(length: int, patch: int | None) -> Segment:
        cuts = sorted(rng.randint(0, length) for _ in range(parts - 1))
        offsets = even_offsets(length, parts) if rng.random() < 0.6 else (0, *cuts, length)
        return Segment(offsets, SEQUENCE if parts > 1 else None, patch)

    kind = rng.choice(["even", "even", "cut", "text", "text", "grid", "any"])
    rows = [n for n in (2, 3) if size % n == 0 and size // n >= patches]
    if kind == "grid" and rows:
        n = rng.choice(rows)
        return Dim.patched(even_offsets(size // n, patches), parts).repeat(n)
    if kind == "any":
        borders = sorted({0, size, *(rng.randint(0, size) for _ in range(4))})
        return Dim.of(s if rng.random() < 0.7 else Segment((0, s.length), None, s.patch)
                      for a, b in pairwise(borders)
                      for s in [shared(b - a, rng.choice([None, *range(patches)]))])
    text = rng.randint(1, size - 1) if kind == "text" else 0
    cuts = sorted(rng.randint(0, size - text) for _ in range(patches - 1))
    offsets = even_offsets(size - text, patches) if kind == "even" else (0, *cuts, size - text)
    before = shared(text, 0) if rng.random() < 0.8 else Segment((0, text))
    return Dim.of([before, *(shared(b - a, i) for i, (a, b) in enumerate(pairwise(offsets)))])


def patched_layouts(rng: random.Random, tensors: list[torch.Tensor], spec: ShardingSpec) -> list[Layout]:
    """Some dimension of most of them is cut, of those of the same shape often alike; at least one is. Where there are
    ranks that share the batch, the first dimension is cut by them instead or too."""
    patches, parts = spec.patches, spec.sequence_degree
    layouts: list[Layout] = []
    known: dict[tuple[int, ...], Layout] = {}
    while not any(PATCH in d.axes for lay in layouts for d in lay.dims):
        layouts = []
        for shape in (tuple(t.shape) for t in tensors):
            layout, wide = Layout.replicated(shape), [i for i, n in enumerate(shape) if n > 1]
            if shape in known and rng.random() < 0.5:
                layout = known[shape]
            elif wide and rng.random() < 0.8:
                i = rng.choice(wide)
                layout = layout.replace(i, patched_dim(rng, shape[i], patches, parts))
            elif parts > 1 and rng.random() < 0.3:
                layout = random_layout(rng, shape, replace(spec, cfg_degree=1))
            if 0 in wide and spec.batch_degree > 1 and not layout.dims[0].sharded and rng.random() < 0.7:
                layout = layout.replace(0, Dim.even(shape[0], spec.batch_degree, BATCH))
            known[shape] = layout
            layouts.append(layout)
    return layouts


def other_values(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Other values of the same kind."""
    order = list(range(x.numel()))
    rng.shuffle(order)
    return x.flatten()[torch.tensor(order, dtype=torch.long)].reshape(x.shape)


def mixed(now: torch.Tensor, before: torch.Tensor, layout: Layout, patch: int) -> torch.Tensor:
    """What there is of a tensor after ``patch``: later patches are those of the time before."""
    for i, dim in enumerate(layout.dims):
        patches = [s.patch for s in dim.segments for _ in range(s.length)]
        late = [j for j, p in enumerate(patches) if p is not None and p > patch]
        now = now.index_copy(i, torch.tensor(late, dtype=torch.long), before.index_select(
            i, torch.tensor(late, dtype=torch.long)))
    return now


class Times:
    """The programs of all ranks at all times for one call, and what they keep."""

    def __init__(self, op: Any, args: tuple[Any, ...], layouts: list[Layout], spec: ShardingSpec) -> None:
        program, self.tensors = program_of(op, args)
        program = replace(program, spec=spec)
        self.whole, self.layouts, self.times = program.main, layouts, [EVERY, *range(spec.patches)]
        # Of any one stage.
        ranks = [rank for rank in range(spec.world_size) if position_of(rank, spec)[STAGE] == 1]
        self.positions = [position_of(rank, spec) for rank in ranks]
        self.programs: dict[int, list[fx.GraphModule]] = {}
        results: list[Layout] = []
        shapes: list[list[tuple[Any, ...]]] = []
        for time in self.times:
            made = [local_program(program, layouts, rank, time) for rank in ranks]
            self.programs[time] = [p.main for p, _ in made]
            results = results or made[0][1]
            assert all(found == results for _, found in made), "all are laid out alike at all times"
            kept = [[(tuple(n.meta["val"].shape), n.meta["val"].dtype)
                     for n in list(p.main.graph.find_nodes(op="placeholder"))[len(self.tensors):]] for p, _ in made]
            shapes = shapes or kept
            assert kept == shapes, "the same is kept at all times"
        assert all(lay.partial != PATCH for lay in results), "values are kept, not summands"
        self.results = results
        self.caches = [[torch.full(shape, 7).to(dtype) for shape, dtype in rank] for rank in shapes]

    def run(self, time: int, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The results of all ranks."""
        given = [[*(piece(t, lay, {**at, PATCH: time}) for t, lay in zip(tensors, self.layouts, strict=True)), *kept]
                 for at, kept in zip(self.positions, self.caches, strict=True)]
        return [list(r) for r in lockstep.run(self.programs[time], given)]

    def assert_run(self, time: int, tensors: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
        """That this time's results of pieces of ``tensors`` are the pieces of what there is on the whole."""
        held = self.run(time, tensors)
        for i, (layout, expected) in enumerate(zip(self.results, self.whole(*wanted), strict=True)):
            for rank, at in enumerate(self.positions):
                axis = layout.partial
                # Summands are those of ranks that differ in this axis alone.
                parts = [r[i] for r, other in zip(held, self.positions, strict=True) if axis and all(
                    other[a] == at[a] for a in (BATCH, SEQUENCE) if a != axis)] or [held[rank][i]]
                got = sum(parts[1:], parts[0])
                torch.testing.assert_close(got, piece(expected, layout, {**at, PATCH: time}), rtol=1e-6, atol=1e-6,
                                           equal_nan=True)


def assert_timely(op: Any, args: tuple[Any, ...], layouts: list[Layout], spec: ShardingSpec,
                  rng: random.Random, step_inputs: bool = True) -> None:
    """Patches are exact where nothing changed; where it did, each is computed from what has come already of the new,
    and else of the old, so that the last one is exact again."""
    made = Times(op, args, layouts, spec)
    now, before = made.tensors, [other_values(rng, t) for t in made.tensors]
    for time in made.times:
        made.assert_run(time, now, now)
    if not step_inputs:
        return
    made.assert_run(EVERY, before, before)
    for time in made.times[1:]:
        made.assert_run(time, now, [mixed(a, b, lay, time) for a, b, lay in zip(now, before, layouts, strict=True)])


WAIT = torch.ops._c10d_functional.wait_tensor.default
TIMES = [ShardingSpec(pipefusion_degree=2, num_patches=m, ulysses_degree=u)
         for m, u in ((2, 1), (3, 1), (3, 1), (2, 2), (2, 2), (3, 2))]
TIMES += [replace(spec, cfg_degree=2) for spec in (TIMES[0], TIMES[3])]


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_rule_on_patches_equals_operator_on_what_has_come(op: Any) -> None:
    for seed in range(cases(op) // 4):
        rng = random.Random(f"{op} {seed}")
        patches_once(op, rng, rng.choice(TIMES))


def patches_once(op: Any, rng: random.Random, spec: ShardingSpec) -> None:
    args = RULES[op].example(Drawn(rng))
    tensors, _ = flatten(args)
    layouts = patched_layouts(rng, tensors, spec)
    # Keys and values that are cut otherwise are kept twice.
    once = op is not torch.ops.aten.scaled_dot_product_attention.default or layouts[1] == layouts[2]
    assert_timely(op, args, layouts, spec, rng, once)


@pytest.mark.parametrize(("ranks", "text"), [(1, 0), (2, 0), (2, 4)])
@pytest.mark.parametrize(("outer", "masked"), [((2,), False), ((2,), True), ((), False), ((1, 2), False)])
def test_attention_of_patches_over_kept_keys_and_values(ranks: int, text: int, outer: Any, masked: bool) -> None:
    """As in a model: text of the first patch, then tokens of all."""
    rng = random.Random(ranks)
    spec = ShardingSpec(pipefusion_degree=2, num_patches=3, ulysses_degree=ranks)
    image = Dim.patched([0, 4, 6, 10], ranks)
    tokens = Dim.of([*([Segment(even_offsets(text, ranks), SEQUENCE, 0)] if text else []), *image.segments])
    draw, n = Drawn(rng), text + 10
    args = *(draw.tensor(*outer, 4, n, 8) for _ in range(3)), (
        draw.tensor(*outer, 1, n, n) if masked else None), 0.0, False
    layouts = [Layout.replicated(t.shape).replace(-2, tokens) for t in args[:3]]
    layouts += [Layout.replicated((*outer, 1, n, n))] * masked
    op = torch.ops.aten.scaled_dot_product_attention.default
    assert_timely(op, args, layouts, spec, rng)
    made = Times(op, args, layouts, spec)
    kept = [math.prod(outer) * 4 // ranks * n * 8] * 2
    assert [c.numel() for c in made.caches[0]] == kept, "each rank keeps its heads of all tokens"


def test_nothing_is_exchanged_of_what_is_of_another_patch() -> None:
    spec = ShardingSpec(pipefusion_degree=2, num_patches=2, ulysses_degree=2)
    args = torch.randn(2, 4, 5, dtype=torch.float64), 1
    for text in (Dim.of([Segment((0, 2, 4), SEQUENCE, 0)]), Dim.of([Segment((0, 1, 2), SEQUENCE, 0)]).repeat(2)):
        layouts = [Layout.replicated((2, 4, 5)).replace(1, text)]
        assert_timely(torch.ops.aten.cumsum.default, args, layouts, spec, random.Random(0))
        programs = Times(torch.ops.aten.cumsum.default, args, layouts, spec).programs
        exchanges = {time: sum("c10d" in str(n.target) for n in p[0].graph.nodes) for time, p in programs.items()}
        assert exchanges[0] == exchanges[EVERY] > 0 and exchanges[1] == 0


def test_a_batch_and_columns_cut_alike_make_no_product_that_is_cut_twice() -> None:
    a, b = torch.randn(2, 5, 6, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    spec, aten = ShardingSpec(ulysses_degree=2), torch.ops.aten
    whole = Layout.replicated(b.shape)
    for first in (Layout.replicated(a.shape).replace(i, Dim.even(a.shape[i], 2)) for i in range(4)):
        for second in (whole.replace(i, Dim.even(b.shape[i], 2)) for i in range(4)):
            assert_exact(aten.matmul.default, (a, b), [first, second], spec)
        assert_exact(aten.matmul.default, (a, b[0, 0]), [first, Layout((Dim.replicated(4), Dim.even(4, 2)))], spec)


def test_rules_have_the_defaults_of_their_operators() -> None:
    """Captured programs leave away what is as it is by default. None is what a rule finds out itself."""
    compared = 0
    for op, known in RULES.items():
        given = [*inspect.signature(known.apply).parameters.values()][1:]
        placed = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {a.name: a for a in op._schema.arguments}
        pairs = [*zip(placed, (a for a in named.values() if not a.kwarg_only), strict=False),
                 *((p, named[p.name]) for p in given if p.kind == p.KEYWORD_ONLY and p.name in named)]
        for parameter, argument in pairs:
            if argument.has_default_value() and parameter.default is not None:
                wanted = argument.default_value
                # One number stands for one of each dimension.
                wanted = tuple(wanted[:1]) if isinstance(wanted, list) else wanted
                assert parameter.default == wanted, f"{op}: {parameter.name} of {known.apply.__name__}"
                compared += 1
    assert compared >= 100


@pytest.mark.parametrize(("op", "args", "pieces", "exchanges"), [
    (torch.ops.aten.conv2d.default, ((1, 4, 8, 6), (8, 4, 2, 2), None, [2, 2]), (4, 4), 0),
    (torch.ops.aten.conv2d.default, ((1, 4, 8, 6), (8, 4, 2, 2), None, [2, 2]), (5, 3), 1),
    (torch.ops.aten.conv2d.default, ((1, 4, 8, 6), (8, 4, 3, 3), None, [1, 1], [1, 1]), (4, 4), 1),
    (torch.ops.aten.conv2d.default, ((1, 4, 8, 6), (8, 4, 1, 1)), (5, 3), 0),
    (torch.ops.aten.conv2d.default, ((1, 4, 8, 6), (8, 4, 1, 1), None, [2, 2]), (4, 4), 0),
    (torch.ops.aten.avg_pool2d.default, ((1, 4, 8, 6), [4, 2]), (4, 4), 0),
    (torch.ops.aten.max_pool2d.default, ((1, 4, 8, 6), [2, 2], [2, 2]), (6, 2), 0)], ids=str)
def test_windows_send_only_what_others_need(op: Any, args: Any, pieces: tuple[int, int], exchanges: int) -> None:
    """Patch embedding, and all that looks at no border of a piece, sends nothing."""
    args = tuple(torch.randn(a) if isinstance(a, tuple) else a for a in args)
    program, tensors = program_of(op, args)
    program = replace(program, spec=ShardingSpec(ulysses_degree=2))
    layouts = [Layout.replicated(tuple(t.shape)) for t in tensors]
    cut = Dim.of([Segment((0, pieces[0], sum(pieces)), SEQUENCE)])
    layouts[0] = layouts[0].replace(2, cut)
    for rank in range(2):
        local, _ = local_program(program, layouts, rank)
        sent = [n for n in local.main.graph.nodes if is_collective(n) and n.target is not WAIT]
        assert len(sent) == exchanges, (rank, local.main.code)


@pytest.mark.parametrize("op", [
    aten.conv1d.default, aten.conv2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.max_pool1d.default,
    aten.max_pool2d.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input], ids=str)
def test_no_row_is_sent_that_is_not_read(op: Any) -> None:
    """Of each row by itself it is tried which rows of the result it changes."""
    spec, tried = ShardingSpec(ulysses_degree=2), 0
    for seed in range(24):
        rng = random.Random(f"{op} {seed}")
        args = RULES[op].example(Drawn(rng))
        program, (x, *others) = program_of(op, args)
        if "transpose" in str(op) and others[0].shape[2] < args[3][0]:
            continue  # some rows of the result are of no row, and are made with one that is near
        cut = Dim.of([Segment((0, rng.randint(3, x.shape[2] - 3), x.shape[2]), SEQUENCE)])
        layouts = [Layout.replicated(x.shape).replace(2, cut), *(Layout.replicated(t.shape) for t in others)]
        made = [local_program(replace(program, spec=spec), layouts, rank) for rank in range(2)]
        whole = program.main(x, *others)[0]
        for rank, (local, (layout,)) in enumerate(made):
            if not layout.dims[2].sharded:
                continue
            ((a, b),), ((c, d),) = (lay.dims[2].spans({SEQUENCE: rank}) for lay in (layout, layouts[0]))
            read = [r for r in range(x.shape[2]) if not torch.equal(program.main(
                x.index_fill(2, torch.tensor([r]), 9.0), *others)[0][:, :, a:b], whole[:, :, a:b])]
            got = [n for n in local.main.graph.nodes if is_collective(n) and n.target is not WAIT]
            assert sum(sum(n.args[1]) for n in got) == sum(not c <= r < d for r in read), (seed, args[1:], cut, rank)
            tried += 1
    assert tried > 10


def sent_by(op: Any, args: tuple[Any, ...], cuts: Mapping[int, tuple[int, Dim]], spec: ShardingSpec) -> list[int]:
    """Numbers that each collective of a rank gives, where tensors are cut along a dimension."""
    program, tensors = program_of(op, args)
    layouts = [Layout.replicated(t.shape) for t in tensors]
    for i, (at, dim) in cuts.items():
        layouts[i] = layouts[i].replace(at, dim)
    local, _ = local_program(replace(program, spec=spec), layouts, 0)
    return [n.meta["val"].numel() for n in local.main.graph.nodes if is_collective(n) and n.target is not WAIT]


TWO, TENSORS = ShardingSpec(ulysses_degree=2), ShardingSpec(tensor_degree=2)
ROWS = Dim.even(8, 2)
THIN: dict[str, tuple[Any, tuple[Any, ...], int, int]] = {
    "norm": (aten.linalg_vector_norm.default, (torch.randn(8, 64), 2.0, [0]), 0, 128),
    "norm of magnitudes": (aten.linalg_vector_norm.default, (torch.randn(8, 64), 1.0, [0]), 0, 128),
    "norm of small order": (aten.linalg_vector_norm.default, (torch.randn(8, 64), 0.5, [0]), 0, 128),
    "largest magnitude": (aten.linalg_vector_norm.default, (torch.randn(8, 64), math.inf, [0]), 0, 128),
    "largest": (aten.amax.default, (torch.randn(8, 64), [0]), 0, 128),
    "least of all": (aten.min.default, (torch.randn(8, 64),), 0, 2),
    "any": (aten.any.default, (torch.randn(8, 64) > 0,), 0, 2),
    "group norm": (aten.group_norm.default, (torch.randn(2, 4, 8, 64), 2), 2, 8),
    "padding beside": (aten.pad.default, (torch.randn(2, 2, 7, 8), [0, 0, 1, 1], "circular"), 3, 0),
    "padding": (aten.pad.default, (torch.randn(2, 2, 8, 5), [0, 0, 1, 1], "replicate"), 2, 0)}
"""Operators over a dimension of eight that two ranks share, where it is, and how many numbers may be sent."""


@pytest.mark.parametrize("name", THIN)
def test_parts_of_a_result_travel_and_not_what_it_is_made_of(name: str) -> None:
    op, args, at, most = THIN[name]
    assert max(sent_by(op, args, {0: (at, ROWS)}, TWO), default=0) <= most


def test_a_count_has_no_parts() -> None:
    count = aten.linalg_vector_norm.default, (torch.randn(8, 64), 0.0, [0])
    assert max(sent_by(*count, {0: (0, ROWS)}, TWO)) == 8 * 64


def test_of_two_cuts_what_differs_travels() -> None:
    other = Dim.of([Segment((0, 5, 8), SEQUENCE)])
    pair = torch.randn(8, 64), torch.randn(8, 64)
    assert max(sent_by(aten.add.Tensor, pair, {0: (0, ROWS), 1: (0, other)}, TWO)) <= 2 * 64


def test_features_and_columns_that_are_cut_alike_stay_so() -> None:
    cuts = {0: (1, Dim.even(8, 2, TENSOR)), 1: (1, Dim.even(8, 2, TENSOR))}
    assert sent_by(aten.linear.default, (torch.randn(6, 8), torch.randn(4, 8)), cuts, TENSORS) == []


@pytest.mark.parametrize("held", [True, False])
def test_groups_of_heads_stay_where_they_are(held: bool) -> None:
    """Of tensor ranks each has some query heads, and takes or has the keys and values of their groups."""
    q, kv = torch.randn(2, 4, 6, 8), [torch.randn(2, 2, 6, 8) for _ in range(2)]
    args = q, *kv, None, 0.0, False, {"enable_gqa": True}
    cuts = {0: (1, Dim.even(4, 2, TENSOR))} | ({i: (1, Dim.even(2, 2, TENSOR)) for i in (1, 2)} if held else {})
    assert sent_by(aten.scaled_dot_product_attention.default, args, cuts, TENSORS) == []


def test_a_bias_of_pairs_of_which_a_rank_has_the_rows_has_keys_gathered() -> None:
    """Whole it would be more than all of them."""
    tensors = *(torch.randn(1, 4, 32, 8) for _ in range(3)), torch.randn(1, 4, 32, 32)
    rows, other = Dim.even(32, 2), Dim.of([Segment((0, 20, 32), SEQUENCE)])
    args, op = (*tensors, 0.0, False), aten.scaled_dot_product_attention.default
    alike = sent_by(op, args, dict.fromkeys(range(4), (2, rows)), TWO)
    assert max(alike) <= 2 * tensors[1].numel()
    cut = {**dict.fromkeys(range(3), (2, rows)), 3: (2, other)}
    assert max(sent_by(op, args, cut, TWO)) >= tensors[3].numel()


@pytest.mark.parametrize("seed", range(24))
def test_a_sum_over_text_and_image(seed: int) -> None:
    """Of which all hold the text, and each a share of the image."""
    rng = random.Random(seed)
    mixed, spec = concatenate(rng.sample([Dim.replicated(3), Dim.even(6, 2)], 2)), SPECS[seed % 2]
    layouts = [Layout.replicated((2, 5, 9)), Layout.replicated((2, 9, 4))]
    for i, at in rng.choice([[(0, 2)], [(1, 1)], [(0, 2), (1, 1)]]):
        layouts[i] = layouts[i].replace(at, mixed)
    assert_exact(aten.bmm.default, (Drawn(rng).tensor(2, 5, 9), Drawn(rng).tensor(2, 9, 4)), layouts, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", [aten.rms_norm.default, aten.layer_norm.default], ids=str)
def test_norms_of_features_that_ranks_share_have_the_defaults_of_pytorch(op: Any, dtype: torch.dtype) -> None:
    """Of values so small that the default of epsilon decides."""
    x = (1e-3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    program, _ = program_of(op, (x, [8]))
    spec, layout = ShardingSpec(tensor_degree=2), Layout((Dim.replicated(3), Dim.even(8, 2, TENSOR)))
    program = replace(program, spec=spec)
    found = lockstep.run([local_program(program, [layout], r)[0].main for r in range(2)],
                         [[piece(x, layout, position_of(r, spec))] for r in range(2)])
    torch.testing.assert_close(torch.cat([r[0] for r in found], -1), op(x, [8]), rtol=1e-2, atol=1e-6)


def test_a_piece_that_is_not_what_its_layout_says_is_found() -> None:
    program, _ = program_of(aten.relu.default, (torch.randn(4, 6),))
    cut = Layout.replicated((4, 6)).replace(0, Dim.even(4, 2))
    local, _ = local_program(replace(program, spec=SPECS[0]), [cut], 0)
    (node,) = local.main.graph.find_nodes(op="call_function", target=aten.relu.default)
    for wrong in (Layout.replicated((4, 6)), Layout.replicated((4, 6)).replace(1, Dim.even(6, 2))):
        node.meta["layout"] = wrong
        with pytest.raises(PlanError):
            check(local)
