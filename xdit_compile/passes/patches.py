"""How the tokens are cut into patches, found by trying, as ``seeds.py`` finds where ranks' shares begin.

PipeFusion (arXiv 2405.14430) cuts the sample that a model is given. A cut of one of its dimensions must lead to attention
over kept keys and values. Tokens of text that attend together with those of the sample belong to the first patch: they
are computed once per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xdit_compile.errors import SpecError
from xdit_compile.layout import EVERY, PATCH, SEQUENCE, Dim, Layout, Segment, even_offsets
from xdit_compile.mesh import position_of
from xdit_compile.passes.batch import joined
from xdit_compile.passes.seeds import arguments, candidates
from xdit_compile.passes.shard import Memo, Seeds, Tally, Walk
from xdit_compile.program import Program

UNITS = (1, 2, 4, 8, 16)
"""Rows of a sample are cut in multiples of these: as many as one token covers, so that tokens need no neighbours."""

FIRST = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of an even share of the sample, what the first patch may get that has text beside it."""


@dataclass(frozen=True)
class Tried:
    """A cut of the tokens, and what it costs: the operations of all patches, and of the largest as often."""

    cost: float
    seeds: Seeds
    tally: Tally


def patch_seeds(program: Program, sizes: Mapping[str, int], batch: Seeds) -> Seeds:
    """Where patches begin, beside the seeds of the batch: arguments that are cut, and text of the first patch.

    Raises:
        SpecError: there are fewer rows of tokens than patches, or no cut leads to attention over patches.
    """
    assert program.spec is not None
    count, ranks = sizes[PATCH], sizes[SEQUENCE]
    walks = _Walks(program, sizes, batch)
    wanted = [(node, dim, unit) for node in arguments(program) for dim in range(1, node.meta["val"].ndim)
              for unit in UNITS if node.meta["val"].shape[dim] % unit == 0]
    fitting = [(n, d, u) for n, d, u in wanted if n.meta["val"].shape[d] // u >= count]

    def cut(node, dim, unit, first=1.0) -> Seeds:
        shape = tuple(node.meta["val"].shape)
        rows = shape[dim] // unit
        lead = max(int(rows / count * first), 1) if first < 1 else even_offsets(rows, count)[1]
        offsets = [0, *(lead + o for o in even_offsets(rows - lead, count - 1))]
        return {node.name: Layout.replicated(shape).replace(dim, Dim.patched([o * unit for o in offsets], ranks, unit))}

    tried = [(walks(cut(*where)), where) for where in fitting]
    tried = [t for t in tried if t[0].tally.attentions]
    if not tried:
        most = max((n.meta["val"].shape[d] for n, d, _ in wanted), default=0)
        raise SpecError(
            f"{program.spec} cuts the tokens into {count} patches, but " + (
                f"the sample has {most} rows of them at most; use fewer patches" if most < 2 * count else
                "no cut of the model's arguments leads to attention between patches; use patches=1"))
    best, where = min(tried, key=lambda t: t[0].cost)
    for node in candidates(program):
        if node.name in best.tally.cut or node.name in best.seeds:
            continue
        for dim in range(1, node.meta["val"].ndim):
            shape = tuple(node.meta["val"].shape)
            text = Segment(even_offsets(shape[dim], ranks), SEQUENCE if ranks > 1 else None, 0)
            new = walks(best.seeds | {node.name: Layout.replicated(shape).replace(dim, Dim.of([text]))})
            best = min(best, new, key=lambda t: t.cost)
    return min((walks(best.seeds | cut(*where, first)) for first in FIRST), key=lambda t: t.cost).seeds


class _Walks:
    """What a cut would cost, counted for the first patch, the last, and one between them that stands for the rest."""

    def __init__(self, program: Program, sizes: Mapping[str, int], batch: Seeds) -> None:
        assert program.spec is not None
        self.program, self.sizes, self.batch = program, sizes, batch
        last = sizes[PATCH] - 1
        times = {0: 1, last: 1} | ({last // 2: last - 1} if last > 1 else {})
        here = position_of(0, program.spec)
        self._patches = [({**here, PATCH: patch}, n, Memo()) for patch, n in times.items()]
        self._whole = self._walk(batch, {**here, PATCH: EVERY}, Memo())

    def _walk(self, seeds: Seeds, position: Mapping[str, int], memo: Memo) -> Tally:
        return Walk(self.program, seeds, position, self.sizes, memo=memo).main().tally

    def __call__(self, seeds: Seeds) -> Tried:
        tallies = [(self._walk(joined(self.batch, seeds), at, memo), n) for at, n, memo in self._patches]
        flops = max(self._whole.flops, 1) / self.sizes[SEQUENCE]
        total = sum(t.flops * n for t, n in tallies) / flops
        largest = max(t.flops for t, _ in tallies) * self.sizes[PATCH] / flops
        kept = tallies[0][0].kept / max(self._whole.moved, 1)
        whole = sum(not any(d.axes >= {PATCH} for d in r.dims) for r in tallies[0][0].results)
        return Tried(total + largest + 0.1 * kept + whole, seeds, tallies[0][0])
