"""The published timings as questions to the planner: which model of which size, under which spec."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.errors import SpecError
from xdit_compile.spec import ShardingSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # before the benchmark of the same name

import published
import published_images
import published_videos

TABLE = Path(__file__).with_name("anchors.csv")

WORDS = {"U": "ulysses_degree", "R": "ring_degree", "TP": "tensor_degree", "PP": "pipefusion_degree",
         "CFG": "cfg_degree"}

BEST = None
"""In place of a spec: the row is the fastest of several, and so is the prediction."""


@dataclass(frozen=True)
class Timing:
    """One row of the table that can be predicted.

    Attributes:
        line: of the file; spec: or BEST; seconds: of all ``steps`` together.
        whole: whether the time is that of a pipeline, with its encoders and its autoencoder.
        eye: whether the figure was read from a plot by eye.
    """

    line: int
    model: str
    shape: str
    steps: int
    gpu: str
    link: str
    mode: str
    n: int
    method: str
    spec: ShardingSpec | None
    seconds: float
    whole: bool
    eye: bool
    source: str

    @property
    def machine(self) -> tuple[str, str, str, str]:
        """GPU, links, whose software, and how it was run: what one set of constants is fitted to."""
        word = self.source.split(" ")[0]
        return self.gpu, self.link, SOFTWARE.get(word, word), self.mode

    @property
    def table(self) -> tuple[str, ...]:
        """Rows that differ in their method alone."""
        return *self.machine, self.model, self.shape, str(self.n)

    def __str__(self) -> str:
        return f"{self.model} {self.shape}, {self.n}x {self.gpu} {self.link}, {self.mode}, {self.method}"


def timings() -> tuple[list[Timing], list[tuple[int, str]]]:
    """All rows that can be predicted, and the lines of those that cannot, with the reason."""
    found, left = [], []
    with TABLE.open() as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            made = _timing(line, row)
            if isinstance(made, str):
                left.append((line, made))
            else:
                found.append(made)
    return found, left


def _timing(line: int, row: dict[str, str]) -> Timing | str:
    if row["confidence"].startswith("REJECT") or "contested" in row["confidence"]:
        return "the table itself calls it implausible, or its steps contested"
    shape = row["shape"].split(" ")[0].rstrip("?")
    if "frames per README" in row["shape"]:
        return "its frames are not known"
    if (row["model"], shape) not in MODELS:
        return "a model or size that is not among those checked"
    if not row["steps"].isdecimal():
        return "its steps are not known"
    if row["gpu"] not in GPUS:
        return "a device that is none of the shipped machines"
    spec = spec_of(row["method"], int(row["n"]))
    if isinstance(spec, str):
        return spec
    steps, value = int(row["steps"]), float(row["value"])
    seconds = value / 1e3 if row["unit"] == "ms/step" else value
    whole = row["unit"] == "s" and "denoise" not in row["mode"] + row["source"]
    link = "PCIe" if row["link"].startswith("PCIe") else row["link"]
    mode = {"?": "eager", "as shipped": "eager"}.get(row["mode"], row["mode"])
    mode = "compile" if row["gpu"] == "GB200" else mode
    if mode not in ("eager", "compile"):
        return "another compiler"
    return Timing(line, row["model"], shape, steps, row["gpu"], link, mode, int(row["n"]), row["method"], spec, seconds,
                  whole, "eye" in row["confidence"], row["source"])


def spec_of(method: str, world: int) -> ShardingSpec | str | None:
    """The spec of a method's name; BEST; or why there is none."""
    text = method.removeprefix("best hybrid ").removeprefix("best=").removesuffix(" p2p")
    text = text.removesuffix("+FSDP FA2")
    if "(skips)" in text:
        return "stages whose long skips are waited for in every stage, as ours are not"
    if text in ("best", "best hybrid"):
        return BEST if world > 1 else ShardingSpec()
    if text in ("1", "U1", "xDiT") and world == 1:
        return ShardingSpec()
    if text == "xDiT":
        return "the method is not said"
    parts = re.findall(r"(CFG|PP|TP|U|R)(\d+)", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        return "a method that we do not have, or other kernels"
    try:
        made = ShardingSpec(**{WORDS[word]: int(degree) for word, degree in parts})
    except SpecError:
        return "a mix that we do not have"
    return made if made.world_size == world else "its degrees are not all named"


Example = tuple[torch.nn.Module, dict[str, Any]]


def _image(example: Callable[[], Example], size: int) -> Callable[[], Example]:
    """An example for latents of another size, and rotary tables to match."""
    def made() -> Example:
        model, given = example()
        times = (size // 8 / given["hidden_states"].shape[-1]) ** 2
        given["hidden_states"] = published.meta(*given["hidden_states"].shape[:2], size // 8, size // 8)
        if "image_rotary_emb" in given:
            given["image_rotary_emb"] = tuple(
                published.meta(int(t.shape[0] * times), *t.shape[1:], dtype=t.dtype) for t in given["image_rotary_emb"])
        return model, given

    return made


def _video(example: Callable[[], Example], frames: int, height: int, width: int) -> Callable[[], Example]:
    """An example for so many latent frames of such a size: (batch, channels, frames, height, width)."""
    def made() -> Example:
        model, given = example()
        given["hidden_states"] = published.meta(*given["hidden_states"].shape[:2], frames, height, width)
        return model, given

    return made


def _cogvideox_2b() -> Example:
    model = published.build("CogVideoXTransformer3DModel", num_attention_heads=30, num_layers=30)
    return model, {"hidden_states": published.meta(1, 13, 16, 60, 90),
                   "encoder_hidden_states": published.meta(1, 226, 4096),
                   "timestep": published.meta(1, dtype=torch.int64)}


def _cogvideox_15_161() -> Example:
    model, given = published_videos.cogvideox_15_5b()
    tokens = 21 * 48 * 85
    return model, {**given, "hidden_states": published.meta(1, 42, 16, 96, 170),
                   "image_rotary_emb": published_videos.rotary(tokens, 64)}


def _schnell(size: int) -> Example:
    _, given = published.flux_dev(size)
    return published.build("FluxTransformer2DModel", guidance_embeds=False), {
        n: t for n, t in given.items() if n != "guidance"}


def _qwen(size: int) -> Example:
    model, given = published.qwen_image_1328()
    side = size // 16
    return model, {**given, "hidden_states": published.meta(1, side * side, 64),
                   **({"img_shapes": [[(1, side, side)]]} if "img_shapes" in given else {})}


@dataclass(frozen=True)
class Model:
    """How one of the table's models is made.

    Attributes:
        guided: whether each call has the samples with and without their condition.
        latents: channels of an image's latents, if its autoencoder is known, and its side in pixels; text: tokens that
            go through T5-XXL.
        fresh: whether its rows were first looked at when all of the planner was as it is.
    """

    example: Callable[[], Example]
    guided: bool
    latents: int = 0
    size: int = 0
    text: int = 0
    fresh: bool = False

    def build(self) -> Example:
        model, given = self.example()
        return (model, pytree.tree_map_only(torch.Tensor, _doubled, given)) if self.guided else (model, given)


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == 1 else tensor


IMAGES = {"1024x1024": 1024, "2048x2048": 2048, "4096x4096": 4096}
HUNYUAN_VIDEO = published.hunyuan_video_720p
MODELS: dict[tuple[str, str], Model] = {
    **{("FLUX.1-dev", s): Model(lambda n=n: published.flux_dev(n), False, 16, n, 512) for s, n in IMAGES.items()},
    **{("FLUX.1-schnell", s): Model(lambda n=n: _schnell(n), False, 16, n, 256) for s, n in IMAGES.items()},
    # Their figures leave the autoencoder out: on 16 devices they are a sixteenth.
    **{("PixArt-alpha", s): Model(_image(published_images.pixart_alpha_1024, n), True) for s, n in IMAGES.items()},
    **{("HunyuanDiT", s): Model(_image(published.hunyuan_dit_1024, n), True, 4, n, 512) for s, n in IMAGES.items()},
    ("SD3-medium", "1024x1024"): Model(published.sd3_medium, True, 16, 1024, 512),
    ("CogVideoX-5b", "720x480x49"): Model(published.cogvideox_5b, True),
    ("CogVideoX-2b", "720x480x49"): Model(_cogvideox_2b, True),
    ("CogVideoX1.5-5B", "1360x768x161"): Model(_cogvideox_15_161, True),
    ("HunyuanVideo", "1280x720x129"): Model(HUNYUAN_VIDEO, False),
    ("HunyuanVideo", "960x960x129"): Model(_video(HUNYUAN_VIDEO, 33, 120, 120), False),
    ("Wan2.2-T2V-A14B", "1280x720x81"): Model(published.wan21_14b_720p, True),
    ("Wan2.2-I2V-A14B", "1280x720x81"): Model(published_videos.wan21_i2v_14b_720p, True),
    ("Wan2.1-I2V-14B-480P", "832x480x81"): Model(_video(published_videos.wan21_i2v_14b_720p, 21, 60, 104), True),
    ("Wan2.1-I2V-14B-720P", "1280x720x81"): Model(published_videos.wan21_i2v_14b_720p, True),
    ("ConsisID (CogVideoX-5b)", "720x480x49"): Model(published_videos.consisid, True, fresh=True),
    # Its autoencoder takes 32 pixels for one, four times as many as the others.
    ("SANA-1.6B", "4096x4096"): Model(_image(published_images.sana_1600m_1024, 4096 // 4), True, fresh=True),
    **{("Qwen-Image", s): Model(lambda n=n: _qwen(n), True, fresh=True) for s, n in IMAGES.items()},
}

SOFTWARE = {"xdit_assets": "xDiT", "same": "xDiT", "LightX2V": "xDiT", "Morphic": "xDiT"}
"""By the first word of a source."""

GPUS = {"H100": "h100", "H200": "h200", "A100": "a100-nvlink", "L40": "l40-pcie", "L20": "l20-pcie", "H20": "h20",
        "RTX4090": "rtx4090-pcie", "GB200": "gb200"}
"""The shipped machine of each device."""
