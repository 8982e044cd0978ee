"""Collectives start early and are waited for late, in one order on every rank, and nothing else changes."""

from __future__ import annotations

import random

import emulation
import lockstep
import pytest
import torch
import zoo
from cases import made
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import program_of
from torch import fx

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.mesh import group_name
from xdit_compile.ir.program import ARRIVAL, brings_parameters, is_collective
from xdit_compile.passes.overlap_communication import WAITS, overlap

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
GROUP = group_name("ulysses", {"ulysses": 2, "ring": 1, "batch": 1, "tensor": 1})


def program_with(build):
    """A program whose graph ``build(call, x)`` makes and returns the result of."""
    program, _ = program_of(aten.relu.default, (torch.ones(8, 8),))
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(8, 8)

    def call(target, *args):
        node = graph.call_function(target, args)
        if target in (c10d.all_to_all_single.default, c10d.wait_tensor.default):
            node.meta["val"] = args[0].meta["val"]
        else:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    graph.output((build(call, x),))
    return program.having(main=fx.GraphModule({}, graph))


def exchanged(call, x):
    return call(c10d.wait_tensor.default, call(c10d.all_to_all_single.default, x, [4, 4], [4, 4], GROUP))


def order(program):
    return [getattr(n.target, "_opname", n.name) for n in program.main.graph.nodes if n.op == "call_function"]


def test_independent_work_moves_between_start_and_wait() -> None:
    def block(call, x):
        side = call(aten.gelu.default, call(aten.mm.default, x, x))
        query = call(aten.relu.default, x)
        back = exchanged(call, call(aten.tanh.default, exchanged(call, query)))
        return call(aten.add.Tensor, back, side)

    before = program_with(block)
    assert order(overlap(before)) == [
        "relu", "all_to_all_single", "mm", "wait_tensor", "tanh", "all_to_all_single", "gelu", "wait_tensor", "add",
    ]  # fmt: skip


def test_nothing_to_overlap_leaves_the_order() -> None:
    program = program_with(lambda call, x: call(aten.relu.default, exchanged(call, call(aten.tanh.default, x))))
    assert order(overlap(program)) == order(program)


@settings(max_examples=30, deadline=None)
@given(groups=st.lists(st.booleans(), min_size=1, max_size=4), many=st.integers(1, 3), before=st.integers(0, 5),
       after=st.integers(0, 5))
def test_work_is_shared_out_by_what_it_costs(groups: list[bool], many: int, before: int, after: int) -> None:
    """Elements count, also where nothing is multiplied; views are free, and so move nothing else."""
    def block(call, x):
        out = x
        for _ in range(len(groups)):
            out = exchanged(call, out)
        end = x
        for _ in range(before):
            end = call(aten.t.default, end)
        for small in groups:
            # Eight on one row are as much as one on all eight.
            end = call(aten.slice.Tensor, end, 0, 0, 1) if small else end
            made = end
            for _ in range(many * (8 if small else 1)):
                made = call(aten.relu.default, made)
            out, end = call(aten.add.Tensor, out, made), x
        for _ in range(after):
            end = call(aten.t.default, end)
        return call(aten.add.Tensor, out, end)

    found = [name for name in order(overlap(program_with(block))) if name not in ("t", "slice", "add")]
    assert found == [name for small in groups for name in (
        "all_to_all_single", *["relu"] * many * (8 if small else 1), "wait_tensor")]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_programs_mean_the_same(seed: int) -> None:
    def block(call, x):
        rng = random.Random(seed)
        made = [x]
        for _ in range(rng.randint(1, 25)):
            a, b = rng.choice(made), rng.choice(made)
            made.append(rng.choice([lambda a=a: exchanged(call, a), lambda a=a: call(aten.tanh.default, a),
                                    lambda a=a, b=b: call(aten.add.Tensor, a, b)])())
        return made[-1]

    before = program_with(block)
    after = overlap(before)
    assert sorted(order(after)) == sorted(order(before))
    starts = [[n.name for n in p.main.graph.nodes if is_collective(n) and n.target is not c10d.wait_tensor.default]
              for p in (before, after)]
    assert starts[0] == starts[1]
    inputs = [[torch.randn(8, 8, generator=torch.Generator().manual_seed(rank))] for rank in range(2)]
    expected, found = (lockstep.run([p.main] * 2, inputs) for p in (before, after))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("spec", ["ulysses=2,shard=2", "offload=block"])
def test_parameters_come_one_block_ahead(spec: str) -> None:
    """When those of the block before are here, and those of the block before that were read."""
    model = made(zoo.CASES["dit"])
    arguments = call_arguments(model, zoo.CASES["dit"].inputs(1, False))
    with torch.no_grad():
        ranks, _ = emulation.on_ranks(model, arguments, capture(model, *arguments), spec)
    for program in ranks:
        nodes = [n for n in program.main.graph.nodes if n.op != "output"]
        place = {n: i for i, n in enumerate(nodes)}
        waits = {n.meta[ARRIVAL]: place[n] for n in nodes if brings_parameters(n) and n.target in WAITS}
        begun = {n.meta[ARRIVAL]: place[n] for n in reversed(nodes) if brings_parameters(n)}
        read = {number: max((place[n] for n in nodes if not brings_parameters(n) and number in {
            i.meta[ARRIVAL] for i in n.all_input_nodes if brings_parameters(i)}), default=-1) for number in begun}
        assert len(begun) > 3 and waits.keys() == begun.keys()
        for number, at in begun.items():
            assert at > waits.get(number - 1, -1)
            assert at > read.get(number - 2, -1)
