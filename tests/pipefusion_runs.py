"""What the workers of the pool run for PipeFusion: denoising loops, against the plain emulation in ``displaced.py``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import cases
import displaced
import torch
from emulation import difference
from torch import Tensor, nn

import xdit_compile
from xdit_compile.runtime.deferred.deferred_tensor import materialize


def loop(model: Any, entry: displaced.Displaced, inputs: dict[str, Any], steps: int) -> Tensor:
    """The sample after so many steps, as an unmodified pipeline would make it."""
    sample = inputs[entry.layout.sample]
    for i, time in enumerate(displaced.times(inputs, steps)):
        with torch.no_grad():
            out = model(**inputs | {entry.layout.sample: sample, "timestep": time, "return_dict": False})[0]
        sample = displaced.euler(sample, out, i)
    return sample


def flow_of(parallel: Any) -> Any:
    """What runs the one kind of call that a parallel model has seen."""
    (ready,) = parallel.runners["forward"].programs.values()
    return ready.executor


def cut_of(parallel: Any) -> dict[str, Any]:
    """How it cuts the sample, for the emulation: borders, and the dimension counted from the last."""
    (cut,) = flow_of(parallel).stage.samples.values()
    return {"offsets": list(cut.borders), "dim": cut.dim}


def emulation_of(parallel: Any, model: nn.Module, entry: displaced.Displaced, sample: Tensor,
                 warmup: int = 1) -> displaced.Emulation:
    """The method with the patches of a parallel model that was called."""
    cut = cut_of(parallel)
    return displaced.Emulation(model, entry.layout, offsets=cut["offsets"], dim=sample.ndim + cut["dim"], warmup=warmup)


def displaced_errors(name: str, batch: int, odd: bool, specs: list[str], steps: int = 8,
                     layers: int = 0) -> dict[str, Any]:
    """By spec, on its ranks: the sample; what stages are made of, sent and hold; on rank 0 also the largest difference
    of the sample to the emulation's over the largest value, and to that of one device.

    Args:
        layers: blocks (of the first kind) that the model is built with, if not its own number.
    """
    entry = displaced.MODELS[name]
    entry = entry.deep(layers) if layers else entry
    inputs, rank = entry.case.inputs(batch, odd), torch.distributed.get_rank()
    model, found = cases.made(entry.case), dict[str, Any]()
    cuts: dict[str, tuple[Any, ...]] = {}
    for text in specs:
        spec = xdit_compile.ShardingSpec.parse(text)
        if rank >= spec.world_size:
            continue
        parallel = xdit_compile.parallelize(copy.deepcopy(model), text, ranks=range(spec.world_size), timeout=100)
        sample = materialize(loop(parallel, entry, inputs, steps))
        flow, stage = flow_of(parallel), rank // spec.sequence_degree % spec.pipefusion_degree
        exact = spec.warmup_steps == "all" or spec.patches == 1
        cuts[text] = () if exact else (*cut_of(parallel).values(), int(spec.warmup_steps))
        counts = [len(b) for b in flow.stage.blocks]
        held = {n for n, p in parallel.named_parameters() if not p.is_meta}
        found[text] = {
            "sample": sample, "stage": stage, "blocks": flow.stage.blocks, "drained": flow.drained,
            "sent": flow.communicator.sent, "extra": sorted(held - allowed(model, counts, stage)),
            "whole": sorted(allowed(model, [sum(counts)], 0) - held)}
    if rank == 0:
        schedule = displaced.times(inputs, steps)
        one, _ = displaced.plain(model, inputs, entry.layout, schedule, displaced.euler)
        for text, cut in cuts.items():
            wanted, sample = one, found[text]["sample"]
            if cut:
                wanted, _ = displaced.denoise(model, inputs, entry.layout, schedule, displaced.euler, offsets=cut[0],
                                              dim=sample.ndim + cut[1], warmup=cut[2])
            counts = [len(b) for b in found[text]["blocks"]]
            found[text] |= {
                "error": difference(sample, wanted), "exact": difference(sample, one), "cut": cut,
                "all blocks": blocks(model),
                "wanted": traffic(model, entry, inputs, counts, steps)}
    return found


# --------------------------------------------------------------------------------------------------
# From a model's own modules and configuration


def blocks(model: nn.Module) -> list[str]:
    """The paths of its blocks, in the order in which they run."""
    lists = [(n, m) for n, m in model.named_children() if isinstance(m, nn.ModuleList) and "blocks" in n]
    return [f"{name}.{i}" for name, children in lists for i in range(len(children))]


def allowed(model: nn.Module, counts: Sequence[int], stage: int) -> set[str]:
    """Parameters that a stage may hold: those of its blocks and of none, each stage having so many blocks.

    DiT has no embedding of its own for its last layer, which takes that of the first block.
    """
    paths = blocks(model)
    mine = paths[sum(counts[:stage]) : sum(counts[: stage + 1])]
    others = tuple(f"{path}." for path in paths if path not in mine)
    return {n for n, _ in model.named_parameters()
            if not n.startswith(others) or n.startswith("transformer_blocks.0.norm1.emb.")}


def _used(model: Any, entry: displaced.Displaced) -> Iterator[tuple[int, int]]:
    """Blocks whose tokens a later block takes: the next one does, and those that a model's long skips lead to."""
    count = len(blocks(model))
    yield from ((i, i + 1) for i in range(count - 1))
    if "HunyuanDiT" in type(model).__name__:
        # The first blocks but one of a half, last in first out, to the last ones.
        yield from ((i, count - 1 - i) for i in range(count // 2 - 1))


def traffic(model: Any, entry: displaced.Displaced, inputs: dict[str, Any], counts: Sequence[int],
            steps: int) -> list[int]:
    """Bytes that the ranks of each stage send to later stages: once for each stage that needs it, the tokens of the
    sample, and of text that attends with them.
    """
    sample, layout = inputs[entry.layout.sample], entry.layout
    batch, tokens = len(sample), len(layout.tokens(sample[:1].expand_as(sample)))
    tokens += inputs[layout.text].shape[1] if layout.text else 0
    config = model.config
    row = config.num_attention_heads * config.attention_head_dim * 4
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    values = {(a, stage_of[b]) for a, b in _used(model, entry) if stage_of[a] != stage_of[b]}
    return [steps * sum(stage_of[a] == stage for a, _ in values) * batch * tokens * row for stage in range(len(counts))]
