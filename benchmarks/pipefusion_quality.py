"""What PipeFusion's older keys and values do to images: the table and pictures of docs/pipefusion.md.

The trained example (examples/shapes) draws the same images from the same noise on one device and on two stages, for
every number of warm-up steps and patches. Without an exact step at the start, which the package refuses, an emulation
on one device draws them. They are compared pixel by pixel, and by a classifier that is trained here
on drawn shapes: does an image still show the class that was asked for?

    python benchmarks/pipefusion_quality.py --output docs/pipefusion.md
    python benchmarks/pipefusion_quality.py --images 48 --steps 10 --warmups 1 2 --patches 4 --output /tmp/page.md
    python benchmarks/pipefusion_quality.py --quick --output /tmp/page.md
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import skimage
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from tqdm import tqdm

import xdit_compile

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.displaced_dit import displace
from examples.shapes.data import LABELS, draw_dataset

ROOT = Path(__file__).resolve().parents[1]

MODEL = ROOT / "examples" / "shapes" / "model"

EXACT = "warmup=all"

CAP = 120.0
"""Decibels that equal images count as, and closer ones than that."""

ENOUGH = 60.0
"""Decibels that exact runs must reach."""

SURE = 0.97
"""The accuracy on drawn images that the classifier must reach."""

QUICK = {"images": 2, "steps": 3, "drawn": 96, "epochs": 1, "warmups": [1], "patches": [2]}
FULL = {"images": 120, "steps": 20, "drawn": 7200, "epochs": 6, "warmups": [1, 2, 3, 4], "patches": [2, 4, 8]}


@dataclass(frozen=True)
class Likeness:
    """Images against those of one device: PSNR in dB, its mean and its lowest, and the mean SSIM."""

    psnr: float
    lowest: float
    ssim: float


@dataclass(frozen=True)
class Row:
    """Some images. ``accuracy``: the share that shows the class it should; ``same``: that the classifier sees what it
    sees in the image of one device. None where there is nothing to compare with."""

    name: str
    accuracy: float
    likeness: Likeness | None = None
    same: float | None = None


class Run(NamedTuple):
    """How images are made."""

    images: int
    steps: int
    guidance: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    classifier, held_out, decoded = trained(options.drawn, options.epochs)
    run = Run(options.images, options.steps, options.guidance)
    asked = [EXACT, *(_setting(w, p) for w in options.warmups for p in options.patches)]
    counts = (run.steps, 2 * run.steps)
    alone, finer = (drawn_by(None, run._replace(steps=n)) for n in tqdm(counts, "one device", unit="setting"))
    parallel = xdit_compile.launch(on_stages, asked, run, world_size=2)[0]
    least = _setting(min(options.warmups), max(options.patches))
    settings = [(min(options.warmups), max(options.patches)), *((0, p) for p in options.patches)]
    emulated = {_setting(*s): drawn_by(None, run, s) for s in tqdm(settings, "emulation", unit="setting")}
    agreement = likeness(emulated.pop(least), parallel[least])
    drawn = {EXACT: parallel.pop(EXACT)} | emulated | parallel

    labels = torch.arange(run.images) % len(LABELS)
    reference = classifier(alone)

    def row(name: str, images: np.ndarray) -> Row:
        seen = classifier(images)
        return Row(name, share(seen == labels), likeness(images, alone), share(seen == reference))

    rows = [
        Row("drawn by data.py", held_out),
        Row("the same, encoded and decoded", decoded),
        Row("one device", share(reference == labels)),
        row(f"one device, {2 * run.steps} steps", finer),
        *(row(name, images) for name, images in drawn.items()),
    ]
    colours = share(reference % COLOURS == labels % COLOURS)
    named = {"one device": alone} | drawn
    if options.output:
        pictures = options.output.with_suffix("")
        pictures.mkdir(parents=True, exist_ok=True)
        shown, apart = _shown(named), _apart(named)
        for file, content in (
            ("images", {name: named[name] for name in shown}),
            ("differences", {f"{name}, x{GAIN}, max {np.abs(named[name] - alone).max():.2f}":
                             differences(named[name], alone) for name in apart}),
        ):
            grid(content).save(pictures / f"{file}.png", optimize=True)
    text = page(rows, colours, agreement, run, options)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    return problems(rows, agreement, quick=options.quick)


def problems(rows: Sequence[Row], agreement: Likeness, quick: bool) -> int:
    """The exit status: 1 if what must be exact is not, or the classifier is no judge; says so."""
    found = [f"{r.name}: {r.likeness.lowest:.1f} dB, which should be exact" for r in rows
             if r.name == EXACT and r.likeness and r.likeness.lowest < ENOUGH]
    if agreement.lowest < ENOUGH:
        found.append(f"emulation and package differ: {agreement.lowest:.1f} dB")
    if rows[0].accuracy <= SURE and not quick:
        found.append(f"the classifier is right on {rows[0].accuracy:.1%} of drawn images, which should be {SURE:.0%}")
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


# Images

COLOURS = len({label.split()[0] for label in LABELS})
"""Labels are numbered by shape, and by colour within a shape."""


def drawn_by(spec: str | None, run: Run, displaced: tuple[int, int] | None = None) -> np.ndarray:
    """Images (n, height, width, 3) in 0..1: the classes in turn, each image from the noise of its number.

    Args:
        displaced: the warm-up and the patches to emulate on this device.
    """
    pipe = DiTPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    if spec:
        pipe = xdit_compile.parallelize(pipe, spec)
    if displaced:
        displace(pipe.transformer, warmup=displaced[0], patches=displaced[1])
    return pipe(
        class_labels=[i % len(LABELS) for i in range(run.images)],
        guidance_scale=run.guidance,
        num_inference_steps=run.steps,
        generator=[torch.Generator().manual_seed(i) for i in range(run.images)],
        output_type="np",
    ).images


def on_stages(asked: Sequence[str], run: Run) -> dict[str, np.ndarray]:
    """By setting, the images, on this rank of those that run this."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    made = {}
    with tqdm(asked, unit="setting", disable=dist.get_rank() != 0) as bar:
        for setting in bar:
            bar.set_description(setting)
            made[setting] = drawn_by(f"pipefusion=2,{setting}", run)
    return made


