"""The emulation of displaced patches: against plain loops where both are the same, and against the method by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from cases import Inputs, made, randn
from displaced import MODELS, Displaced, Layout, denoise, euler, plain, times
from torch import Tensor, nn

BATCH = 2

cases = pytest.mark.parametrize("entry", [pytest.param(e, id=n) for n, e in MODELS.items()])


@lru_cache(maxsize=1)
def _setup(entry: Displaced) -> tuple[nn.Module, Inputs]:
    return made(entry.case), entry.case.inputs(BATCH, True)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    assert actual.shape == expected.shape
    assert expected.isfinite().all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@cases
def test_against_the_plain_loop(entry: Displaced) -> None:
    """Synchronous steps are exact, so is one patch; four patches are near, but no longer the same."""
    (model, inputs), layout = _setup(entry), entry.layout
    schedule = times(inputs, 3)
    expected, outputs = plain(model, inputs, layout, schedule, euler)

    four = layout.cut(inputs, 4)
    actual, found = denoise(model, inputs, layout, schedule, euler, offsets=four, warmup=3)
    assert torch.equal(actual, expected)
    assert all(map(torch.equal, found, outputs))

    actual, found = denoise(model, inputs, layout, schedule, euler, offsets=layout.cut(inputs, 1))
    assert max(map(_difference, [actual, *found], [expected, *outputs])) < 1e-6

    actual, found = denoise(model, inputs, layout, schedule, euler, offsets=four)
    assert torch.equal(found[0], outputs[0])
    assert 1e-6 < _difference(actual, expected) < 0.5
    assert all(_difference(f, o) > 1e-6 for f, o in zip(found[1:], outputs[1:], strict=True))


@cases
def test_nothing_changes_between_steps(entry: Displaced) -> None:
    """Then what is kept is as good as new: for every cut, in any dimension."""
    (model, inputs), layout = _setup(entry), entry.layout
    still = [inputs["timestep"]] * 2
    _, outputs = plain(model, inputs, layout, still[:1], lambda sample, output, i: sample)
    sample = inputs[layout.sample]
    cuts = [(layout.dim, layout.cut(inputs, 8))]
    for dim in (d for d, unit in enumerate(layout.patch) if unit):
        unit = layout.patch[dim]
        cuts.append((dim, [0, unit, sample.shape[dim]]))  # uneven
    for dim, offsets in cuts:
        _, found = denoise(model, inputs, layout, still, lambda sample, output, i: sample, offsets=offsets, dim=dim)
        assert _difference(found[1], outputs[0]) < 1e-5


@cases
def test_inputs(entry: Displaced) -> None:
    """Eight patches, whichever of the two sizes."""
    for odd in (False, True):
        inputs = entry.case.inputs(1, odd)
        assert len(set(entry.layout.cut(inputs, 8))) == 9


# --------------------------------------------------------------------------------------------------
# By hand


class Joint(nn.Module):
    """Two blocks of joint attention and a linear layer, over a text and then the tokens of an image."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.linear = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        x = torch.cat([text, latents], dim=1)
        for qkv, linear in zip(self.qkv, self.linear, strict=True):
            q, k, v = qkv(x + timestep).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + linear(x).tanh()
        return x[:, text.shape[1] :]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of (batch, tokens, width), head by head."""
    parts = zip(q.chunk(heads, dim=2), k.chunk(heads, dim=2), v.chunk(heads, dim=2), strict=True)
    return torch.cat([(a @ b.mT * a.shape[2] ** -0.5).softmax(dim=-1) @ c for a, b, c in parts], dim=2)


@torch.no_grad()
def _by_hand(model: Joint, inputs: Inputs, offsets: list[int], schedule: list[Tensor], warmup: int) -> Tensor:
    """What the paper says: slices of tokens go through the layers one after the other, and layers keep k and v."""
    latents, text = inputs["latents"], inputs["text"]
    words = text.shape[1]
    kept: dict[tuple[int, str], Tensor] = {}
    for i, time in enumerate(schedule):
        patches = []
        borders = offsets if i >= warmup else [0, offsets[-1]]
        for begin, end in pairwise(borders):
            x = latents[:, begin:end]
            rows = slice(words + begin, words + end)
            if begin == 0:
                x = torch.cat([text, x], dim=1)
                rows = slice(0, words + end)
            for layer in range(2):
                q, k, v = model.qkv[layer](x + time).chunk(3, dim=2)
                for name, tensor in (("k", k), ("v", v)):
                    if i == 0:
                        kept[layer, name] = tensor.clone()
                    kept[layer, name][:, rows] = tensor
                x = x + _attend(q, kept[layer, "k"], kept[layer, "v"], model.heads)
                x = x + model.linear[layer](x).tanh()
            patches.append(x[:, words:] if begin == 0 else x)
        latents = latents - 0.1 * torch.cat(patches, dim=1)
    return latents


@pytest.mark.parametrize("offsets", [[0, 9], [0, 3, 6, 9], [0, 1, 5, 9], list(range(10))], ids=str)
@pytest.mark.parametrize("words", [0, 4])
@pytest.mark.parametrize("warmup", [1, 2])
def test_by_hand(offsets: list[int], words: int, warmup: int) -> None:
    """The method, literally, gives what the interception gives; and not what the plain loop does."""
    torch.manual_seed(0)
    model = Joint()
    inputs = {"latents": randn(1, BATCH, 9, 12), "text": randn(2, BATCH, words, 12), "timestep": torch.tensor(0.8)}
    layout = Layout("latents", 1, (0, 1, 0), text="text", text_first=True)
    schedule = times(inputs, 4)
    expected = _by_hand(model, inputs, offsets, schedule, warmup)
    actual, _ = denoise(model, inputs, layout, schedule, euler, offsets=offsets, warmup=warmup)
    assert _difference(actual, expected) < 1e-6
    exact, _ = plain(model, inputs, layout, schedule, euler)
    assert (_difference(exact, expected) > 1e-4) == (len(offsets) > 2)


class Convolved(nn.Module):
    """Two blocks of linear attention, then a convolution between neighbouring tokens of the image."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.conv = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        for qkv, conv in zip(self.qkv, self.conv, strict=True):
            x = (image + timestep).flatten(2).mT
            q, k, v = qkv(x).relu().chunk(3, dim=2)
            mixed = torch.matmul(torch.matmul(v.mT, k), q.mT)
            image = image + 0.1 * mixed.unflatten(2, image.shape[2:])
            image = image + conv(image)
        return image


