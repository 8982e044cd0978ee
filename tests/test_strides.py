"""Dimensions of size one may have any stride: who takes it by its word is given an ordinary one by ``Emitter``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_rules import Drawn, local_program, piece, program_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from xdit_compile.ir.layout import Dim, Layout
from xdit_compile.ir.mesh import position_of
from xdit_compile.passes.emitter import TRUSTING
from xdit_compile.passes.rules import RULES
from xdit_compile.spec import ShardingSpec

aten = torch.ops.aten
RANDOM = ("dropout", "rand", "bernoulli", "empty")


def narrowed(tensor: Tensor, size: int) -> Tensor:
    """Its first entries along all dimensions of this size."""
    for dim, n in enumerate(tensor.shape):
        tensor = tensor.narrow(dim, 0, 1) if n == size else tensor
    return tensor.contiguous().clone(memory_format=torch.contiguous_format)


def oddly(tensor: Tensor) -> Tensor:
    """The same, with a stride of one for each dimension of size one."""
    strides = [1 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def calls(op: Any, seed: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Example arguments in which some size has become one, that the operator takes."""
    args = RULES[op].example(Drawn(random.Random(f"{op} {seed}")))
    args = tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == torch.float64 else t, args)
    for size in {n for t in tree_leaves(args) if isinstance(t, Tensor) for n in t.shape if n > 1}:
        yield tree_map_only(Tensor, lambda t, n=size: narrowed(t, n), args)


def called(op: Any, args: tuple[Any, ...]) -> list[Tensor]:
    kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
    found = op(*(args[:-1] if kwargs else args), **kwargs)
    return [t for t in tree_leaves(found) if isinstance(t, Tensor)]


def alike(plain: list[Tensor], op: Any, args: tuple[Any, ...]) -> bool:
    try:
        found = called(op, args)
    except RuntimeError:
        return True  # which is not silent
    wide = torch.complex128
    return all(torch.allclose(a.to(wide), b.to(wide), rtol=1e-2, atol=1e-3, equal_nan=True)
               for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_other_operator_trusts_strides(dtype: torch.dtype) -> None:
    tried, trusting = 0, set()
    for op in (op for op in RULES if not any(word in str(op) for word in RANDOM)):
        for seed in range(2):
            for args in calls(op, seed, dtype):
                try:
                    plain = called(op, args)
                except (RuntimeError, IndexError, ValueError, TypeError):
                    continue
                tried += 1
                if not alike(plain, op, tree_map_only(Tensor, oddly, args)):
                    trusting.add(op)
    assert tried > 500 and trusting <= TRUSTING


@pytest.mark.parametrize(("rows", "ranks"), [(1, 1), (2, 2), (3, 2), (3, 3)])
def test_rows_of_one(rows: int, ranks: int) -> None:
    """Also where a rank has but one of them."""
    draw = torch.Generator().manual_seed(rows)
    a = torch.randint(0, 255, (rows, 64), generator=draw).to(torch.uint8)
    b = torch.randint(-127, 127, (32, 64), generator=draw).to(torch.int8).t()
    program, _ = program_of(aten._int_mm.default, (a, b))
    program = replace(program, spec=ShardingSpec(ulysses_degree=ranks))
    layouts = [Layout.replicated(a.shape).replace(0, Dim.even(rows, ranks)), Layout.replicated(b.shape)]
    for rank in range(ranks):
        local, _ = local_program(program, layouts, rank)
        mine = piece(a, layouts[0], position_of(rank, program.spec))
        assert torch.equal(local.main(oddly(mine), b)[0], mine.int() @ b.int())