# Measures


def likeness(images: np.ndarray, reference: np.ndarray) -> Likeness:
    """How alike images (n, height, width, 3) in 0..1 are to others."""
    pairs = list(zip(images, reference, strict=True))
    with np.errstate(divide="ignore"):  # of equal images
        psnr = [min(float(peak_signal_noise_ratio(b, a, data_range=1.0)), CAP) for a, b in pairs]
    ssim = [float(structural_similarity(b, a, data_range=1.0, channel_axis=2)) for a, b in pairs]
    return Likeness(float(np.mean(psnr)), min(psnr), float(np.mean(ssim)))


def share(right: Tensor) -> float:
    return right.double().mean().item()


class Classifier(nn.Module):
    """A small network from images (n, height, width, 3) to the numbers of their classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(128 * 4 * 4, len(LABELS)))

    def scores(self, images: Tensor) -> Tensor:
        """Of images (n, 3, height, width) in -1..1."""
        return self.layers(images)

    @torch.no_grad()
    def forward(self, images: np.ndarray) -> Tensor:
        self.eval()
        return torch.cat([self.scores(part).argmax(1) for part in _pixels(images).split(240)])


def _pixels(images: np.ndarray) -> Tensor:
    """Images (n, height, width, 3) in 0..1, or of whole numbers up to 255, as networks take them: channels first, in
    -1..1."""
    largest = 255 if images.dtype == np.uint8 else 1
    return torch.from_numpy(images).permute(0, 3, 1, 2) * (2 / largest) - 1


def trained(count: int, epochs: int) -> tuple[Classifier, float, float]:
    """A classifier taught with so many drawn images, and its accuracy on a quarter as many others: as they are, and
    encoded and decoded by the example's autoencoder."""
    torch.manual_seed(0)
    drawn, labels = draw_dataset(count, seed=1000)
    images, wanted = _pixels(drawn), torch.from_numpy(labels)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batch = 48
    steps = epochs * (count // batch)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    with tqdm(total=steps, desc="classifier", unit="step") as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(count)[: count // batch * batch].split(batch):
                loss = F.cross_entropy(model.scores(images[chosen]), wanted[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                pace.step()
                bar.update()
    others, labels = draw_dataset(max(count // 4, len(LABELS)), seed=1001)
    wanted = torch.from_numpy(labels)
    return model, share(model(others) == wanted), share(model(_decoded(others)) == wanted)


@torch.no_grad()
def _decoded(images: np.ndarray) -> np.ndarray:
    """Images as the example's autoencoder can show them at best."""
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae")
    out = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in _pixels(images).split(48)]
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


# Pictures

GAIN = 4
"""How many times the differences are amplified."""

COLUMNS = 8


def differences(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.clip(GAIN * np.abs(images - reference), 0, 1)


def grid(rows: dict[str, np.ndarray], side: int = 80) -> Image.Image:
    """One picture: named rows of the same few of all images."""
    count = min(len(next(iter(rows.values()))), len(LABELS))
    chosen = range(0, count, math.ceil(count / COLUMNS))
    left, top, gap = 96, 20, 4
    sheet = Image.new("RGB", (left + len(chosen) * (side + gap), top + len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, index in enumerate(chosen):
        middle = left + column * (side + gap) + side / 2
        pen.text((middle, top / 2), LABELS[index], fill="black", font=font, anchor="mm")
    for line, (name, images) in enumerate(rows.items()):
        y = top + line * (side + gap)
        pen.multiline_text((4, y + side / 2), name.replace(", ", "\n"), fill="black", font=font, anchor="lm")
        for column, index in enumerate(chosen):
            tile = Image.fromarray((images[index] * 255).round().astype("uint8"))
            sheet.paste(tile.resize((side, side), Image.Resampling.LANCZOS), (left + column * (side + gap), y))
    return sheet


def _shown(named: dict[str, np.ndarray]) -> list[str]:
    """Rows of the picture: one device, and the extremes and the middle of what patches do."""
    settings = [name for name in named if name not in ("one device", EXACT)]
    first = next(name for name in settings if not _refused(name)).partition(",")[0]
    last = settings[-1].partition(",")[2]
    return ["one device", *(n for n in settings if n.startswith(first + ",") or n.endswith(last))]


def _apart(named: dict[str, np.ndarray]) -> list[str]:
    """Two settings: most patches with the least warm-up and with the most."""
    settings = [name for name in named if name not in ("one device", EXACT) and not _refused(name)]
    most = [name for name in settings if name.endswith(settings[-1].partition(",")[2])]
    return [*dict.fromkeys((most[0], most[-1]))]


# The page


def page(rows: Sequence[Row], colours: float, agreement: Likeness, run: Run, options: argparse.Namespace) -> str:
    """The whole document."""
    versions = f"torch {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}"
    alone = next(row for row in rows if row.name == "one device")
    error = math.sqrt(alone.accuracy * (1 - alone.accuracy) / run.images)
    found = [row.accuracy for row in rows if "patches" in row.name and not _refused(row.name)]
    pictures = options.output.stem if options.output else "pipefusion"
    least = _setting(min(options.warmups), max(options.patches))
    folder = f"![{{}}]({pictures}/{{}}.png)"
    return f"""\
# PipeFusion: what it does to images

Made by `{_command(options)}` ({versions}, scikit-image {skimage.__version__}; CPU, fp32).

With PipeFusion, patches of the image follow each other through the stages, and attend to keys and values of the step
before where those of this step have not come yet. That changes images. Here the trained example
([examples/shapes](../examples/shapes)) draws {run.images} images with `pipefusion=2` and on one device, from the same
noise: seeds 0 to {run.images - 1}, its {len(LABELS)} classes in turn, {run.steps} steps of its own scheduler (DDIM,
cosine schedule, v-prediction), guidance {run.guidance:g}. The result does not depend on the number of stages, only on
patches and warm-up.

- *warmup*: steps at the start that are exact. `{EXACT}` makes all steps exact, and is the check of this page. The
  package refuses `warmup=0`: before the first step there are no keys and values of the other patches. The lines with it
  are of an emulation on one device (`benchmarks/displaced_dit.py`) in which a patch of the first step attends to those
  before it alone. Its images with `{least}` have {agreement.lowest:.1f} dB or more against the package's.
- *patches*: of an image's 8 rows of 8 tokens; `patches=8` is one row each, and the most there can be. With P of
  them, (P-1)/2P of the keys and values that a query reads are a step old: 25% of 2, 37.5% of 4, 43.75% of 8.
- *PSNR*: against the image of one device, the mean over images, and the *lowest*. {CAP:g} dB stands for equal. *SSIM*:
  of scikit-image, window 7.
- *accuracy*: the share of images in which a classifier sees the class (colour and shape) that was asked for. It was
  trained on {options.drawn} images by `data.py`, and has not seen those of the first line. The second line is those
  through the example's autoencoder, the best that the example could do.
- *same class*: the share in which it sees what it sees in the image of one device, be that right or wrong.

| images | PSNR, dB | lowest | SSIM | accuracy | same class |
|---|---:|---:|---:|---:|---:|
{chr(10).join(map(_line, rows))}

The example is trained briefly: on one device {alone.accuracy:.0%} of its images are recognised, {colours:.0%} have
the right colour. With patches {min(found):.0%} to {max(found):.0%} are recognised; the standard error of an accuracy is
about {error:.1%}. What tells settings apart is *same class* and the likeness. The line with {2 * run.steps} steps shows
how far images move when the scheduler takes twice as many.

{folder.format("images by setting", "images")}

Differences to one device, {GAIN} times amplified:

{folder.format("differences by setting", "differences")}
"""


def _line(row: Row) -> str:
    found = row.likeness
    cells = [
        f"`{row.name}`" if "warmup" in row.name else row.name,
        *((f"{found.psnr:.1f}", f"{found.lowest:.1f}", f"{found.ssim:.4f}") if found else ("", "", "")),
        f"{row.accuracy:.1%}",
        "" if row.same is None else f"{row.same:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def _setting(warmup: int, patches: int) -> str:
    return f"warmup={warmup}, patches={patches}"


def _refused(name: str) -> bool:
    return name.startswith("warmup=0,")


def _command(options: argparse.Namespace) -> str:
    """How to make this page again."""
    words = ["python", "benchmarks/pipefusion_quality.py"]
    words += ["--quick"] if options.quick else []
    for name, default in ({"guidance": 4.0} | (QUICK if options.quick else FULL)).items():
        value = getattr(options, name)
        if value != default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [f"{value:g}"])]
    if options.output:
        words += ["--output", os.path.relpath(options.output, ROOT)]
    return shlex.join(words)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/pipefusion_quality.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--images", **number, help="how many, the classes in turn (120)")
    parser.add_argument("--steps", **number, help="denoising steps (20)")
    parser.add_argument("--guidance", type=float, default=4.0, metavar="X", help="guidance scale (4)")
    parser.add_argument("--warmups", nargs="+", **number, help="numbers of exact steps (1 2 3 4)")
    parser.add_argument("--patches", nargs="+", **number, help="numbers of patches, up to 8 (2 4 8)")
    parser.add_argument("--drawn", **number, help="drawn images that teach the classifier (7200)")
    parser.add_argument("--epochs", **number, help="how often it sees them (6)")
    parser.add_argument("--quick", action="store_true", help="tiny numbers: does it run at all")
    parser.add_argument("--output", type=Path, metavar="PATH",
                        help="write the page there and its pictures into a folder beside it, instead of printing it")
    options = parser.parse_args(arguments)
    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


if __name__ == "__main__":
    sys.exit(main())
