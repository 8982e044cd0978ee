"""A ComfyUI of its own for a test: its folders with tiny random models, its process, and prompts by HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import redraw
from comfyui_models import build, comfy
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
NODES = ROOT / "examples" / "comfyui"
Graph = dict[str, dict[str, Any]]


def folders(base: Path) -> None:
    """What ``--base-directory`` wants: models, nodes, and where results go."""
    for name in ("input", "output", "temp", "user", "models/diffusion_models", "models/loras", "models/vae_approx",
                 "models/controlnet", "custom_nodes"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "xdit_compile").symlink_to(NODES, target_is_directory=True)
    (base / "custom_nodes" / "test_nodes.py").symlink_to(ROOT / "tests" / "comfyui_nodes.py")
    models(base / "models")


@torch.no_grad()
def models(place: Path) -> None:
    """A diffusion model whose class ComfyUI tells by its weights, a decoder of previews as autoencoder, a LoRA."""
    model = build("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper", input_size=None, in_channels=16,
                  depth=2, num_patches=1024, pos_embed_max_size=32, pos_embed_scaling_factor=None, adm_in_channels=32,
                  context_embedder_config={"target": "torch.nn.Linear", "params": {
                      "in_features": 24, "out_features": 128}}, qk_norm="rms")
    redraw(model)
    model.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, place / "diffusion_models" / "tiny.safetensors")
    drawn = torch.Generator().manual_seed(1)
    low = {}
    for name, weight in state.items():
        if name.startswith("joint_blocks") and name.endswith("proj.weight"):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            low[f"{key}.lora_up.weight"] = 0.2 * torch.randn(weight.shape[0], 4, generator=drawn)
            low[f"{key}.lora_down.weight"] = 0.2 * torch.randn(4, weight.shape[1], generator=drawn)
            low[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(low, place / "loras" / "tiny.safetensors")
    save_file(_control(), place / "controlnet" / "tiny.safetensors")
    preview = comfy("comfy.taesd.taesd").TAESD(latent_channels=16)
    redraw(preview)
    for part, module in (("encoder", preview.taesd_encoder), ("decoder", preview.taesd_decoder)):
        save_file({k: v.contiguous() for k, v in module.state_dict().items()},
                  place / "vae_approx" / f"taesd3_{part}.safetensors")


def _control() -> dict[str, torch.Tensor]:
    """Weights of a ControlNet of one block, under the names of diffusers, as they are published."""
    model = build_control()
    redraw(model)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    named = comfy("comfy.utils").mmdit_to_diffusers({"depth": 2, "num_blocks": 1})
    found = {k: v for k, v in state.items() if k.startswith(("controlnet_blocks.", "pos_embed_input."))}
    for name, held in named.items():
        key, part = (held, None) if isinstance(held, str) else (held[0], held[1])
        if key in state:
            found[name] = (state[key] if part is None else state[key].narrow(*part)).clone()
    return found


def build_control() -> torch.nn.Module:
    operations = comfy("comfy.ops").manual_cast
    return comfy("comfy.cldm.mmdit").ControlNet(
        num_blocks=1, control_latent_channels=16, input_size=None, in_channels=16, depth=2, num_patches=1024,
        pos_embed_max_size=32, adm_in_channels=32, context_embedder_config={"target": "torch.nn.Linear", "params": {
            "in_features": 24, "out_features": 128}}, dtype=torch.float32, operations=operations)


class ComfyUI:
    """A server that runs."""

    def __init__(self, address: str, base: Path, log: Path) -> None:
        self.address, self._base, self._log = address, base, log

    def run(self, graph: Graph, seconds: float = 240.0) -> dict[str, Any]:
        """A prompt by its API; what its nodes gave, by their numbers.

        Raises:
            RuntimeError: what ComfyUI says of the node that failed.
        """
        return self.outcome(self._ask("/prompt", {"prompt": graph})["prompt_id"], seconds)

    def outcome(self, number: str, seconds: float = 240.0) -> dict[str, Any]:
        """What the nodes of a prompt give, when it is done. Raises as `run` does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self._ask(f"/history/{number}")
            if number in found:
                status = found[number]["status"]
                if status["status_str"] != "success":
                    errors = [m[1] for m in status["messages"] if m[0] == "execution_error"]
                    raise RuntimeError(errors[0]["exception_message"] if errors else str(status))
                return found[number]["outputs"]
            time.sleep(0.1)
        raise TimeoutError(self.log())

    def settings(self, chosen: dict[str, Any]) -> None:
        """Settings of its page."""
        self._ask("/settings", chosen)

    def file(self, output: dict[str, Any], kind: str) -> Path:
        """The one file of this kind (images, latents) that a node has saved."""
        (saved,) = output[kind]
        return self._base / saved["type"] / saved["subfolder"] / saved["filename"]

    def log(self) -> str:
        return self._log.read_text()[-4000:]

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error


@contextmanager
def running(checkout: Path, base: Path, *flags: str, seconds: float = 120.0) -> Iterator[ComfyUI]:
    """ComfyUI on a free port of this machine alone, on CPUs, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "main.py", "--cpu", "--use-pytorch-cross-attention", "--listen", "127.0.0.1", "--port",
             str(port), "--base-directory", str(base), "--disable-api-nodes", *flags],
            cwd=checkout, stdout=out, stderr=subprocess.STDOUT, env=environment)
    server = ComfyUI(f"http://127.0.0.1:{port}", base, log)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                server._ask("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"ComfyUI did not start:\n{server.log()}") from None
                time.sleep(0.3)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
