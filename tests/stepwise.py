"""Denoising loops of a model whose steps may leave blocks out: all ranks in one process, in lock-step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lockstep
import torch
from emulation import part_of, shares_of
from torch import Tensor, nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.parameter_groups import parameter_groups
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.ir.step_inputs import PROBE, step_inputs
from xdit_compile.passes import local_groups, plan
from xdit_compile.passes.step_cache import CachedParts, find_cut, localize_parts, parts_of
from xdit_compile.runtime.execution.cached_step import StepState
from xdit_compile.spec import ShardingSpec


class Ranks:
    """A model called step by step on all ranks of a spec.

    Attributes:
        skipped: of each rank, which steps it left blocks out of.
        moved: what the decision of each step was made from: absolute changes and values.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: dict[str, Any], spec: str) -> None:
        self.model, self.spec = model, ShardingSpec.parse(spec)
        arguments = call_arguments(model, inputs)
        program, self.whole = capture(model, *arguments), None
        self.whole, self.seeds = plan(program, self.spec)
        cut = find_cut(self.whole, {f"arg_{i}" for i in step_inputs(model, *arguments)})
        parts, world = parts_of(cut), range(self.spec.world_size)
        self.cut = cut
        self.groups = [local_groups(self.whole, self.seeds, parameter_groups(model), r) for r in world]
        self.parts = [localize_parts(parts, self.seeds, r, self.groups[r]) for r in world]
        self.states = [StepState(self.spec) for _ in world]
        self.moved: list[list[float]] = []

    @property
    def skipped(self) -> list[list[bool]]:
        return [s.skipped for s in self.states]

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> list[Any]:
        """What each rank returns."""
        arguments = call_arguments(self.model, inputs)
        tensors, _ = flatten(arguments)
        before = [self._probe(p) if s.probe is None else s.probe for p, s in zip(self.parts, self.states, strict=True)]
        heads = self._run([p.head for p in self.parts], tensors, [{PROBE: b} for b in before])
        assert all(torch.equal(h[1], heads[0][1]) for h in heads), "ranks decide by the same bits"
        self.moved.append(heads[0][1].tolist())
        skips = {s.skips(h[0], h[1]) for s, h in zip(self.states, heads, strict=True)}
        assert len(skips) == 1
        values = [dict(zip(p.passed, h[2:], strict=True)) for p, h in zip(self.parts, heads, strict=True)]
        if skips == {False}:
            found = self._run([p.blocks for p in self.parts], tensors, values)
            for p, state, left, known in zip(self.parts, self.states, found, values, strict=True):
                ends, added = left[: len(p.leaving)], iter(left[len(p.leaving):])
                state.keep([next(added) if s else x for x, s in zip(ends, p.streams, strict=True)])
                known.update(zip(p.leaving, ends, strict=True))
        else:
            for p, state, known in zip(self.parts, self.states, values, strict=True):
                known.update({n: known[s] + x if s else x for n, s, x in zip(
                    p.leaving, p.streams, state.extrapolated(), strict=True)})
        results = self._run([p.rest for p in self.parts], tensors, values)
        return [self.whole.output_spec.finish(arguments, tensors, r) for r in results]

    def _probe(self, parts: CachedParts) -> Tensor:
        like = next(n for n in parts.head.main.graph.nodes if n.name == PROBE).meta["val"]
        return torch.zeros(like.shape, dtype=like.dtype)

    def _run(self, programs: Sequence[Program], tensors: list[Tensor], values: list[dict[str, Tensor]]) -> list[tuple]:
        state = named_parts(dict([*self.model.named_parameters(remove_duplicate=False),
                                  *self.model.named_buffers(remove_duplicate=False)]))
        given = []
        for program, known, groups in zip(programs, values, self.groups, strict=True):
            sources = {"constant": program.constants, "received": known,
                       "parameter_share": shares_of(self.model, program, groups)}
            given.append([tensors[int(i.name.removeprefix("arg_"))] if i.kind == "argument" else part_of(
                sources.get(i.kind, state)[i.name], i.part) for i in program.inputs])
        return lockstep.run([p.main for p in programs], given)
