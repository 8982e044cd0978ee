"""A parallel model as a folder of files: exported once, then started without its code, without capture or planning.

    python examples/artifact.py export --model DIR --spec ulysses=2 --artifact model.xdit
    torchrun --nproc-per-node 2 examples/artifact.py run --model DIR --artifact model.xdit
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import xdit_compile


def call(pipe: Any, options: argparse.Namespace, **others: Any) -> Any:
    """An artifact has programs for calls of the sizes that it was exported with."""
    return pipe(options.prompt, height=options.size, width=options.size, generator=torch.Generator().manual_seed(0),
                **others)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "run"))
    parser.add_argument("--model", required=True, help="a folder of a pipeline")
    parser.add_argument("--artifact", required=True, help="the artifact's folder")
    parser.add_argument("--spec", default="ulysses=2", help="of an export: how to share it out (default %(default)s)")
    parser.add_argument("--prompt", default="a photo of a red fox in the snow")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="pixels to a side (default: the pipeline's own)")
    options = parser.parse_args(arguments)

    pipe = DiffusionPipeline.from_pretrained(options.model)
    if options.what == "export":
        seen: list[dict[str, Any]] = []
        hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        call(pipe, options, num_inference_steps=1, output_type="latent")  # to see what the model is called with
        hook.remove()
        print(xdit_compile.export(pipe.transformer, options.spec, seen[0], options.artifact, overwrite=True))
        return
    xdit_compile.init_from_env()
    pipe.transformer = xdit_compile.load(options.artifact, weights=Path(options.model) / "transformer")
    image = call(pipe, options, num_inference_steps=options.steps).images[0]
    if torch.distributed.get_rank() == 0:
        image.save("from-artifact.png")
        print("from-artifact.png")


if __name__ == "__main__":
    main()
