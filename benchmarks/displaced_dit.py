"""Displaced patches (PipeFusion, arXiv 2405.14430, section 3) on one device, for diffusers' DiT: what a patch would
read without an exact step at the start, which the package refuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


class DisplacedAttention:
    """An attention processor for one layer and one denoising loop.

    At each step the queries of patch p read keys and values of this step from patches 0 to p, which have passed this
    layer, and those of the step before from the others. In a first step that is not exact there is nothing of the
    others, and p reads patches 0 to p alone.

    Args:
        patches: of the tokens, in order, of equal size.
        warmup: calls at the start in which all read all.
    """

    def __init__(self, patches: int, warmup: int) -> None:
        self.patches = patches
        self.warmup = warmup
        self.calls = 0
        self.before: tuple[Tensor, Tensor] | None = None

    def __call__(self, attn: Attention, hidden_states: Tensor, **given: object) -> Tensor:
        """Of tokens (batch, tokens, channels)."""
        if any(value is not None for value in given.values()):
            raise ValueError(f"self-attention without masks was expected, not {sorted(given)}")
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for layer in (attn.to_q, attn.to_k, attn.to_v))
        if self.calls < self.warmup:
            out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        else:
            out = torch.cat([self._of_patch(p, part, k, v, attn.scale)
                             for p, part in enumerate(q.chunk(self.patches, dim=2))], dim=2)
        self.calls += 1
        self.before = (k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def _of_patch(self, patch: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        come = (patch + 1) * q.shape[2]
        keys, values = k[:, :, :come], v[:, :, :come]
        if self.before is not None:
            keys = torch.cat([keys, self.before[0][:, :, come:]], dim=2)
            values = torch.cat([values, self.before[1][:, :, come:]], dim=2)
        return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def displace(model: DiTTransformer2DModel, patches: int, warmup: int) -> None:
    """Let ``model`` draw one batch of images as PipeFusion with these settings would."""
    for block in model.transformer_blocks:
        block.attn1.set_processor(DisplacedAttention(patches, warmup))
