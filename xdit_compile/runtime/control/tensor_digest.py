"""Exact content checksums of tensors, for comparing what different ranks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# An integer view no wider than 32 bits: in 64-bit arithmetic a wider word could lose its sign bit (see _sum).
_WORDS = {1: torch.uint8, 2: torch.int16}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """One text per tensor, such as ``float32[1,15,8] 5f3a09c1d2e4b687``; equal bits give equal texts.

    Bit patterns are compared, so -0.0 differs from 0.0 and a NaN equals itself. All tensors of one
    accelerator together cost one host synchronisation. The checksum of a tensor depends on the kind of its
    device (CPU or accelerator), so compare only ranks that run on the same kind.
    """
    sums: dict[str, int] = {}
    pending: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        words = _words(tensor)
        if words.device.type == "cpu":
            content = hashlib.sha1(words.view(torch.uint8).numpy().data, usedforsecurity=False)
            sums[name] = int.from_bytes(content.digest()[:8], "big")
        else:
            pending.setdefault(words.device, {})[name] = _sum(words)
    for found in pending.values():
        sums.update(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    return {name: f"{_kind(t)} {sums[name] & 0xFFFFFFFFFFFFFFFF:016x}" for name, t in tensors.items()}


def digest(tensor: Tensor) -> str:
    """`digests` of a single tensor."""
    return digests({"": tensor})[""]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bits in logical order as a flat integer tensor."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single element passes for contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(_WORDS.get(flat.element_size(), torch.int32))


def _sum(words: Tensor) -> Tensor:
    """Position-weighted sum modulo 2**64, left on the device.

    The weights are odd, so a change of one word always changes the sum, and scrambled, so that changes at
    several places (a swap, a shift) do not cancel except by a chance of about 2**-33 at worst.
    """
    weights = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
    weights = weights * -7046029254386353131
    weights = (weights ^ (weights >> 29)) * -4658895280553007687
    weights = (weights ^ (weights >> 32)) | 1
    return (weights * words).sum()
