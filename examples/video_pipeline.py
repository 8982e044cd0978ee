"""A video pipeline of diffusers on several devices: frames shared out, the decoder too.

    torchrun --nproc-per-node 4 examples/video_pipeline.py --model DIR_OR_ID --spec ulysses=4,vae=4 --frames 81
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

import xdit_compile


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of a pipeline, or its name on the hub")
    parser.add_argument("--spec", default="ulysses=2,vae=2", help="how to share it out (default %(default)s)")
    parser.add_argument("--prompt", default="a red fox runs through the snow")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="video.gif")
    options = parser.parse_args(arguments)

    device = xdit_compile.init_from_env()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)
    pipe = xdit_compile.parallelize(pipe, options.spec)
    first = torch.distributed.get_rank() == 0
    pipe.set_progress_bar_config(disable=not first)
    frames = pipe(options.prompt, num_frames=options.frames, height=options.height, width=options.width,
                  num_inference_steps=options.steps, generator=torch.Generator().manual_seed(0),
                  output_type="pil").frames[0]
    if first:
        export_to_gif(frames, options.output)
        print(options.output)


if __name__ == "__main__":
    main()
