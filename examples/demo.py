"""The demo: the same images on one process and on two, with their difference.

A small class-conditional DiT, trained by ``examples/shapes/train.py`` and kept beside it, draws coloured shapes. It
runs as it is on one process, then on two with ``ulysses=2``, with ``ring=2`` and with ``cfg=2``, by one call that
makes the pipeline parallel. Pictures go to ``demo-output/``.

    python examples/demo.py
    python examples/demo.py --labels "red star" "blue ring" --steps 30 --output /tmp/pictures
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

import xdit_compile

MODEL = Path(__file__).parent / "shapes" / "model"
SPECS = ("ulysses=2", "ring=2", "cfg=2")


def load(device: torch.device) -> Any:
    """The trained pipeline, in fp32."""
    from diffusers import DiTPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return DiTPipeline.from_pretrained(MODEL).to(device)


def draw(spec: str | None, labels: list[str], steps: int, guidance: float, seed: int) -> tuple[np.ndarray, float]:
    """Images (n, height, width, 3) in 0..1 and seconds, on this rank of however many processes run this."""
    rank = torch.distributed.get_rank()
    cuda = torch.distributed.get_backend() == "nccl"
    pipe = load(torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"))
    if spec:
        pipe = xdit_compile.parallelize(pipe, spec)
    call = {"class_labels": pipe.get_label_ids(labels), "guidance_scale": guidance, "output_type": "np"}
    pipe.set_progress_bar_config(disable=True)
    # Once without looking at the clock: the first call captures the model.
    pipe(**call, num_inference_steps=1, generator=torch.Generator().manual_seed(seed))
    pipe.set_progress_bar_config(disable=rank != 0, desc=spec or "one process")
    start = time.perf_counter()
    images = pipe(**call, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images
    return images, time.perf_counter() - start


def sheet(images: np.ndarray, labels: list[str], scale: int = 2) -> Image.Image:
    """One picture of all images in a row-wise grid with their labels below."""
    side, columns, margin, line = images.shape[1] * scale, min(len(labels), 6), 6, 16
    rows = -(-len(labels) // columns)
    page = Image.new("RGB", (columns * (side + margin) + margin, rows * (side + margin + line) + margin), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = margin + i % columns * (side + margin)
        y = margin + i // columns * (side + margin + line)
        picture = Image.fromarray((image * 255).round().astype("uint8"))
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + side + 2), label, fill="black")
    return page


def report(spec: str) -> str:
    """One line: what the compiler made of the transformer under ``spec``."""
    model = load(torch.device("cpu")).transformer
    size = model.config.sample_size
    inputs = {"hidden_states": torch.zeros(2, model.config.in_channels, size, size),
              "timestep": torch.zeros(2, dtype=torch.long), "class_labels": torch.zeros(2, dtype=torch.long)}
    return xdit_compile.explain(model, spec, inputs).summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", nargs="+", help="what to draw (default: twelve of the classes)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the noise (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the pictures")
    options = parser.parse_args()
    console = Console()
    pipe = load(torch.device("cpu"))
    labels = options.labels or sorted(pipe.labels)[:: max(len(pipe.labels) // 12, 1)][:12]
    if unknown := sorted(set(labels) - set(pipe.labels)):
        parser.error(f"no class is called {', '.join(unknown)}; there are: {', '.join(sorted(pipe.labels))}")
    arguments = (labels, options.steps, options.guidance, options.seed)

    options.output.mkdir(parents=True, exist_ok=True)
    (reference, seconds), = xdit_compile.launch(draw, None, *arguments, world_size=1)
    sheet(reference, labels).save(options.output / "one-process.png")
    table = Table("", "seconds", "largest difference", "8-bit values that differ")
    table.add_row("one process", f"{seconds:.2f}", "", "")
    for spec in SPECS:
        results = xdit_compile.launch(draw, spec, *arguments, world_size=2)
        images, seconds = results[0]
        name = spec.replace("=", "-")
        difference = np.abs(images - reference)
        changed = np.count_nonzero((images * 255).round() != (reference * 255).round())
        sheet(images, labels).save(options.output / f"{name}.png")
        # A difference below one grey level would be black; stretched to the full range it can be looked at.
        sheet(difference / max(difference.max(), 1e-12), labels).save(options.output / f"{name}-difference.png")
        table.add_row(f"two processes, {spec}", f"{seconds:.2f}", f"{difference.max():.1e}",
                      f"{changed} of {images.size}")
    console.print(table)
    for spec in SPECS:
        console.print(report(spec), highlight=False)
    console.print(f"Pictures: {options.output}/one-process.png, ulysses-2.png, ring-2.png, cfg-2.png and their "
                  "differences, stretched to full contrast")


if __name__ == "__main__":
    main()
