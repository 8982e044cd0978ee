"""What each way of doing less does to images, and what it saves: the table, pictures and plot of docs/quality.md.

The trained example (examples/shapes) draws the same images from the same noise on one device, and with step caches,
displaced sequences, low-bit wires and PipeFusion's patches at several strengths. They are compared pixel by pixel, and
by a classifier that is trained here on drawn shapes (as in pipefusion_quality.py). What is saved is counted, not timed:
operations of a rank, and the bytes that a step has to wait for.

    python benchmarks/quality.py --output docs/quality.md
    python benchmarks/quality.py --quick --output /tmp/page.md
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiTPipeline
from tqdm import tqdm

import xdit_compile

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.pipefusion_quality import (
    MODEL,
    ROOT,
    Likeness,
    Run,
    differences,
    drawn_by,
    grid,
    likeness,
    share,
    trained,
)
from examples.shapes.data import LABELS
from xdit_compile.report.operations import program_flops
from xdit_compile.report.traffic import collectives
from xdit_compile.spec import ShardingSpec

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXACT = "ulysses=2"
METHODS: dict[str, tuple[str, ...]] = {
    "first_block": tuple(f"ulysses=2,cache=first_block,threshold={t:g}" for t in (0.1, 0.15, 0.2, 0.3)),
    "teacache": tuple(f"ulysses=2,cache=teacache,threshold={t:g}" for t in (0.1, 0.2, 0.35, 0.5)),
    "interval": tuple(f"ulysses=2,cache=interval,every={n}" for n in (2, 3, 4)),
    "taylor": tuple(f"ulysses=2,cache=taylor,every={n}" for n in (2, 3, 4)),
    "displaced": tuple(f"ulysses=2,displaced=yes,warmup={n}" for n in (1, 2, 4)),
    "wire": ("ulysses=2,wire=int8", "ulysses=2,wire=int8,wire_keys=whole", "ulysses=2,wire=fp8",
             "ulysses=2,wire=fp8,wire_keys=whole", "ulysses=2,wire=fp8,wire_keys=fp8"),
    "pipefusion": ("pipefusion=2,patches=2", "pipefusion=2,patches=8", "pipefusion=2,patches=8,warmup=4"),
}
QUICK = {"images": 2, "steps": 4, "drawn": 96, "epochs": 1}
FULL = {"images": 48, "steps": 20, "drawn": 7200, "epochs": 6}


@dataclass(frozen=True)
class Saved:
    """What rank 0 did for all images: operations, and bytes it sent and waited for in the same step; skipped: steps
    that left blocks out, of ``steps``."""

    flops: float
    waited: float
    skipped: int
    steps: int


@dataclass(frozen=True)
class Row:
    """Images of one setting against those of one device, and what it saved."""

    method: str
    spec: str
    likeness: Likeness
    same: float
    work: float
    bytes: float
    skipped: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    run = Run(options.images, options.steps, 4.0)
    classifier, _, _ = trained(options.drawn, options.epochs)
    methods = {m: s[:1] for m, s in METHODS.items()} if options.quick else METHODS
    alone = drawn_by(None, run)
    found = xdit_compile.launch(on_ranks, [EXACT, *(s for specs in methods.values() for s in specs)], run,
                                world_size=2)[0]
    reference = classifier(alone)
    exact = found.pop(EXACT)
    rows = []
    for method, specs in methods.items():
        for spec in specs:
            images, saved = found[spec]
            rows.append(Row(method, spec, likeness(images, alone), share(classifier(images) == reference),
                            saved.flops / exact[1].flops, saved.waited / exact[1].waited, saved.skipped))
    agreement = likeness(exact[0], alone)
    accuracy = share(reference == torch.arange(run.images) % len(LABELS))
    folder = options.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    strongest = {specs[-1]: found[specs[-1]][0] for specs in methods.values()}
    named = {s.removeprefix("ulysses=2,").replace(",", ", "): x for s, x in strongest.items()}
    grid({"one device": alone} | named).save(folder / "images.png", optimize=True)
    grid({n: differences(x, alone) for n, x in named.items()}).save(folder / "differences.png", optimize=True)
    frontier(rows, folder / "frontier.svg")
    options.output.write_text(page(rows, agreement, accuracy, run, options))
    if agreement.lowest < 60:
        print(f"exact runs differ: {agreement.lowest:.1f} dB", file=sys.stderr)
        return 1
    return 0


def on_ranks(specs: Sequence[str], run: Run) -> dict[str, tuple[np.ndarray, Saved]]:
    """By spec, the images and what was saved, on this rank of those that run this."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    made = {}
    with tqdm(specs, unit="setting", disable=dist.get_rank() != 0) as bar:
        for spec in bar:
            bar.set_description(spec)
            pipe = xdit_compile.parallelize(DiTPipeline.from_pretrained(MODEL), spec)
            pipe.set_progress_bar_config(disable=True)
            images = pipe(class_labels=[i % len(LABELS) for i in range(run.images)], guidance_scale=run.guidance,
                          num_inference_steps=run.steps, output_type="np",
                          generator=[torch.Generator().manual_seed(i) for i in range(run.images)]).images
            made[spec] = images, saved_by(pipe, run.steps)
    return made


