"""Runs steps some of which leave blocks out, and add what these added in a step before."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import ProcessGroup

from xdit_compile.ir.program import Program
from xdit_compile.ir.step_inputs import PROBE
from xdit_compile.runtime.execution.executor import NONE, Executor, Shares
from xdit_compile.spec import ALL, ShardingSpec


@dataclass(frozen=True)
class CachedStep:
    """One rank's programs of a step: each with what it keeps from step to step (``Executor``'s ``invariant``).

    Attributes:
        passed: the names of what the head returns after its probe and two sums, and ``leaving`` of what leaves the
            blocks; ``streams``: for each of the latter, which of the former blocks add it to, if any.
        left_out: the paths of the blocks that a step may leave out, of ``all_blocks``.
    """

    head: tuple[Program, Program | None]
    blocks: tuple[Program, Program | None]
    rest: tuple[Program, Program | None]
    passed: tuple[str, ...]
    leaving: tuple[str, ...]
    streams: tuple[str | None, ...]
    left_out: tuple[str, ...]
    all_blocks: tuple[str, ...]


class StepState:
    """What one condition's loop keeps, and what it does with that.

    Attributes:
        probe: of the step that the next is compared with; ``moved``: changes since blocks were computed (TeaCache).
        added: what blocks added in the last steps that computed them, newest first, and which steps these were.
        skipped: of the loop's steps so far, whether they left blocks out.
    """

    def __init__(self, spec: ShardingSpec) -> None:
        self.spec = spec
        self.probe: torch.Tensor | None = None
        self.moved = 0.0
        self.added: deque[tuple[int, Sequence[torch.Tensor]]] = deque(maxlen=2 if spec.cache == "taylor" else 1)
        self.skipped: list[bool] = []
        self._polynomial = spec.polynomial or [1.0, 0.0]
        self._weights: list[tuple[int, int | None]] | None = None

    def meet(self, weights: list[tuple[int, int | None]]) -> None:
        """The next step is made with these, by their identities and writes: what was kept of others is not used."""
        if self._weights is not None and weights != self._weights:
            self.probe, self.moved = None, 0.0
            self.added.clear()
            self.skipped.clear()
        self._weights = weights

    def skips(self, probe: torch.Tensor, sums: torch.Tensor) -> bool:
        """Whether the loop's next step leaves blocks out. The same on every rank, as ``sums`` are: (2,), absolute
        changes of the probe since the step that it is compared with, and absolute values then."""
        skips = self._may_skip() and self._decided(sums)
        if not skips:
            self.moved = 0.0
        if not skips or self.spec.cache == "teacache":
            self.probe = probe
        self.skipped.append(skips)
        return skips

    def _may_skip(self) -> bool:
        warmup = self.spec.warmup_steps
        return len(self.added) > 0 and warmup != ALL and len(self.skipped) >= int(warmup)

    def _decided(self, sums: torch.Tensor) -> bool:
        spec = self.spec
        if spec.cache in ("interval", "taylor"):
            return (len(self.skipped) + 1 - int(spec.warmup_steps)) % spec.cache_every != 0
        changed, was = sums.tolist()
        moved = changed / was if was > 0 else math.inf
        if spec.cache == "teacache":
            rescaled = 0.0
            for c in self._polynomial:
                rescaled = rescaled * moved + c
            self.moved += rescaled
            moved = self.moved
        return moved <= spec.cache_threshold  # never of what is not a number

    def keep(self, added: Sequence[torch.Tensor]) -> None:
        """What blocks added in this step."""
        self.added.appendleft((len(self.skipped), added))

    def extrapolated(self) -> Sequence[torch.Tensor]:
        """What blocks would add in this step: what they added last; or along the line through the last two times."""
        (last, added), *earlier = self.added
        if self.spec.cache == "taylor" and earlier:
            at, other = earlier[0]
            by = (len(self.skipped) - last) / (last - at)
            return [x + (x - y) * by for x, y in zip(added, other, strict=True)]
        return added


class CachedStepExecutor:
    """The programs of a step bound to a model. Called with the flat argument tensors, and what the loop has kept.

    Args:
        counts: counts in ``skipped`` the steps that left blocks out, and in ``decided`` all that might have.
    """

    def __init__(self, step: CachedStep, model: nn.Module, counts: Counter[str], shares: Shares = NONE) -> None:
        self.step, self._counts = step, counts
        head, blocks, rest = step.head, step.blocks, step.rest
        assert head[0].spec is not None
        self.spec = head[0].spec
        self._head = Executor(head[0], model, head[1], counts, shares)
        self._blocks, self._rest = (Executor(p, model, i, Counter(), shares) for p, i in (blocks, rest))

    def __iter__(self) -> Iterator[Executor]:
        return iter((self._head, self._blocks, self._rest))

    @property
    def programs(self) -> tuple[Program, ...]:
        return tuple(p for one in self for p in one.programs)

    def check_groups(self, groups: Sequence[ProcessGroup]) -> None:
        for one in self:
            one.check_groups(groups)

    def forget(self, suspect: bool = False) -> None:
        for one in self:
            one.forget(suspect)

    def begin(self) -> StepState:
        """What a loop begins with."""
        return StepState(self.spec)

    def first_probe(self) -> torch.Tensor:
        """What a loop's first step is compared with: nothing."""
        like = next(n.meta["val"] for n in self._head.program.main.graph.find_nodes(op="placeholder")
                    if n.name == PROBE)
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)

    def __call__(self, tensors: Sequence[torch.Tensor], state: StepState) -> tuple[torch.Tensor, ...]:
        """The results of the next step of a loop that has kept ``state``."""
        names, streams = self.step.leaving, self.step.streams
        state.meet([of for one in self for of in one.versions()])
        before = self.first_probe() if state.probe is None else state.probe
        probe, sums, *passed = self._head(tensors, {PROBE: before})
        values = dict(zip(self.step.passed, passed, strict=True))
        skips = state.skips(probe, sums)
        self._counts["decided"] += 1
        self._counts["skipped"] += skips
        if skips:
            left = [x if s is None else values[s] + x for x, s in zip(state.extrapolated(), streams, strict=True)]
        else:
            left = list(self._blocks(tensors, values))
            added = iter(left[len(names):])
            state.keep([x if s is None else next(added) for x, s in zip(left, streams, strict=False)])
        return self._rest(tensors, {**values, **dict(zip(names, left, strict=False))})
