"""The demo: the same images on one process and on two, with their difference.

A small class-conditional DiT, trained by ``examples/shapes/train.py`` and kept beside it, draws coloured shapes. It
runs as it is on one process, then on two with ``ulysses=2``, with ``ring=2`` and with ``cfg=2``, by one call that
makes the pipeline parallel. Pictures go to ``demo-output``. A model of middle size, of random weights, then runs on one
process and on two, long enough for the speed-up to be seen; and a page shows what FLUX.1-dev would do on eight GPUs.

    python examples/demo.py
    python examples/demo.py --quick
    python examples/demo.py --labels "red star" "blue ring" --steps 30 --output /tmp/pictures
"""

from __future__ import annotations

import argparse
import sys
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


def middle(spec: str | None, steps: int) -> tuple[torch.Tensor, float]:
    """The sample after so many steps of a model of middle size (130 million parameters, 1,024 tokens), and seconds."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=4,
                                       num_layers=12, sample_size=64, num_embeds_ada_norm=1000).eval()
    if spec:
        model = xdit_compile.parallelize(model, spec)
    sample, labels = torch.randn(1, 4, 64, 64), torch.tensor([7])
    with torch.no_grad():
        model(sample, torch.tensor([999]), labels)  # captured before the clock runs
        start = time.perf_counter()
        for step in range(steps):
            time_ = torch.tensor([999 - step * 1000 // steps])
            sample = sample - model(sample, time_, labels).sample / steps
    return sample, time.perf_counter() - start


def sheet(images: np.ndarray, labels: list[str], scale: int = 2, largest: float | None = None) -> Image.Image:
    """One picture of all images in a row-wise grid with their labels below; of differences, whose ``largest`` is white,
    with their scale."""
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
    if largest is None:
        return page
    ruled = Image.new("RGB", (max(page.width, 420), page.height + 40), "white")
    ruled.paste(page)
    pen = ImageDraw.Draw(ruled)
    for i in range(200):
        pen.line((margin + i, page.height, margin + i, page.height + 12), fill=(i * 255 // 199,) * 3)
    pen.rectangle((margin, page.height, margin + 200, page.height + 12), outline="black")
    pen.text((margin, page.height + 16), "0", fill="black")
    pen.text((margin + 170, page.height + 16), f"{largest:.1e}, the largest; values go from 0 to 1", fill="black")
    return ruled


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
    parser.add_argument("--middle-steps", type=int, default=6, help="of the larger model (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="neither the model of middle size nor the page")
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
        largest = max(float(difference.max()), 1e-12)
        sheet(difference / largest, labels, largest=largest).save(options.output / f"{name}-difference.png")
        table.add_row(f"two processes, {spec}", f"{seconds:.2f}", f"{difference.max():.1e}",
                      f"{changed} of {images.size}")
    console.print(table)
    for spec in SPECS:
        console.print(report(spec), highlight=False)
    console.print(f"Pictures: {options.output}/one-process.png, ulysses-2.png, ring-2.png, cfg-2.png and their "
                  "differences, stretched to full contrast, with their scale")
    if not options.quick:
        show_speed(console, options.middle_steps)
        show_page(console, options.output / "flux-on-eight-gpus.html")


def show_speed(console: Console, steps: int) -> None:
    """Seconds of the model of middle size on one process and on two, of one core each."""
    (expected, alone), = xdit_compile.launch(middle, None, steps, world_size=1)
    sample, together = xdit_compile.launch(middle, "ulysses=2", steps, world_size=2)[0]
    table = Table("a model of middle size", "seconds", "times as fast", "largest difference")
    table.add_row("one process", f"{alone:.1f}", "", "")
    table.add_row("two processes, ulysses=2", f"{together:.1f}", f"{alone / together:.2f}",
                  f"{(sample - expected).abs().max():.1e}")
    console.print(table)


def show_page(console: Console, path: Path) -> None:
    """What a model too large for this machine would do on eight GPUs."""
    sys.path.insert(0, str(Path(__file__).parent))
    from published import flux_dev

    model, inputs = flux_dev()
    explained = xdit_compile.explain(model, "ulysses=8", inputs, every_rank=True)
    explained.write_page(path)
    console.print(f"{explained.verdict()}\nAs a page with pictures: {path}", highlight=False)


if __name__ == "__main__":
    main()
