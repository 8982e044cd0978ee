"""Exact content checksums of tensors, for comparing what different ranks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from xdit_compile.ir import host_values

# An integer view no wider than 32 bits: in 64-bit arithmetic a wider word could lose its sign bit (see _sum).
_WORDS = {1: torch.uint8, 2: torch.int16}

# Words of eight bytes in a row, and rows that are added up, of a large tensor. The first is a prime, so that no rows of
# a matrix that are exchanged fall together; both make a megabyte, which a core's cache holds.
_ROW, _ROWS = 509, 256

# Words of a tensor on an accelerator that are weighted at once.
_SPAN = 1 << 22


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """One text per tensor, such as ``float32[1,15,8] 5f3a09c1d2e4b687``; equal bits give equal texts.

    Bit patterns are compared, so -0.0 differs from 0.0 and a NaN equals itself. All tensors of one
    accelerator together cost one host synchronisation. The checksum of a tensor depends on the kind of its
    device (CPU or accelerator), so compare only ranks that run on the same kind.
    """
    return Fingerprint({}, tensors)()


class Fingerprint:
    """What a call is made with, as it was when this was made: some texts, and the `digests` of tensors, which are not
    held on to. Accelerators compute theirs meanwhile."""

    def __init__(self, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        self._texts, self._kinds = dict(texts), {name: _kind(t) for name, t in tensors.items()}
        self._sums: dict[str, int] = {}
        pending: dict[torch.device, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            words = _words(tensor)
            if host_values.on_host(words):
                content = hashlib.sha1(words.view(torch.uint8).numpy().data, usedforsecurity=False)
                self._sums[name] = int.from_bytes(content.digest()[:8], "big")
            else:
                pending.setdefault(words.device, {})[name] = _sum(words)
        self._arriving = [(list(found), host_values.to_host(torch.stack(list(found.values()))))
                          for found in pending.values()]

    def __call__(self) -> dict[str, str]:
        """All as texts. Waits for the accelerators."""
        for names, read in self._arriving:
            self._sums.update(zip(names, read(), strict=True))
        return self._texts | {
            name: f"{kind} {self._sums[name] & 0xFFFFFFFFFFFFFFFF:016x}" for name, kind in self._kinds.items()}


def digest(tensor: Tensor) -> str:
    """`digests` of a single tensor."""
    return digests({"": tensor})[""]


def bulk_digest(tensor: Tensor) -> str:
    """A text such as `digest`'s of a tensor of any size, at the speed of memory.

    Of the words of eight bytes each, those that are `_ROW` apart are summed, `_ROWS` of them, and the sums are hashed:
    whatever changes a single word, or exchanges words that are not a multiple of `_ROW` apart, is seen. As with
    `digest`, compare only ranks on the same kind of device.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = [f"{name} {bulk_digest(getattr(tensor, name))}" for name in names]
        return f"{_kind(tensor)} {_hash(str((inner, context)).encode())}"
    words = _words(tensor)
    if words.device.type != "cpu":
        return digest(tensor)
    content = words.view(torch.uint8).numpy()
    whole = content[: content.size // (8 * _ROW) * 8 * _ROW].view(np.uint64).reshape(-1, _ROW)
    sums = np.empty((-(-len(whole) // _ROWS), _ROW), np.uint64)
    for i in range(len(sums)):
        np.add.reduce(whole[i * _ROWS : (i + 1) * _ROWS], axis=0, out=sums[i])
    return f"{_kind(tensor)} {_hash(sums.tobytes() + content[whole.nbytes :].tobytes())}"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


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
    total = torch.zeros((), device=words.device, dtype=torch.int64)
    for start in range(0, words.numel(), _SPAN):
        span = words[start : start + _SPAN]
        weights = torch.arange(start + 1, start + 1 + span.numel(), device=words.device, dtype=torch.int64)
        weights = weights * -7046029254386353131
        weights = (weights ^ (weights >> 29)) * -4658895280553007687
        weights = (weights ^ (weights >> 32)) | 1
        total += (weights * span).sum()
    return total
