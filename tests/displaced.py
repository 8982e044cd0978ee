"""PipeFusion's displaced patches (arXiv 2405.14430) in one process, from the paper: nothing of the package is used.

The tokens of the sample are cut into patches. In one denoising step the model runs for one patch after the other,
each through all layers. In a layer the queries of a patch attend to the keys and values of the whole sequence: those
of this patch and of the ones before it are of this step, the others are what the layer kept from the step before.
Text that is attended to jointly runs with the first patch. The first ``warmup`` steps run the whole model.

For one patch the *whole, unmodified* model runs, and each call in which tokens meet is intercepted: the patch's rows
of its keys and values go into what that call kept, and the call gets all that is kept. Then the patch's rows of the
result are those of the method. All other rows hold NaN, in the sample and in what attention gives, so that tokens
that meet anywhere else spoil the result, which is an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import zoo_images
from cases import Case, Inputs, randn, rotary, text_length
from models import CASES
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Step = Callable[[Tensor, Tensor, int], Tensor]
"""The next sample from the sample, the model's output and the number of the step; works element by element."""


@dataclass(frozen=True)
class Layout:
    """How a model makes tokens of its arguments."""

    sample: str
    """The argument that is denoised."""
    dim: int
    """Its dimension that is cut, unless told otherwise."""
    patch: tuple[int, ...]
    """How many elements along each of its dimensions one token takes; 0 in dimensions of batch and channels.

    The order of the tokens is that of the dimensions."""
    text: str | None = None
    """The argument, (batch, tokens, channels), whose tokens stand in one sequence with those of the sample."""
    text_first: bool = False
    """Whether they stand before those of the sample."""

    def tokens(self, elements: Tensor) -> Tensor:
        """One element for each token, in their order, of a tensor that has the sample's shape."""
        return elements[tuple(slice(None, None, p) if p else 0 for p in self.patch)].flatten()

    def cut(self, inputs: Inputs, patches: int, dim: int | None = None) -> list[int]:
        """Borders of nearly equal patches along ``dim``, in elements."""
        dim = self.dim if dim is None else dim
        units = inputs[self.sample].shape[dim] // self.patch[dim]
        return [i * units // patches * self.patch[dim] for i in range(patches + 1)]


# --------------------------------------------------------------------------------------------------
# The method


class Kept(TorchFunctionMode):
    """Gives calls in which tokens meet what earlier runs of the model kept, with this run's own rows in it.

    ``kept`` has a tensor for each such argument, in the order of the calls. ``image`` and ``text`` say which tokens
    are this run's own; a whole run owns all and its arguments pass as they are.
    """

    def __init__(self, kept: list[Tensor], image: Tensor, text: Tensor, text_first: bool) -> None:
        super().__init__()
        joint = torch.cat([text, image] if text_first else [image, text])
        self.own = {len(image): image, len(joint): joint}
        self.image = image
        self.whole = bool(joint.all())
        self.kept = kept
        self.used = 0

    def merged(self, tensor: Tensor, dim: int, own: Tensor) -> Tensor:
        """Write own rows along ``dim`` into what is kept; all that is then kept."""
        if self.used == len(self.kept):
            assert self.whole, "a call that the first run did not make"
            self.kept.append(tensor.clone())
        kept = self.kept[self.used]
        self.used += 1
        assert kept.shape == tensor.shape
        rows = own.nonzero().flatten()
        kept.index_copy_(dim, rows, tensor.index_select(dim, rows))
        return tensor if self.whole else kept.clone()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is torch.matmul:
            return self.matmul(*args, **kwargs)
        if func is torch.conv2d:
            return self.conv2d(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All have their tokens in the second-to-last place. Text alone, as cross attention has it, never changes."""
        own = self.own.get(key.shape[-2])
        if own is None:
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        assert query.shape[-2] == len(own)
        key, value = self.merged(key, key.ndim - 2, own), self.merged(value, value.ndim - 2, own)
        result = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        return result if self.whole else result.masked_fill(~own[:, None], torch.nan)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """Linear attention sums values times keys over all tokens of the image."""
        if left.shape[-1] == len(self.image):
            left = self.merged(left, left.ndim - 1, self.image)
            right = self.merged(right, right.ndim - 2, self.image)
        return torch.matmul(left, right)

    def conv2d(self, image: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], *args: Any) -> Tensor:
        """A convolution between tokens looks beyond the patch; one that makes tokens, or acts on each, does not."""
        if weight.shape[2] > stride[0] or weight.shape[3] > stride[1]:
            assert image.shape[-2:].numel() == len(self.image)
            image = self.merged(image.flatten(2), 2, self.image).unflatten(2, image.shape[-2:])
        return torch.conv2d(image, weight, bias, stride, *args)


def result(model: nn.Module, inputs: Inputs) -> Tensor:
    """The first tensor of what the model gives."""
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


class Emulation:
    """A model called step by step as the method computes it, with what it keeps of one condition's steps.

    ``offsets`` are the borders of the patches along ``dim`` of the sample, from 0 to its length.
    """

    def __init__(self, model: nn.Module, layout: Layout, *, offsets: Sequence[int], dim: int | None = None,
                 warmup: int = 1) -> None:
        self.model, self.layout, self.offsets, self.warmup = model, layout, list(offsets), warmup
        self.dim = layout.dim if dim is None else dim
        unit = layout.patch[self.dim]
        assert self.offsets[0] == 0 and self.offsets == sorted(set(self.offsets))
        assert unit and not any(o % unit for o in self.offsets)
        assert warmup > 0, "something has to be kept first"
        self.kept: list[Tensor] = []
        self.steps = 0

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        """The output of the next step."""
        layout, dim = self.layout, self.dim
        sample: Tensor = inputs[layout.sample]
        length = sample.shape[dim]
        assert self.offsets[-1] == length
        shape = [-1 if d == dim else 1 for d in range(sample.ndim)]
        labels = torch.bucketize(torch.arange(length), torch.tensor(self.offsets[1:-1], dtype=torch.int64), right=True)
        labels = labels.view(shape).expand_as(sample)
        tokens = layout.tokens(labels)
        texts = inputs[layout.text].shape[1] if layout.text else 0
        assert texts != len(tokens), "a call would not show whether it is of text"
        self.steps += 1
        if self.steps <= self.warmup:
            everything = torch.ones(len(tokens) + texts, dtype=torch.bool).split([len(tokens), texts])
            with Kept(self.kept, *everything, layout.text_first) as mode:
                output = result(self.model, inputs)
            assert mode.used == len(self.kept) > 0
            return output
        parts = []
        for patch, (begin, end) in enumerate(pairwise(self.offsets)):
            alone = sample.masked_fill(labels != patch, torch.nan)
            own_text = torch.full((texts,), patch == 0)
            with Kept(self.kept, tokens == patch, own_text, layout.text_first) as mode:
                part = result(self.model, inputs | {layout.sample: alone}).narrow(dim, begin, end - begin)
            assert mode.used == len(self.kept)
            assert part.isfinite().all(), "tokens of other patches meet this one's outside of attention"
            parts.append(part)
        return torch.cat(parts, dim)


@torch.no_grad()
def denoise(model: nn.Module, inputs: Inputs, layout: Layout, times: Sequence[Tensor], step_fn: Step, *,
            offsets: Sequence[int], dim: int | None = None, warmup: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The sample after a step for each of ``times`` (the argument ``timestep``), and the output of every step."""
    emulated = Emulation(model, layout, offsets=offsets, dim=dim, warmup=warmup)
    sample, outputs = inputs[layout.sample], []
    for i, time in enumerate(times):
        outputs.append(emulated(**inputs | {layout.sample: sample, "timestep": time}))
        sample = step_fn(sample, outputs[-1], i)
    return sample, outputs


@torch.no_grad()
def plain(model: nn.Module, inputs: Inputs, layout: Layout, times: Sequence[Tensor],
          step_fn: Step) -> tuple[Tensor, list[Tensor]]:
    """The same loop with the model as it is."""
    sample, outputs = inputs[layout.sample], []
    for i, time in enumerate(times):
        outputs.append(result(model, inputs | {layout.sample: sample, "timestep": time}))
        sample = step_fn(sample, outputs[-1], i)
    return sample, outputs


def times(inputs: Inputs, steps: int) -> list[Tensor]:
    """Timesteps from the one in ``inputs`` down to half of it."""
    first = inputs["timestep"]
    return [(first * (1 - i / (2 * steps))).to(first.dtype) for i in range(steps)]


def euler(sample: Tensor, output: Tensor, i: int) -> Tensor:
    """A step of a fixed size. Where a variance comes too, it is the second half of the output's channels."""
    return sample - 0.1 * (output if output.shape == sample.shape else output.chunk(2, dim=1)[0])


# --------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Displaced:
    """A test model with inputs that have at least eight tokens along the dimension that is cut."""

    case: Case
    layout: Layout

    def deep(self, layers: int) -> Displaced:
        """The same with so many blocks (of its first kind)."""
        def build() -> nn.Module:
            model = self.case.build()
            config = {key: value for key, value in model.config.items() if not key.startswith("_")}
            return type(model).from_config(config | {"num_layers": layers})

        return replace(self, case=replace(self.case, build=build))


def grid(odd: bool) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""
    return (11, 3) if odd else (8, 4)


def video_grid(odd: bool) -> tuple[int, int, int]:
    """Frames, rows and columns of a video's tokens."""
    return (9, 9, 2) if odd else (8, 8, 2)


def _image(inputs: Callable[[int, bool], Inputs], batch: int, odd: bool, unit: int = 2, square: bool = False) -> Inputs:
    """(batch, channels, height, width)."""
    rows, columns = grid(odd)
    given = inputs(batch, odd)
    channels = given["hidden_states"].shape[1]
    given["hidden_states"] = randn(1, batch, channels, unit * rows, unit * (rows if square else columns))
    if "image_rotary_emb" in given:
        given["image_rotary_emb"] = rotary(rows * columns, 16)
    return given


def _packed(inputs: Callable[[int, bool], Inputs], batch: int, odd: bool) -> Inputs:
    """(batch, tokens, channels), with places or the grid's size."""
    rows, columns = grid(odd)
    given = inputs(batch, odd)
    given["hidden_states"] = randn(1, batch, rows * columns, given["hidden_states"].shape[2])
    if "img_ids" in given:
        given["img_ids"] = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
    if "img_shapes" in given:
        given["img_shapes"] = [[(1, rows, columns)]] * batch
    return given


def _packed_video(inputs: Callable[[int, bool], Inputs], batch: int, odd: bool) -> Inputs:
    """(batch, tokens, channels), with the grid's size."""
    frames, rows, columns = video_grid(odd)
    given = inputs(batch, odd)
    video = randn(1, batch, frames * rows * columns, given["hidden_states"].shape[2])
    return given | {"hidden_states": video, "num_frames": frames, "height": rows, "width": columns}


def _video(inputs: Callable[[int, bool], Inputs], batch: int, odd: bool) -> Inputs:
    """(batch, channels, frames, height, width); tokens of 1 x 2 x 2."""
    frames, rows, columns = video_grid(odd)
    given = inputs(batch, odd)
    return given | {"hidden_states": randn(1, batch, 4, frames, 2 * rows, 2 * columns)}


def _frames(inputs: Callable[[int, bool], Inputs], batch: int, odd: bool) -> Inputs:
    """(batch, frames, channels, height, width); tokens of 1 x 2 x 2."""
    frames, rows, columns = video_grid(odd)
    given = inputs(batch, odd)
    given["hidden_states"] = randn(1, batch, frames, 4, 2 * rows, 2 * columns)
    if given["image_rotary_emb"] is not None:
        given["image_rotary_emb"] = rotary(frames * rows * columns, 16)
    return given


def _cogvideox() -> nn.Module:
    """Positions are a buffer, of the sizes of ``odd``."""
    from diffusers import CogVideoXTransformer3DModel

    frames, rows, columns = video_grid(True)
    return CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=24,
        text_embed_dim=20, num_layers=3, sample_width=2 * columns, sample_height=2 * rows,
        sample_frames=4 * frames - 3, patch_size=2, max_text_seq_length=text_length(True),
    )  # fmt: skip


def _cogvideox_inputs(batch: int, odd: bool) -> Inputs:
    """The one size that the buffer has, whatever ``odd`` asks for."""
    return _frames(CASES["cogvideox"].inputs, batch, True)


IMAGE = Layout("hidden_states", 2, (0, 0, 2, 2))
PACKED = Layout("hidden_states", 1, (0, 1, 0))
VIDEO = Layout("hidden_states", 2, (0, 0, 1, 2, 2))
FRAMES = Layout("hidden_states", 1, (0, 1, 0, 2, 2))


def _text(layout: Layout, first: bool) -> Layout:
    """With text in the sequence."""
    return replace(layout, text="encoder_hidden_states", text_first=first)


def _entries(names: str, layout: Layout, inputs: Callable[..., Inputs], **options: Any) -> dict[str, Displaced]:
    """Cases with larger grids."""
    known = CASES | zoo_images.CASES
    return {
        name: Displaced(replace(known[name], inputs=partial(inputs, known[name].inputs, **options)), layout)
        for name in names.split()
    }


MODELS: dict[str, Displaced] = {
    **_entries("dit", IMAGE, _image, square=True),
    **_entries("pixart_alpha pixart_sigma pixart_sigma_nomask", IMAGE, _image),
    **_entries("sd3 sd3_dual", _text(IMAGE, first=False), _image),
    **_entries("flux flux_guidance", _text(PACKED, first=True), _packed),
    **_entries("hunyuan_dit hunyuan_dit_style", IMAGE, _image),
    **_entries("sana sana_nomask sana_sprint", replace(IMAGE, patch=(0, 0, 1, 1)), _image, unit=1),
    **_entries("qwen_image qwen_image_mask", _text(PACKED, first=True), _packed),
    **_entries("wan wan_i2v", VIDEO, _video),
    "cogvideox": Displaced(
        replace(CASES["cogvideox"], build=_cogvideox, inputs=_cogvideox_inputs), _text(FRAMES, first=True)
    ),
    **_entries("cogvideox_rotary", _text(FRAMES, first=True), _frames),
    **_entries(
        "hunyuan_video hunyuan_video_plain hunyuan_video_token_replace", _text(VIDEO, first=False), _video
    ),
    **_entries("ltx ltx_nomask", PACKED, _packed_video),
}
