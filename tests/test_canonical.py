"""Canonical programs compute what captured ones do: einsum, composite operators, and operators spelled otherwise."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_rules import program_of
from torch import fx

from xdit_compile.errors import PlanError
from xdit_compile.passes.canonicalize import canonicalize
from xdit_compile.passes.expand_einsum import expand_einsum
from xdit_compile.passes.graph_editor import val
from xdit_compile.passes.rules import find_rule

aten = torch.ops.aten


def einsum_graph(equation: str, operands: list[torch.Tensor], path: list[int] | None) -> fx.Graph:
    graph, placed = fx.Graph(), []
    for i, operand in enumerate(operands):
        placed.append(graph.placeholder(f"x{i}"))
        placed[-1].meta["val"] = operand
    node = graph.call_function(aten.einsum.default, (equation, placed), {"path": path} if path else {})
    node.meta["val"] = aten.einsum.default(equation, operands, path=path)
    graph.output((node,))
    return graph


def check_einsum(equation: str, shapes: list[tuple[int, ...]], path: list[int] | None = None) -> bool:
    """That the rewritten graph gives the same; whether einsum is gone."""
    operands = [torch.randn(s, dtype=torch.float64) for s in shapes]
    graph = einsum_graph(equation, operands, path)
    expand_einsum(graph)
    (result,) = fx.GraphModule({}, graph)(*operands)
    torch.testing.assert_close(result, torch.einsum(equation, operands) if path is None else aten.einsum.default(
        equation, operands, path=path))
    return not graph.find_nodes(op="call_function", target=aten.einsum.default)


@pytest.mark.parametrize(("equation", "shapes", "path"), [
    ("...n,d->...nd", [(2, 3, 4), (5,)], None), ("bnc,cd,de->bne", [(2, 3, 4), (4, 5), (5, 6)], None),
    ("bnc,cd,de->bne", [(2, 3, 4), (4, 5), (5, 6)], [1, 2, 0, 1]), ("bnc,bmc", [(2, 3, 4), (2, 5, 4)], None),
    ("bnc->", [(2, 3, 4)], None), ("...c,...c->...", [(2, 1, 4), (3, 4)], None), (",i->i", [(), (3,)], None)])
def test_einsum_becomes_sums_and_products(equation: str, shapes: list[tuple[int, ...]], path: list[int] | None) -> None:
    assert check_einsum(equation, shapes, path)


def test_einsum_of_a_diagonal_stays() -> None:
    assert not check_einsum("bnn->bn", [(2, 3, 3)])


@pytest.mark.parametrize("seed", range(8))
def test_random_einsums(seed: int) -> None:
    rng, tried = random.Random(seed), 0
    while tried < 25:
        sizes, dots = {c: rng.randint(1, 3) for c in "abcde"}, [rng.randint(1, 2) for _ in range(2)]
        terms, shapes = [], []
        for _ in range(rng.randint(1, 4)):
            letters = rng.sample("abcde", rng.randint(0, 4))
            shape, term = [sizes[c] if rng.random() < 0.9 else 1 for c in letters], "".join(letters)
            if rng.random() < 0.3:
                at, k = rng.randint(0, len(term)), rng.randint(0, 2)
                term = f"{term[:at]}...{term[at:]}"
                shape[at:at] = [n if rng.random() < 0.8 else 1 for n in dots[2 - k :]]
            terms.append(term)
            shapes.append(tuple(shape))
        used = sorted({c for term in terms for c in term if c != "."})
        out = "..." * any("." in t for t in terms) + "".join(rng.sample(used, rng.randint(0, len(used))))
        equation = ",".join(terms) + (f"->{out}" if rng.random() < 0.8 else "")
        try:
            torch.einsum(equation, *map(torch.zeros, shapes))
        except RuntimeError:  # sizes that do not go together
            continue
        tried += check_einsum(equation, shapes)


CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.var.dim, (torch.randn(2, 6, 4), [-1], False, True)), (aten.conv1d.padding, (
        torch.randn(2, 4, 9), torch.randn(4, 4, 3), None, [1], "same")),
    (aten.pad_sequence.default, ([torch.randn(5, 3), torch.randn(2, 3)], True, 0.5)),
    (aten.pad.default, (torch.randn(2, 6), [1, 2], "constant", 0.5)), (aten.pad.default, (torch.randn(2, 6), [1, 2])),
    *((aten.pad.default, (torch.randn(2, 6), [1, 2], how)) for how in ("constant", "reflect", "replicate", "circular")),
    (aten.kron.default, (torch.randn(3, 4), torch.randn(2, 2))),
    (aten.inner.default, (torch.randn(2, 3), torch.randn(4, 3))),
    (aten.tensordot.default, (torch.randn(2, 3, 4), torch.randn(3, 4, 5), [1, 2], [0, 1])),
    (aten.adaptive_avg_pool2d.default, (torch.randn(2, 3, 4, 6), [1, 1])),
    (aten.instance_norm.default, (torch.randn(2, 3, 7), None, None, None, None, True, 0.1, 1e-5, False)),
    (aten.cosine_similarity.default, (torch.randn(2, 6), torch.randn(2, 6), -1)),
    (aten.mv.default, (torch.randn(3, 4), torch.randn(4))), (aten.dot.default, (torch.randn(4), torch.randn(4))),
    (aten.vdot.default, (torch.randn(4, dtype=torch.complex64), torch.randn(4, dtype=torch.complex64))),
    (aten.matmul.default, (torch.randn(2, 3, 4), torch.randn(4))),
    (aten.matmul.default, (torch.randn(4), torch.randn(2, 4, 5))),
    (aten.im2col.default, (torch.randn(2, 3, 4, 6), [2, 3], [1, 1], [0, 0], [2, 3])),
    (aten.col2im.default, (torch.randn(2, 12, 6), [4, 6], [2, 2], [1, 1], [0, 0], [2, 2])),
    (aten.index_put.default, (torch.randn(2, 6, 4), [torch.randn(2, 6) > 0], torch.tensor(0.5))),
    (aten.as_strided.default, (torch.randn(4, 6), [3, 2, 3], [6, 1, 2], 1)),
    (aten.as_strided.default, (torch.randn(6, 4).t(), [6, 4], [4, 1])),
    (aten.as_strided.default, (torch.randn(5), [4, 2], [1, 1])),
    (aten.as_strided.default, (torch.randn(5), [3, 5], [0, 1]))]


@pytest.mark.parametrize(("op", "args"), CALLS, ids=lambda x: str(x) if isinstance(x, torch._ops.OpOverload) else "")
def test_spelled_otherwise_it_is_the_same(op: Any, args: tuple[Any, ...]) -> None:
    captured, tensors = program_of(op, args)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    for node in captured.main.graph.nodes:
        node.meta["val"] = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, node.meta["val"])
    main = canonicalize(captured).main
    assert not main.graph.find_nodes(op="call_function", target=op) or find_rule(op)
    values = torch.utils._pytree.tree_leaves([n.meta["val"] for n in main.graph.nodes if n.op == "call_function"])
    assert all(isinstance(v, torch._subclasses.FakeTensor) for v in values)  # none was computed
    torch.testing.assert_close(main(*tensors), captured.main(*tensors))


def test_memory_with_gaps_is_refused() -> None:
    captured, _ = program_of(aten.as_strided.default, (torch.randn(4, 6)[:, :3], [2, 3], [6, 1]))
    with pytest.raises(PlanError, match="a view of a larger one"):
        canonicalize(captured)
    assert val(next(iter(captured.main.graph.nodes))).shape == (4, 3)


@pytest.mark.parametrize("seed", range(60))
def test_memory_that_is_the_tensors_own_is_read_by_strides_and_no_other(seed: int) -> None:
    """The tensor lies at the beginning of more memory, of which it has nothing."""
    rng = random.Random(seed)
    x = torch.randn(30)[:12].view(rng.choice([(12,), (3, 4), (2, 6)]))
    x = x.t() if x.ndim > 1 and rng.random() < 0.5 else x
    size = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    call = x, size, [rng.randint(0, 5) for _ in size], rng.choice([0, 0, 1, 3])
    last = call[3] + sum((n - 1) * s for n, s in zip(size, call[2], strict=True))
    if last >= 30:
        return
    if last < 12:
        test_spelled_otherwise_it_is_the_same(aten.as_strided.default, call)
    else:
        with pytest.raises(PlanError, match="a view of a larger one"):
            canonicalize(program_of(aten.as_strided.default, call)[0])


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_become_concatenations(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 3))]
        dim = rng.randrange(-len(shape), len(shape))
        x, size = torch.randn(shape), shape[dim]
        start, stop = (rng.choice([None, *range(-size - 1, size + 2)]) for _ in range(2))
        step = rng.choice([1, 1, 2])
        place = [slice(None)] * len(shape)
        place[dim] = slice(start, stop) if step == 1 else slice(start, stop, step)
        part = torch.randn(x[tuple(place)].shape)
        test_spelled_otherwise_it_is_the_same(aten.slice_scatter.default, (x, part, dim, start, stop, step))
        index = rng.randrange(-size, size)
        test_spelled_otherwise_it_is_the_same(aten.select_scatter.default,
                                              (x, torch.randn(x.select(dim, 0).shape), dim, index))
        source = torch.randn([n if rng.random() < 0.7 else 1 for n in shape[rng.randint(0, len(shape)):]]).to(
            rng.choice([torch.float32, torch.float64]))
        test_spelled_otherwise_it_is_the_same(aten.copy.default, (x, source))
