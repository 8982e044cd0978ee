"""Any way in which a dimension can be laid out becomes any other that ranks can have."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.layout import BATCH, PATCH, SEQUENCE, TENSOR, Dim, Layout, Segment
from xdit_compile.passes.interpreter import FunctionInterpreter, ProgramInterpreter
from xdit_compile.passes.sharded_value import Value
from xdit_compile.spec import ShardingSpec

SEGMENTS = (Segment((0, 4)), Segment((0, 2, 4), SEQUENCE), Segment((0, 3, 4), TENSOR), Segment((0, 4), None, 0),
            Segment((0, 4), None, 1), Segment((0, 2, 4), SEQUENCE, 1))


@lru_cache
def interpreter() -> ProgramInterpreter:
    model = nn.Linear(4, 4)
    program = replace(capture(model, *call_arguments(model, {"input": torch.zeros(2, 4)})),
                      spec=ShardingSpec.parse("pipefusion=2,patches=2,ulysses=2,tensor=2"))
    position = {SEQUENCE: 0, TENSOR: 0, BATCH: 0, PATCH: 0}
    return ProgramInterpreter(program, {}, position, {SEQUENCE: 2, TENSOR: 2, BATCH: 1})


@pytest.mark.parametrize("many", [1, 2, 3])
def test_any_layout_becomes_whole_and_any_cut(many: int) -> None:
    for segments in itertools.product(SEGMENTS, repeat=many):
        old = Dim.of(segments)
        ways = Dim.replicated(old.size), Dim.even(old.size, 2), Dim.even(old.size, 2, TENSOR), Dim.of(segments[::-1])
        for new in ways:
            of = FunctionInterpreter(interpreter(), None, "main")
            laid = of.lay(Value(None, Layout((old, Dim.replicated(3))), torch.float32), 0, new)
            assert laid.dims == (new, Dim.replicated(3)), f"{old} as {new}"
