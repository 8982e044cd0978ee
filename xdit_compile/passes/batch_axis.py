"""Which dimensions of the arguments are the batch, found by trying, as ``token_axis.py`` finds the tokens."""

from __future__ import annotations

from collections.abc import Mapping

from xdit_compile.errors import SpecError
from xdit_compile.ir.layout import BATCH, Dim, Layout
from xdit_compile.ir.program import Program
from xdit_compile.passes.interpreter import Seeds
from xdit_compile.passes.shard import CostEstimator

WORTH = 0.9
"""A cut of the batch must lower a rank's operations below this share of all of them."""


def batch_seeds(program: Program, sizes: Mapping[str, int]) -> Seeds:
    """The arguments, cut along their first dimension where that holds the samples of the batch.

    Arguments of first sizes ``n``, ``2 n``, ... go together: frames are often folded into the batch.

    Raises:
        SpecError: when no cut saves work, as with a batch of one.
    """
    parts = sizes[BATCH]
    if parts == 1:
        return {}
    holders = program.main.graph.find_nodes(op="placeholder")
    shapes = {n.name: tuple(n.meta["val"].shape) for n, what in zip(holders, program.inputs, strict=True)
              if what.kind == "argument" and n.meta["val"].ndim}
    estimate = CostEstimator(program, sizes)
    options = [{name: Layout.replicated(shape).replace(0, Dim.even(shape[0], parts, BATCH))
                for name, shape in shapes.items() if shape[0] and shape[0] % size == 0}
               for size in sorted({shape[0] for shape in shapes.values()}) if size >= parts]
    flops, best = min(((estimate(o).flops, i) for i, o in enumerate(options)), default=(0, -1))
    if best < 0 or flops > WORTH * estimate({}).flops:
        found = ", ".join(map(str, sorted({shape[0] for shape in shapes.values()})))
        raise SpecError(f"{program.spec} shares the samples of a batch among {parts} groups of ranks, but no first "
                        f"dimension of the arguments (sizes {found}) can be cut so that each has less to do; call the "
                        "model with a larger batch, or without cfg and data")
    return _needed(estimate, options[best])


def _needed(estimate: CostEstimator, seeds: Seeds) -> Seeds:
    """Without arguments whose cut serves nothing: channels, say, of which there are as many as there are samples."""
    for shape in sorted({layout.shape for layout in seeds.values()}):
        fewer = {name: layout for name, layout in seeds.items() if layout.shape != shape}
        now, then = estimate(seeds), estimate(fewer)
        if then.flops <= now.flops and then.sent < now.sent:
            seeds = fewer
    return seeds


def lost_factor(program: Program, sizes: Mapping[str, int], batch: Seeds, seeds: Seeds) -> str:
    """In words, what the spec shares out to no avail: the batch beside the tokens, or the tokens beside the batch;
    empty where both lower a rank's work, or only one is asked for."""
    tokens = {name: Layout(tuple(d.gathered(BATCH) for d in layout.dims)) for name, layout in seeds.items()
              if layout != batch.get(name)}
    if not batch or not tokens:
        return ""
    estimate = CostEstimator(program, sizes)
    both = estimate(seeds).flops
    for alone, what in ((tokens, "the batch (cfg, data)"), (batch, "the tokens (ulysses, ring)")):
        if both > WORTH * estimate(alone).flops:
            return (f"{what} is shared out to no avail: where a model makes one dimension of batch and tokens, "
                    "not both can be cut; use all ranks for one of them")
    return ""


def merge_seeds(base: Seeds, seeds: Seeds) -> Seeds:
    """Both; of a value that is in both, each dimension as the one says that cuts it."""
    both = {name: Layout(tuple(new if new.sharded else old for old, new in zip(
        base[name].dims, seeds[name].dims, strict=True))) for name in base.keys() & seeds.keys()}
    return {**base, **seeds, **both}
