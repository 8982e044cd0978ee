"""Adapters of a parallel pipeline: loaded, scaled and switched off, between calls.

    torchrun --nproc-per-node 2 examples/lora.py --model DIR_OR_ID --lora ADAPTER --spec ulysses=2
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

import xdit_compile


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of a pipeline, or its name on the hub")
    parser.add_argument("--lora", required=True, help="a file or folder of an adapter, or its name on the hub")
    parser.add_argument("--spec", default="ulysses=2", help="how to share it out (default %(default)s)")
    parser.add_argument("--prompt", default="a photo of a red fox in the snow")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="pixels to a side (default: the pipeline's own)")
    options = parser.parse_args(arguments)

    device = xdit_compile.init_from_env()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = xdit_compile.parallelize(DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device),
                                    options.spec)
    first = torch.distributed.get_rank() == 0
    pipe.set_progress_bar_config(disable=not first)

    def draw(name: str) -> None:
        image = pipe(options.prompt, height=options.size, width=options.size, num_inference_steps=options.steps,
                     generator=torch.Generator().manual_seed(0)).images[0]
        if first:
            image.save(f"{name}.png")
            print(f"{name}.png")

    draw("without")
    pipe.load_lora_weights(options.lora, adapter_name="style")
    pipe.set_adapters(["style"], [1.0])
    draw("with")
    pipe.set_adapters(["style"], [0.4])  # the same program: a scale is a number in it
    draw("a-little")
    pipe.unload_lora_weights()
    draw("without-again")


if __name__ == "__main__":
    main()
