"""What ranks do under ``displaced=yes``: denoising loops, against the emulation."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

import displaced
import displaced_sequence
import torch
from cases import made, randn
from emulation import difference
from torch import Tensor

import xdit_compile

STEPS = 5


def shares_of(notes: Any, world: int) -> list[dict[int, Tensor]]:
    """What notes say of sequences: by their length, which tokens each rank has, those among them that all have."""
    found: list[dict[int, Tensor]] = [{} for _ in range(world)]
    for note in notes:
        if note.kind != "stale":
            continue
        dim, shape = re.match(r"dimension (\d+) of \[(.*)\] is read", note.text).groups()
        segments = re.split(r", (?![^(]*\))", shape)[int(dim)].split(" + ")
        masks: list[list[bool]] = [[] for _ in range(world)]
        for segment in segments:
            size, cut, parts = segment.partition("/")
            counts = [int(n) for n in parts.strip("()").split(",")] if cut and "(" in parts else [
                int(size) // world] * world if cut else []
            ends = [0, *accumulate(counts)]
            for rank, mask in enumerate(masks):
                mask += [not cut or ends[rank] <= i < ends[rank + 1] for i in range(int(size))]
        for rank, mask in enumerate(masks):
            found[rank][len(mask)] = torch.tensor(mask)
    return found


def errors(name: str, specs: list[str]) -> dict[str, Any]:
    """By spec, the largest difference of a loop's outputs to the emulation's, and to those of one device."""
    entry = displaced.MODELS[name]
    model, inputs = made(entry.case), entry.case.inputs(2, False)
    layout, found = entry.layout, dict[str, Any]()
    times = displaced.times(inputs, STEPS)
    samples = [inputs[layout.sample] * (1 - 0.1 * i) + 0.2 * i * randn(50 + i, *inputs[layout.sample].shape)
               for i in range(STEPS)]
    calls = [inputs | {layout.sample: s, "timestep": t, "return_dict": False} for s, t in zip(samples, times,
                                                                                               strict=True)]
    for spec in specs:
        parsed = xdit_compile.ShardingSpec.parse(spec)
        if torch.distributed.get_rank() >= parsed.world_size:
            continue
        parallel = xdit_compile.parallelize(model, spec, ranks=range(parsed.world_size), timeout=100)
        with torch.no_grad():
            for _ in range(2):  # nothing of one loop is met by the next
                before = parallel.runners["forward"].group.counts.copy()
                actual = [parallel(**c)[0] for c in calls]
        (ready,) = parallel.runners["forward"].programs.values()
        shares = shares_of(ready.compiled.local.notes, parsed.sequence_degree)
        image = _tokens(layout, inputs)
        for own in shares:
            # Where text stands in one sequence with the sample's tokens.
            if image not in own:
                joint = next(m for n, m in own.items() if n > image)
                own[image] = joint[-image:] if layout.text_first else joint[:image]
        emulation = displaced_sequence.Emulation(model, layout, shares, image)
        expected = [emulation(**c) for c in calls]
        with torch.no_grad():
            exact = [displaced.result(model, c) for c in calls]
        counts = parallel.runners["forward"].group.counts - before
        sent = torch._C._distributed_c10d._get_work_registry_size()
        parallel.runners["forward"].loops.end()
        found[spec] = {"unread": (sent, torch._C._distributed_c10d._get_work_registry_size()),
                       "errors": list(map(difference, actual, expected)), "exact": list(map(difference, actual, exact)),
                       "counts": (counts["displaced"], counts["paced"]), "actual": actual[-1]}
    return found


def unet_errors(spec: str) -> dict[str, Any]:
    """The same of a UNet, whose pictures are cut along their height: convolutions, group norms and attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", cross_attention_dim=24, attention_head_dim=8, norm_num_groups=4,
    ).eval().requires_grad_(False)  # fmt: skip
    world = xdit_compile.ShardingSpec.parse(spec).world_size
    calls = [{"sample": randn(10 + i, 2, 4, 16, 16) * (1 + 0.3 * i) + i, "timestep": torch.tensor(900 - 150 * i),
              "encoder_hidden_states": randn(3, 2, 5, 24), "return_dict": False} for i in range(STEPS)]
    parallel = xdit_compile.parallelize(model, spec, ranks=range(world), timeout=100)
    with torch.no_grad():
        actual = [parallel(**c)[0] for c in calls]
        exact = [model(**c)[0] for c in calls]
    heights = (16, 8)
    shares = [{h * h: torch.arange(h * h) // (h * h // world) == r for h in heights} for r in range(world)]
    rows = [{h: (h // world * r, h // world * (r + 1)) for h in heights} for r in range(world)]
    layout = displaced.Layout("sample", 2, (0, 0, 1, 1))
    emulation = displaced_sequence.Emulation(model, layout, shares, 256, rows)
    expected = [emulation(**c) for c in calls]
    (ready,) = parallel.runners["forward"].programs.values()
    late = ready.compiled.step.late[0]
    return {"errors": list(map(difference, actual, expected)), "exact": list(map(difference, actual, exact)),
            "kept": late.for_next_step, "seeds": str(ready.compiled.seeds)}


def _tokens(layout: displaced.Layout, inputs: dict[str, Any]) -> int:
    """Of the sample."""
    count = 1
    for size, patch in zip(inputs[layout.sample].shape, layout.patch, strict=True):
        count *= size // patch if patch else 1
    return count