@torch.no_grad()
def _convolved_by_hand(model: Convolved, image: Tensor, offsets: list[int], schedule: list[Tensor]) -> Tensor:
    """Row by row of the image; a row of a convolution takes the rows that the layer keeps around it."""
    kept: dict[tuple[int, str], Tensor] = {}
    height, width = image.shape[2:]
    for i, time in enumerate(schedule):
        patches = []
        for begin, end in pairwise(offsets if i else [0, height]):
            x = image[:, :, begin:end]
            for layer in range(2):
                q, k, v = model.qkv[layer]((x + time).permute(0, 2, 3, 1)).relu().chunk(3, dim=3)
                for name, tensor in (("k", k), ("v", v)):
                    if i == 0:
                        kept[layer, name] = tensor.clone()
                    kept[layer, name][:, begin:end] = tensor
                state = torch.einsum("bhwk,bhwv->bkv", kept[layer, "k"], kept[layer, "v"])
                x = x + 0.1 * torch.einsum("bhwk,bkv->bvhw", q, state)
                if i == 0:
                    kept[layer, "rows"] = torch.zeros(len(x), x.shape[1], height + 2, width + 2)  # with its border
                kept[layer, "rows"][:, :, begin + 1 : end + 1, 1:-1] = x
                around = kept[layer, "rows"][:, :, begin : end + 2]
                weight, bias = model.conv[layer].weight, model.conv[layer].bias
                taps = [weight[:, 0, r, c, None, None] * around[:, :, r : r + end - begin, c : c + width]
                        for r in range(3) for c in range(3)]  # fmt: skip
                x = x + sum(taps) + bias[:, None, None]
            patches.append(x)
        image = image - 0.1 * torch.cat(patches, dim=2)
    return image


@pytest.mark.parametrize("offsets", [[0, 7], [0, 2, 4, 7], list(range(8))], ids=str)
def test_convolution_by_hand(offsets: list[int]) -> None:
    """The same for sums over all tokens and for convolutions between them."""
    torch.manual_seed(0)
    model = Convolved()
    inputs = {"image": randn(1, BATCH, 6, 7, 3), "timestep": torch.tensor(0.8)}
    layout = Layout("image", 2, (0, 0, 1, 1))
    schedule = times(inputs, 4)
    expected = _convolved_by_hand(model, inputs["image"], offsets, schedule)
    actual, _ = denoise(model, inputs, layout, schedule, euler, offsets=offsets)
    assert _difference(actual, expected) < 1e-6
    exact, _ = plain(model, inputs, layout, schedule, euler)
    assert (_difference(exact, expected) > 1e-4) == (len(offsets) > 2)


# --------------------------------------------------------------------------------------------------
# Mistakes


def test_tokens_that_meet_elsewhere() -> None:
    """A model whose tokens meet outside of what is intercepted is refused, not computed wrongly."""

    class Pooled(Convolved):
        def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(image, timestep) + image.mean(dim=(2, 3), keepdim=True)

    inputs = {"image": randn(1, BATCH, 6, 7, 3), "timestep": torch.tensor(0.8)}
    layout = Layout("image", 2, (0, 0, 1, 1))
    with pytest.raises(AssertionError, match="outside of attention"):
        denoise(Pooled(), inputs, layout, times(inputs, 2), euler, offsets=[0, 3, 7])


@pytest.mark.parametrize("name", ["sd3", "flux", "hunyuan_video"])
def test_wrong_layout(name: str) -> None:
    """Text on the wrong side of the sample does not pass."""
    entry = MODELS[name]
    model, inputs = _setup(entry)
    layout = replace(entry.layout, text_first=not entry.layout.text_first)
    with pytest.raises(AssertionError, match="outside of attention"):
        denoise(model, inputs, layout, times(inputs, 2), euler, offsets=layout.cut(inputs, 4))
