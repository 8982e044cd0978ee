"""A pipeline in stages, each with a part of the weights; and a picture of when the stages ran.

    torchrun --nproc-per-node 2 examples/pipefusion.py --model DIR_OR_ID --spec pipefusion=2,patches=4
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

import xdit_compile


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of a pipeline, or its name on the hub")
    parser.add_argument("--spec", default="pipefusion=2,patches=4", help="stages and patches (default %(default)s)")
    parser.add_argument("--prompt", default="a photo of a red fox in the snow")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="pixels to a side (default: the pipeline's own)")
    options = parser.parse_args(arguments)

    device = xdit_compile.init_from_env()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)
    pipe = xdit_compile.parallelize(pipe, options.spec)  # of which a stage keeps its part at the first call
    first = torch.distributed.get_rank() == 0
    pipe.set_progress_bar_config(disable=not first)
    image = pipe(options.prompt, height=options.size, width=options.size, num_inference_steps=options.steps,
                 generator=torch.Generator().manual_seed(0)).images[0]
    ran = xdit_compile.timeline(pipe)  # asked for by all ranks together
    if first:
        image.save("image.png")
        ran.draw("stages.png")
        print(f"image.png, stages.png: {ran}")


if __name__ == "__main__":
    main()
