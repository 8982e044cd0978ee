"""ComfyUI: its model classes in parallel, and its server with our nodes, against ComfyUI on one device.

Runs where ``XDIT_COMPILE_COMFYUI`` names a checkout of ComfyUI whose requirements are installed in this environment.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import comfyui_models
import comfyui_page
import numpy as np
import pytest
import torch
from comfyui_server import ComfyUI, Graph, folders, running
from emulation import emulate
from PIL import Image
from safetensors.torch import load_file

MISSING = [name for name in ("aiohttp", "torchsde", "einops", "torchvision", "alembic", "comfyui_frontend_package")
           if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(comfyui_models.checkout() is None, reason="XDIT_COMPILE_COMFYUI names no checkout of ComfyUI"),
    pytest.mark.skipif(bool(MISSING), reason=f"ComfyUI's requirements are not installed: {', '.join(MISSING)}"),
]
SPECS = ["ulysses=2", "ring=2", "tensor=2"]
QUICK = {("flux_control", "ulysses=2"), ("wan_i2v", "ring=2"), ("sd3_control", "tensor=2"), ("hidream", "ulysses=2")}


@pytest.mark.parametrize(("name", "spec"), [
    pytest.param(n, s, id=f"{n}-{s}", marks=[] if (n, s) in QUICK else pytest.mark.whole)
    for n in comfyui_models.CASES for s in SPECS])
def test_its_model_classes_give_the_numbers_of_one_device(name: str, spec: str) -> None:
    case = comfyui_models.CASES[name]
    found = emulate(case, 2, True, spec)
    assert found.error <= case.tolerance
    assert found.methods <= {spec.partition("=")[0]}


def prompt(ours: bool, *, lora: bool = False, adapter: bool = False, control: bool = False, closure: bool = False,
           sampler: str = "euler", spec: str = "ulysses=2") -> Graph:
    """A text-to-image workflow, with our nodes or ComfyUI's own in their place."""
    own = {"unet_name": "tiny.safetensors", "weight_dtype": "default"}
    nodes: Graph = {"1": node("XDiTLoadDiffusionModel", **own, spec=spec) if ours else node("UNETLoader", **own)}
    model, texts = ["1", 0], (["4", 0], ["5", 0])
    if lora:
        nodes["2"] = node("XDiTLoadLora" if ours else "LoraLoaderModelOnly", model=model, lora_name="tiny.safetensors",
                          strength_model=0.7)
        model = ["2", 0]
    if adapter or closure:
        nodes["3"] = node("TestAdapter", model=model, width=128, strength=0.5, closure=closure)
        model = ["3", 0]
    if control:
        nodes["16"] = node("ControlNetLoader", control_net_name="tiny.safetensors")
        nodes["17"] = node("EmptyImage", width=144, height=112, batch_size=1, color=0x3366CC)
        nodes["18"] = node("ControlNetApplyAdvanced", positive=texts[0], negative=texts[1], control_net=["16", 0],
                           image=["17", 0], strength=0.8, start_percent=0.0, end_percent=1.0, vae=["12", 0])
        texts = ["18", 0], ["18", 1]
    return nodes | {
        "4": node("TestText", seed=1, tokens=11, width=24, pooled=32),
        "5": node("TestText", seed=2, tokens=11, width=24, pooled=32),
        "6": node("CFGGuider", model=model, positive=texts[0], negative=texts[1], cfg=3.0),
        "7": node("KSamplerSelect", sampler_name=sampler),
        "8": node("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0),
        "9": node("RandomNoise", noise_seed=42),
        "10": node("EmptySD3LatentImage", width=144, height=112, batch_size=1),
        "11": node("XDiTSampler" if ours else "SamplerCustomAdvanced", noise=["9", 0], guider=["6", 0],
                   sampler=["7", 0], sigmas=["8", 0], latent_image=["10", 0]),
        "12": node("VAELoader", vae_name="taesd3"),
        "13": node("VAEDecode", samples=["11", 0], vae=["12", 0]),
        "14": node("SaveImage", images=["13", 0], filename_prefix="test"),
        "15": node("SaveLatent", samples=["11", 0], filename_prefix="test"),
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    base, place = tmp_path_factory.mktemp("comfyui"), comfyui_models.checkout()
    assert place is not None
    folders(base)
    with running(place, base) as found:
        yield found


def made(server: ComfyUI, graph: Graph) -> tuple[torch.Tensor, np.ndarray]:
    """The latent and the picture of a prompt."""
    found = server.run(graph)
    return (load_file(server.file(found["15"], "latents"))["latent_tensor"],
            np.asarray(Image.open(server.file(found["14"], "images"))).astype(int))


WAYS: list[dict[str, Any]] = [{}, {"lora": True}, {"adapter": True}, {"control": True},
                              {"lora": True, "sampler": "euler_ancestral"}, {}]
"""Prompts, one after the other: what an earlier one put on the model is not there in the next."""


def test_a_prompt_by_http_gives_the_picture_of_one_device(server: ComfyUI, tmp_path: Path) -> None:
    alone = [made(server, prompt(False, **way)) for way in WAYS]
    shared = [made(server, prompt(True, **way)) for way in WAYS]
    for way, (latent, picture), (ours, its) in zip(WAYS, alone, shared, strict=True):
        torch.testing.assert_close(ours, latent, atol=1e-4, rtol=1e-4, msg=lambda text, way=way: f"{way}: {text}")
        # A number beside the middle between two of 256 levels may be rounded the other way.
        assert picture.std() > 20 and abs(its - picture).max() <= 1, way
    latents = [latent for latent, _ in alone[:5]]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(latents) for b in latents[:i]), "a way has no effect"
    refused(server)


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_the_workflow_opens_in_the_page_and_its_button_makes_the_picture_of_one_device(server: ComfyUI) -> None:
    workflow, api = (json.loads(path.read_text()) for path in (comfyui_page.WORKFLOW, comfyui_page.API))
    with comfyui_page.page(server) as opened:
        found = comfyui_page.load(opened, workflow)
        assert {name: asked(n) for name, n in found.items()} == {name: asked(n) for name, n in api.items()}
        graph = comfyui_page.load(opened, comfyui_page.with_tests_models(workflow))
        shared = comfyui_page.run(opened, server)
    own = {"XDiTLoadDiffusionModel": "UNETLoader", "XDiTLoadLora": "LoraLoaderModelOnly",
           "XDiTSampler": "SamplerCustomAdvanced"}
    for entry in graph.values():
        entry["class_type"] = own.get(entry["class_type"], entry["class_type"])
        entry["inputs"].pop("spec", None)
    alone = server.run(graph)
    ours, its = (np.asarray(Image.open(server.file(o["14"], "images"))).astype(int) for o in (shared, alone))
    assert its.std() > 20 and abs(ours - its).max() <= 1


def asked(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a node of a prompt is and is given; titles and the like apart."""
    return entry["class_type"], entry["inputs"]


def refused(server: ComfyUI) -> None:
    """What cannot be sent is named, before the first step; and the model goes on working."""
    with pytest.raises(RuntimeError, match=r"patches_replace.*double_block.*on_the_spot.*test_nodes\.py:\d+"):
        server.run(prompt(True, closure=True))
    plain = prompt(True)
    plain["2"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="tiny.safetensors", strength_model=1.0)
    plain["6"]["inputs"]["model"] = ["2", 0]
    with pytest.raises(RuntimeError, match=r"Load LoRA \(xDiT\)"):
        server.run(plain)
    other = prompt(False)
    other["11"]["class_type"] = "XDiTSampler"
    with pytest.raises(RuntimeError, match=r"Load Diffusion Model \(xDiT\)"):
        server.run(other)
