"""How the tokens are cut into patches, found by trying, as ``token_axis.py`` finds where ranks' shares begin.

PipeFusion (arXiv 2405.14430) cuts the sample that a model is given. A cut of one of its dimensions must lead to
attention over kept keys and values, or at least save work. Tokens of text that attend together with those of the sample
belong to the first patch: they are computed once per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from torch import fx

from xdit_compile.errors import SpecError
from xdit_compile.ir.layout import EVERY, PATCH, SEQUENCE, Dim, Layout, Segment, even_offsets
from xdit_compile.ir.mesh import position_of
from xdit_compile.ir.program import Program
from xdit_compile.ir.weights_in_graphs import unpacked
from xdit_compile.passes.batch_axis import merge_seeds
from xdit_compile.passes.hoist import hoist
from xdit_compile.passes.interpreter import ProgramInterpreter, Seeds
from xdit_compile.passes.stage_partition import work
from xdit_compile.passes.token_axis import arguments, candidates

UNITS = (1, 2, 4, 8, 16)
"""Rows of a sample are cut in multiples of these: as many as one token covers, so that tokens need no neighbours."""

FIRST = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0)
"""Of an even share of the sample, what the first patch may get that has text beside it."""


@dataclass(frozen=True)
class PatchCandidate:
    """A cut of the tokens and what it costs: the operations of all patches, and of the largest as often; whether
    patches attend to each other, whether they save work, and which values of ``main`` are cut."""

    cost: float
    seeds: Seeds
    attentions: bool
    saves: bool
    cut: frozenset[str]


def patch_seeds(program: Program, sizes: Mapping[str, int], batch: Seeds) -> Seeds:
    """Where patches begin, beside the seeds of the batch: arguments that are cut, and text of the first patch.

    Raises:
        SpecError: there are fewer rows of tokens than patches, or no cut leads to attention over patches.
    """
    assert program.spec is not None
    count, ranks = sizes[PATCH], sizes[SEQUENCE]
    measure = _Measure(program, sizes, batch)

    def cut(node, dim, unit, first=1.0) -> Seeds:
        shape = tuple(node.meta["val"].shape)
        rows = shape[dim] // unit
        lead = max(int(rows / count * first), 1) if first < 1 else even_offsets(rows, count)[1]
        offsets = [0, *(lead + o for o in even_offsets(rows - lead, count - 1))]
        return {node.name: Layout.replicated(shape).replace(dim, Dim.patched([o * unit for o in offsets], ranks, unit))}

    tried: list[tuple[PatchCandidate, tuple[fx.Node, int, int]]] = []
    most = 0
    for node in arguments(program):
        for dim, size in list(enumerate(node.meta["val"].shape))[1:]:
            most, least = max(most, size), inf
            for unit in (u for u in UNITS if size % u == 0 and size // u >= count * ranks):
                new = measure(cut(node, dim, unit))
                if new.cost >= least:
                    break
                least = new.cost
                tried += [(new, (node, dim, unit))] if new.attentions or new.saves else []
    if not tried:
        raise SpecError(
            f"{program.spec} cuts the tokens into {count} patches for {ranks} in each stage, but no cut of the model's "
            f"arguments can be followed to its attention: they have {most} rows at most, several of which may make one "
            "token; use fewer patches, or patches=1")
    best, where = min(tried, key=lambda t: t[0].cost)
    alone = best
    for node in candidates(program):
        shape = tuple(node.meta["val"].shape)
        taken = node.name in best.cut or node.name in best.seeds
        for dim in () if taken else [i for i in range(1, len(shape)) if shape[i] > 1]:
            text = Segment(even_offsets(shape[dim], ranks), SEQUENCE if ranks > 1 else None, 0)
            new = measure(best.seeds | {node.name: Layout.replicated(shape).replace(dim, Dim.of([text]))})
            best = min(best, new, key=lambda t: t.cost)
    if best is alone:
        return best.seeds
    return min((measure(best.seeds | cut(*where, first)) for first in FIRST), key=lambda t: t.cost).seeds


class _Measure:
    """What a cut costs: counted for the first patch, the last, and one between them that stands for the rest."""

    def __init__(self, program: Program, sizes: Mapping[str, int], batch: Seeds) -> None:
        assert program.spec is not None
        self.program, self.sizes, self.batch = program, sizes, batch
        last = sizes[PATCH] - 1
        self._here = position_of(0, program.spec)
        self._times = {0: 1, last: 1} | ({last // 2: last - 1} if last > 1 else {})
        self._whole = ProgramInterpreter(program, batch, {**self._here, PATCH: EVERY}, sizes).main().cost

    def __call__(self, seeds: Seeds) -> PatchCandidate:
        hoisted, flowing = hoist(self.program, cut_by_patches(seeds), unpacked)
        once = work(hoisted, flowing)
        both = merge_seeds(self.batch, seeds)
        walks = [(ProgramInterpreter(hoisted, both, {**self._here, PATCH: patch}, self.sizes).main().cost, n)
                 for patch, n in self._times.items()]
        first, each = walks[0][0], max(self._whole.flops, 1) / self.sizes[SEQUENCE]
        total = once + sum((t.flops - once) * n for t, n in walks)
        largest = max(t.flops - once for t, _ in walks) * self.sizes[PATCH]
        whole = sum(not any(PATCH in d.axes for d in layout.dims) for layout in first.results)
        cost = (total + largest) / each + 0.1 * first.stale_bytes / max(self._whole.moved, 1) + whole
        saves = total < 0.5 * each * (1 + self.sizes[PATCH])
        return PatchCandidate(cost, seeds, first.attentions > 0, saves, frozenset(first.cut))


def cut_by_patches(seeds: Seeds) -> set[str]:
    """The names of values that are cut into patches, or belong to one."""
    return {name for name, layout in seeds.items() if any(PATCH in d.axes for d in layout.dims)}
