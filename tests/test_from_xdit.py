"""Scripts that were written for xDiT, with the lines changed that import it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from PIL import Image

from xdit_compile.compat import xfuser
from xdit_compile.compat.xfuser import FlexibleArgumentParser, get_world_group, xDiTParallel, xFuserArgs
from xdit_compile.errors import SpecError, XditError

SCRIPT = '''
import torch
from diffusers import StableDiffusion3Pipeline
from xdit_compile.compat.xfuser import FlexibleArgumentParser, get_world_group, xDiTParallel, xFuserArgs


def main():
    parser = FlexibleArgumentParser(description="xFuser Arguments")
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    local_rank = get_world_group().local_rank
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusion3Pipeline.from_pretrained(
        pretrained_model_name_or_path=engine_config.model_config.model, dtype=torch.float32,
    ).to(device)

    pipe = xDiTParallel(pipe, engine_config, input_config)
    pipe(
        height=input_config.height,
        width=input_config.height,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        output_type=input_config.output_type,
        generator=torch.Generator(device=device).manual_seed(input_config.seed),
    )
    pipe.save("results", "sd3")


if __name__ == "__main__":
    main()
'''
"""As diffusers' documentation has it, but for the device, the type of numbers, and keeping what was made."""


def test_the_documented_script_under_torchrun(tmp_path: Path) -> None:
    folder = pipelines.folder("sd3", tmp_path)
    (tmp_path / "inference.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "inference.py", "--model", folder,
               "--ulysses_degree", "2", "--ring-degree", "1", "--height", "64", "--prompt", "A snowy mountain",
               "--num_inference_steps", "2", "--seed", "5"]
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          check=False, env=environment)
    assert done.returncode == 0, done.stderr
    made = np.asarray(Image.open(tmp_path / "results" / "sd3_image-0.png"), dtype=float)
    pipe = pipelines.load(folder)
    expected = pipe(prompt=["A snowy mountain"], height=64, width=64, num_inference_steps=2,
                    generator=torch.Generator().manual_seed(5)).images[0]
    assert abs(made - np.asarray(expected, dtype=float)).max() <= 1


def asked(*words: str) -> xFuserArgs:
    return xFuserArgs.from_cli_args(xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        ["--model", "somewhere", *words]))


def test_what_scripts_read_of_the_configuration() -> None:
    engine, call = asked("--prompt", "a", "b", "--warmup-steps", "1").create_config()
    assert (call.height, call.width, call.num_inference_steps, call.guidance_scale) == (1024, 1024, 20, 3.5)
    assert (call.prompt, call.batch_size, call.output_type, call.use_resolution_binning) == (["a", "b"], 2, "pil", True)
    assert engine.model_config.model == "somewhere" and engine.parallel_config.ulysses_degree == 1
    assert engine.runtime_config.use_parallel_vae is False and engine.parallel_config.world_size == 1
    engine, call = xFuserArgs(model="here", prompt="a cat", height=64).create_config()
    assert (engine.model_config.model, call.prompt, call.height) == ("here", ["a cat"], 64)
    world = get_world_group()
    assert (world.rank, world.world_size, world.is_first_rank, world.is_last_rank) == (0, 1, True, True)


@pytest.mark.parametrize(("made", "complaint"), [
    (lambda: asked("--use_fast_attn"), "--use_fast_attn: attention is whole"),
    (lambda: asked("--wan_teacache_thresh", "0.3"), "--teacache_thresh 0.3 belongs to a cache; add --use_teacache"),
    (lambda: asked("--use_teacache", "--use_fbcache"), "name two caches"),
    (lambda: asked("--ulysses_degree", "2"), "needs 2 x 1 = 2 processes, but 1 is running"),
    (lambda: xFuserArgs(model="x", cache_method="fora"), "--cache_method fora: caches have other names here"),
    (lambda: xFuserArgs(model="x", ulyses_degree=2), "xFuserArgs has no ulyses_degree; did you mean 'ulysses_degree'?"),
])  # fmt: skip
def test_what_is_not_there_is_refused(made: Any, complaint: str) -> None:
    with pytest.raises((SpecError, XditError)) as refused:
        made().create_config()
    assert complaint in str(refused.value)


def test_a_pipeline_has_the_attributes_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipelines.folder("sd3", tmp_path)
    engine, _ = xFuserArgs(model=str(folder)).create_config()
    pipe = xDiTParallel(pipelines.load(folder), engine)
    assert type(pipe.transformer).__name__ == "SD3Transformer2DModel" and pipe.vae_scale_factor == 8
    pipe(prompt="a", height=64, width=64, num_inference_steps=1, output_type="pil")
    assert [f.name for f in pipe.save(tmp_path / "here", "x")] == ["x_image-0.png"]
    assert xfuser.DEFAULTS["height"] == 1024
