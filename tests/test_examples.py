"""The scripts in ``examples/``, each run as its docstring says, on tiny models."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import example_runs
import numpy as np
import pipelines
import pytest
import torch
from adapter_runs import LAYERS
from PIL import Image
from pool import Pool
from safetensors.torch import save_file
from test_pipelines import folders  # noqa: F401

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--size", "64", "--steps", "2"]


def ran(pool: Pool, name: str, folder: Path, *words: str) -> str:
    """What rank 0 of two printed."""
    return pool.run(example_runs.script, str(EXAMPLES / name), str(folder), *words, ranks=range(2))[0]


def drawn(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8).float()


def on_one_device(folder: Path) -> torch.Tensor:
    pipe = pipelines.load(folder)
    image = pipe("a photo of a red fox in the snow", height=64, width=64, num_inference_steps=2,
                 generator=torch.Generator().manual_seed(0)).images[0]
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    """Examples take all processes of their job, of which there are two here."""
    workers = Pool(world=2)
    yield workers
    workers.close()


def test_an_image_with_and_without_an_adapter_and_in_stages(two: Pool, folders: str, tmp_path: Path) -> None:  # noqa: F811
    sd3 = pipelines.folder("sd3", Path(folders))
    expected = on_one_device(sd3)
    said = ran(two, "image_pipeline.py", tmp_path, "--model", str(sd3), *SMALL)
    assert "image.png" in said and "StableDiffusion3Pipeline under cfg=2" in said
    assert (drawn(tmp_path / "image.png") - expected).abs().max() <= 1

    transformer = pipelines.load(sd3).transformer
    made = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(LAYERS):
            made[f"transformer.{name}.lora_A.weight"] = 0.3 * torch.randn(2, module.in_features)
            made[f"transformer.{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, 2)
    (tmp_path / "adapter").mkdir()
    save_file(made, tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    ran(two, "lora.py", tmp_path, "--model", str(sd3), "--lora", str(tmp_path / "adapter"), *SMALL)
    without, style, little, again = (drawn(tmp_path / f"{n}.png") for n in (
        "without", "with", "a-little", "without-again"))
    assert (without - expected).abs().max() <= 1 and (again - expected).abs().max() <= 1
    assert (style - without).abs().max() > 2 and (little - style).abs().max() > 2

    said = ran(two, "pipefusion.py", tmp_path, "--model", str(sd3), "--size", "64", "--steps", "3")
    assert "stages idle" in said and (tmp_path / "stages.png").read_bytes()[:4] == b"\x89PNG"


def test_an_artifact(two: Pool, folders: str, tmp_path: Path) -> None:  # noqa: F811
    sd3 = pipelines.folder("sd3", Path(folders))
    words = ["--model", str(sd3), "--artifact", str(tmp_path / "model.xdit"), *SMALL]
    example_runs.script(str(EXAMPLES / "artifact.py"), str(tmp_path), "export", *words)
    assert "from-artifact.png" in ran(two, "artifact.py", tmp_path, "run", *words)
    assert (drawn(tmp_path / "from-artifact.png") - on_one_device(sd3)).abs().max() <= 1


def test_a_video(two: Pool, folders: str, tmp_path: Path) -> None:  # noqa: F811
    wan = pipelines.folder("wan", Path(folders))
    ran(two, "video_pipeline.py", tmp_path, "--model", str(wan), "--frames", "5", "--height", "64", "--width", "64",
        "--steps", "2")
    assert Image.open(tmp_path / "video.gif").n_frames == 5


def test_the_notebook_and_a_model_of_one_s_own(tmp_path: Path) -> None:
    """Its cells, which use ``own_model.py``, one after the other, as a script beside the examples."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "cells.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nif __name__ == '__main__':\n"
                      + "".join(f"    {line}\n" for line in code.splitlines()))
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          check=False, env=environment)
    assert done.returncode == 0, done.stderr
    verdict, differences = done.stdout.splitlines()
    assert verdict.startswith("OwnDiT under ulysses=2: ") and max(map(float, differences.split())) < 1e-5
    assert (tmp_path / "explained.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.whole
def test_two_nodes(folders: str, tmp_path: Path) -> None:  # noqa: F811
    """Each a torchrun of its own with one rank, as on two machines."""
    sd3 = pipelines.folder("sd3", Path(folders))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")} | {
        "DEVICES": "1", "PORT": str(port), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDIT_COMPILE_SECRET": "of this test"}
    nodes = [subprocess.Popen(
        [EXAMPLES / "multi_node.sh", str(node), "127.0.0.1", "--", "--model", sd3, "--spec", "ring=2", *SMALL],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (drawn(tmp_path / "image.png") - on_one_device(sd3)).abs().max() <= 1


def test_a_picture_of_differences_says_what_is_white() -> None:
    """A ruler from black to white below the pictures, which stay as they are."""
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    images = np.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    plain, ruled = demo["sheet"](images, ["a", "b"]), demo["sheet"](images, ["a", "b"], largest=3e-7)
    assert ruled.crop((0, 0, *plain.size)).tobytes() == plain.tobytes() and ruled.height > plain.height
    rule = [ruled.getpixel((x, plain.height + 6))[0] for x in range(10, 200)]
    assert rule == sorted(rule) and rule[0] < 10 and rule[-1] > 240


@pytest.mark.whole
def test_the_demo(tmp_path: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    words = ["--steps", "2", "--middle-steps", "2", "--output", "made"]
    done = subprocess.run([sys.executable, EXAMPLES / "demo.py", *words],
                          cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "two processes, ulysses=2" in done.stdout and "times as fast" in done.stdout
    assert "FluxTransformer2DModel under ulysses=8: 12.5% of the work on each of 8 devices" in done.stdout
    assert {p.name for p in (tmp_path / "made").iterdir()} >= {
        "one-process.png", "cfg-2-difference.png", "flux-on-eight-gpus.html"}


def test_every_example_is_run_here() -> None:
    scripts = {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh", ".ipynb")}
    elsewhere = {"demo.py", "published.py", "published_images.py", "published_videos.py"}
    text = Path(__file__).read_text()
    assert all(name in text for name in scripts - elsewhere), scripts - elsewhere
