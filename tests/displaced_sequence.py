"""DistriFusion's displaced sequence (arXiv 2402.19481) in one process, from the paper: nothing of the package is used.

The tokens are shared out among ranks. In a step that is not exact a rank's queries attend to its own keys and values
of this step, and to those that the others had in the step before. Convolutions read borders, and group norms moments,
of others likewise. For each rank the whole, unmodified model runs, and each call in which tokens meet is intercepted:
of others it is given what they had; then this rank's rows of the result are those of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from displaced import Layout, result
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Late(TorchFunctionMode):
    """One rank's step, or an exact one.

    Args:
        own: by the number of tokens of a sequence, which of them are this rank's.
        rows: of pictures, by their height, this rank's rows.
        before: what each call was given in the step before, if this step is not exact.
    """

    def __init__(self, own: dict[int, Tensor], rows: dict[int, tuple[int, int]], before: Sequence[Tensor] | None,
                 ranks: int = 1) -> None:
        super().__init__()
        self.own, self.rows, self.before, self.ranks = own, rows, before, ranks
        self.now: list[tuple[Tensor, Tensor]] = []
        """What each call was given, and which of it is this rank's."""

    def merged(self, tensor: Tensor, dim: int, own: Tensor) -> Tensor:
        """Others' rows along ``dim`` as they were."""
        at = len(self.now)
        own = own.view([-1 if i == dim else 1 for i in range(tensor.ndim)])
        self.now.append((tensor, own))
        return tensor if self.before is None else torch.where(own, tensor, self.before[at])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is torch.conv2d:
            return self.conv2d(*args, **kwargs)
        if func is F.group_norm and args[0].ndim == 4 and args[0].shape[2] in self.rows:
            return self.group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = self.own.get(key.shape[-2])
        if own is not None:
            key, value = self.merged(key, key.ndim - 2, own), self.merged(value, value.ndim - 2, own)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def conv2d(self, image: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, *args: Any) -> Tensor:
        if weight.shape[2] > stride[0] and image.shape[2] in self.rows:
            image = self.merged(image, 2, self._mask(image.shape[2]))
        return torch.conv2d(image, weight, bias, stride, *args)

    def _mask(self, height: int) -> Tensor:
        start, stop = self.rows[height]
        return (torch.arange(height) >= start) & (torch.arange(height) < stop)

    def group_norm(self, image: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """With moments put together from those of each rank's rows."""
        height = image.shape[2]
        shares = image.unflatten(1, (groups, -1)).chunk(self.ranks, dim=3)
        moments = torch.stack([torch.stack([x.mean((2, 3, 4)), x.var((2, 3, 4), correction=0)]) for x in shares])
        start, stop = self.rows[height]
        mine = (torch.arange(self.ranks) * (height // self.ranks) >= start) & (
            torch.arange(self.ranks) * (height // self.ranks) < stop)
        moments = self.merged(moments, 0, mine)
        centre = moments[:, 0].mean(0)
        spread = moments[:, 1].mean(0) + (moments[:, 0] - centre).square().mean(0)
        grouped = (image.unflatten(1, (groups, -1)) - centre[:, :, None, None, None]) / (
            spread[:, :, None, None, None] + eps).sqrt()
        return grouped.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


class Emulation:
    """A model called step by step as the method computes it.

    Args:
        shares: of each rank, which tokens of sequences of a length are its own: (tokens,), true or false.
        image: the number of tokens of the sample.
        rows: of each rank, its rows of pictures, by their height, where convolutions and group norms are shared out.
    """

    def __init__(self, model: nn.Module, layout: Layout, shares: list[dict[int, Tensor]], image: int,
                 rows: list[dict[int, tuple[int, int]]] | None = None, warmup: int = 1) -> None:
        self.model, self.layout, self.shares, self.image, self.warmup = model, layout, shares, image, warmup
        self.rows = rows or [{} for _ in shares]
        self.before: list[Tensor] = []
        self.steps = 0

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        exact, self.steps = self.steps < self.warmup, self.steps + 1
        sample = inputs[self.layout.sample]
        whole, now = None, list[Tensor]()
        for own, rows in zip(self.shares, self.rows, strict=True):
            with Late(own, rows, None if exact else self.before, len(self.shares)) as step:
                out = result(self.model, inputs)
            mask = self._elements(own[self.image], sample)
            whole = out if whole is None else torch.where(mask, out, whole)
            now = [torch.where(mine, t, n) for (t, mine), n in zip(
                step.now, now or [t for t, _ in step.now], strict=True)]
        self.before = now
        assert whole is not None
        return whole

    def _elements(self, own: Tensor, sample: Tensor) -> Tensor:
        """Which elements of the sample, channels and batch aside, tokens are of."""
        patch = self.layout.patch
        mask = own.view([n // p if p else 1 for n, p in zip(sample.shape, patch, strict=True)])
        for dim, p in enumerate(patch):
            mask = mask.repeat_interleave(p, dim) if p > 1 else mask
        return mask
