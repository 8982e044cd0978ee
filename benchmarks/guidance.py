"""How many times as fast is a pipeline with classifier-free guidance on two processes, under cfg=2?

Both kinds of guidance: a pipeline that calls its model once with a batch of both conditions (Stable Diffusion 3), and
one that calls it twice (Wan). Random mid-size models, the same on all ranks; one thread per process; whole calls of
the unmodified pipelines, in turns: alone on one process while the other waits without using its core, then on both.

    python benchmarks/guidance.py
    python benchmarks/guidance.py --rounds 9 --steps 4 --spec cfg=2 --json guidance.json
    python benchmarks/guidance.py --patience 600  # on a machine that has other work now and then

"Times as fast" is the ratio of medians, "in pairs" the median of the ratios within each round, "by CPU" the ratio of
CPU seconds per process. Bytes are what one rank sends for results in one step of denoising; the digests by which ranks
agree on each call are counted apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from timing import DISTURBED, time_undisturbed
from tqdm import trange
from traffic import counting

from xdit_compile import ShardingSpec, launch, parallelize

Pair = tuple[Any, dict[str, Any]]
"""A pipeline, and the arguments of its call but for the number of steps."""


def batched() -> Pair:
    """Stable Diffusion 3: one call per step, of a batch of two. 1,024 image tokens, 8 blocks, hidden 512."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    model = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=4, num_layers=8, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=256, caption_projection_dim=512, pooled_projection_dim=256, out_channels=4,
        pos_embed_max_size=64)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4, 4, 8, 8), norm_num_groups=2,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, None, None)
    text, pooled = torch.randn(2, 1, 77, 256), torch.randn(2, 1, 256)
    return pipe, {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "pooled_prompt_embeds": pooled[0],
                  "negative_pooled_prompt_embeds": pooled[1], "height": 512, "width": 512, "guidance_scale": 5.0}


def twice() -> Pair:
    """Wan: two calls per step. 1,280 video tokens (5 latent frames of 16x16), 10 blocks, hidden 512."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=256, freq_dim=64, ffn_dim=2048, num_layers=10)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), model)
    text = torch.randn(2, 1, 77, 256)
    return pipe, {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "height": 256, "width": 256,
                  "num_frames": 17, "guidance_scale": 5.0}


KINDS: dict[str, Callable[[], Pair]] = {"batched": batched, "twice": twice}


def run(kind: str, spec: str, rounds: int, steps: int, patience: int) -> dict[str, Any]:
    """What one rank saw of one kind of guidance."""
    torch.manual_seed(0)
    alone, call = KINDS[kind]()
    call |= {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    pipe = parallelize(alone, spec)
    for which in (alone, pipe):
        which.set_progress_bar_config(disable=True)

    def work(which: Any) -> torch.Tensor:
        return which(**call, generator=torch.Generator().manual_seed(0))[0]

    expected, actual = work(alone), work(pipe)
    with counting() as traffic:
        work(pipe)
    first = dist.get_rank() == 0
    taken: dict[str, list[dict[str, float]]] = {"alone": [], "parallel": []}
    for _ in trange(rounds, desc=kind, disable=not first):
        taken["alone"].append(time_undisturbed((lambda: work(alone)) if first else None, patience)._asdict())
        taken["parallel"].append(time_undisturbed(lambda: work(pipe), patience)._asdict())
    return {"taken": taken, "difference": ((actual - expected).abs().max() / expected.abs().max()).item(),
            "bytes": sum(traffic.bytes.values()) / steps, "collectives": sum(traffic.collectives.values()) / steps,
            "control": traffic.control / steps}


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' figures as one."""
    alone, parallel = ranks[0]["taken"]["alone"], ranks[0]["taken"]["parallel"]

    def median(taken: list[dict[str, float]], of: str) -> float:
        return statistics.median(t[of] for t in taken)

    return {
        "seconds_alone": median(alone, "seconds"), "seconds": median(parallel, "seconds"),
        "times_as_fast": median(alone, "seconds") / median(parallel, "seconds"),
        "in_pairs": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(alone, parallel, strict=True)),
        "by_cpu": len(ranks) * median(alone, "cpu_seconds") / median(parallel, "cpu_seconds"),
        "others": statistics.fmean(t["others"] for t in alone + parallel),
        "difference": max(r["difference"] for r in ranks), "bytes_per_step": max(r["bytes"] for r in ranks),
        "collectives_per_step": max(r["collectives"] for r in ranks),
        "control_bytes_per_step": max(r["control"] for r in ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--spec", default="cfg=2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of denoising in one call")
    parser.add_argument("--patience", type=int, default=0, metavar="S", help="wait so long for a quiet machine")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    world = ShardingSpec.parse(options.spec).world_size
    figures = {kind: summary(launch(run, kind, options.spec, options.rounds, options.steps, options.patience,
                                    world_size=world, device="cpu", threads=1)) for kind in options.kinds}
    columns = ("guidance", "seconds alone", "seconds", "times as fast", "in pairs", "by CPU", "max difference",
               "collectives a step", "kB sent per rank a step", "digests, B a step")
    table = Table(*columns, title=f"{options.spec}, {options.steps} steps, {world} processes of one thread")
    for kind, f in figures.items():
        table.add_row(kind, f"{f['seconds_alone']:.2f}", f"{f['seconds']:.2f}", f"{f['times_as_fast']:.2f}",
                      f"{f['in_pairs']:.2f}", f"{f['by_cpu']:.2f}", f"{f['difference']:.1e}",
                      f"{f['collectives_per_step']:g}", f"{f['bytes_per_step'] / 1e3:.1f}",
                      f"{f['control_bytes_per_step']:.0f}")
    console = Console()
    console.print(table)
    if any(f["others"] > DISTURBED for f in figures.values()):
        console.print("[bold yellow]other processes used this machine meanwhile: the seconds say little")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