def saved_by(pipe: Any, steps: int) -> Saved:
    """Counted from the programs that ran, and how often they did."""
    (ready,) = pipe.transformer.runners["forward"].programs.values()
    counts, compiled = pipe.parallel_group.counts, ready.compiled
    step = compiled.step
    if ready.group.spec.pipefusion_degree > 1:
        return Saved(float("nan"), float("nan"), 0, steps)
    if step is None:
        return Saved(steps * program_flops(compiled.body), steps * _sent(compiled.body), 0, steps)
    if counts["paced"]:
        exact, late = step.exact[0], step.late[0]
        warm = counts["paced"] - counts["displaced"]
        # What a later step reads is waited for by nobody: of late steps, what is not left for the next.
        return Saved(warm * program_flops(exact) + counts["displaced"] * program_flops(late),
                     warm * _sent(exact) + counts["displaced"] * _sent(late, waited=True), 0, steps)
    whole = counts["decided"] - counts["skipped"]
    parts = [(step.head[0], counts["decided"]), (step.blocks[0], whole), (step.rest[0], counts["decided"])]
    return Saved(sum(n * program_flops(p) for p, n in parts), sum(n * _sent(p) for p, n in parts), counts["skipped"],
                 counts["decided"])


def _sent(program: Any, waited: bool = False) -> int:
    """Bytes that leave this rank in one run of a program; ``waited``: without what the next step reads."""
    left = set()
    if waited:
        from xdit_compile.ir.program import crosses_steps

        left = {(name, node.name) for name, module in program.functions() for node in module.graph.nodes
                if crosses_steps(node)}
    return sum(c.sent for c in collectives(program) if (c.function, c.node) not in left)


def frontier(rows: Sequence[Row], path: Path) -> None:
    """Likeness against what is left of the work, and of the bytes that are waited for."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, what, label in ((axes[0], "work", "operations of a rank, of those of ulysses=2"),
                              (axes[1], "bytes", "bytes that a step waits for, of those of ulysses=2")):
        for method in dict.fromkeys(r.method for r in rows):
            points = sorted((getattr(r, what), r.likeness.psnr) for r in rows if r.method == method)
            if all(np.isfinite(x) for x, _ in points):
                axis.plot(*zip(*points, strict=True), "o-", label=method)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR to one device, dB")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def page(rows: Sequence[Row], agreement: Likeness, accuracy: float, run: Run, options: argparse.Namespace) -> str:
    """The whole document."""
    lines = [f"| `{r.spec}` | {_share(r.work)} | {_share(r.bytes)} | {r.skipped or ''} | {r.likeness.psnr:.1f} | "
             f"{r.likeness.lowest:.1f} | {r.likeness.ssim:.4f} | {r.same:.1%} |" for r in rows]
    name = options.output.stem
    versions = f"torch {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}"
    return f"""\
# Less by choice: what it saves, and what it does to images

Made by `{_command(options)}` ({versions}; CPU, fp32).

Step caches, displaced sequences, low-bit wires and PipeFusion change results, each only where the spec asks for it. The
trained example ([examples/shapes](../examples/shapes)) draws {run.images} images with each and on one device, from the
same noise, its {len(LABELS)} classes in turn, in {run.steps} steps with guidance {run.guidance:g}. `{EXACT}` alone is
exact: {agreement.lowest:.1f} dB or more (120 stands for equal). With your own model,
`xdit-compile verify model.py:example --spec SPEC --approximate` says how far a loop ends from one device's.

- *operations*: of a rank over all steps, against `{EXACT}`. *bytes*: sent, and waited for by the step that sent them,
  against `{EXACT}`; what travels while the next step runs is not. Both are counted from the programs that ran.
- *left out*: steps, of {run.steps}, that left blocks out.
- *PSNR* in dB against one device, mean and *lowest*; *SSIM* of scikit-image; *same class*: the share in which a
  classifier sees what it sees in the image of one device. It is right in {accuracy:.0%} of these.

| spec | operations | bytes | left out | PSNR | lowest | SSIM | same class |
|---|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

![frontier]({name}/frontier.svg)

The strongest setting of each method:

![images]({name}/images.png)

Differences to one device, 4 times amplified:

![differences]({name}/differences.png)

The example has six blocks, of which `first_block` computes one at each step; how much a large model bears is to be
measured on that model. PipeFusion's own page is [pipefusion.md](pipefusion.md).

`pytest tests/test_step_cache.py --whole -k zoo` runs the first-block cache on 75 models of the test zoo, on two ranks
in lock-step: with all blocks computed their numbers are those of one device, and a step that is repeated leaves blocks
out on both ranks. Models without two blocks that add to one stream, or without a time, are refused by name; the test
lists them. What displaced sequences and low-bit wires gain on slow links is in
[performance.md](performance.md).
"""


def _share(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.2f}"


def _command(options: argparse.Namespace) -> str:
    words = ["python", "benchmarks/quality.py", *(["--quick"] if options.quick else [])]
    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) != default:
            words += [f"--{name}", str(getattr(options, name))]
    return shlex.join([*words, "--output", os.path.relpath(options.output, ROOT)])


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/quality.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("images", "how many, the classes in turn (48)"), ("steps", "denoising steps (20)"),
                       ("drawn", "drawn images that teach the classifier (7200)"), ("epochs", "how often (6)")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--quick", action="store_true", help="tiny numbers: does it run at all")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the page, its pictures beside it")
    options = parser.parse_args(arguments)
    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


if __name__ == "__main__":
    assert ShardingSpec.parse(EXACT).world_size == 2
    sys.exit(main())
