"""What an attention kernel is, and why one may be unusable."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xdit_compile.errors import XditError

HALF_DTYPES = (torch.float16, torch.bfloat16)


class KernelUnavailable(XditError):
    """Raised when the attention kernel that was asked for is absent, or unable to do what it was asked to."""


def unavailable(name: str, reason: str) -> KernelUnavailable:
    """The error to raise when kernel `name` was asked for and `reason` stands in the way."""
    return KernelUnavailable(
        f"attention kernel {name!r} was asked for but cannot be used: {reason}. "
        "Remove that obstacle, or ask for kernel 'auto' or 'torch'."
    )


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention. Being absent depends on the machine only, being unable on the inputs.

    Attributes:
        name: what a user asks for.
        available: None, or why it is absent from this machine.
        supports: called with (device type, dtype, head_dim, value_dim, masked); None, or why it is unable.
        forward: called with (q, k, v, mask, scale), the arguments and results of
            `xdit_compile::attention_lse`, only for inputs that are not empty and that `supports` accepted.
        like: called as `forward` with fake tensors; its results have the shapes, types and strides of `forward`'s. It
            needs neither the package nor a device, so that programs can be made and compiled anywhere.
        approximate: whether it computes something else than attention on purpose. Never chosen but by its name.
    """

    name: str
    available: Callable[[], str | None]
    supports: Callable[[str, torch.dtype, int, int, bool], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], tuple[Tensor, Tensor]]
    like: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], tuple[Tensor, Tensor]]
    approximate: bool = False


def package_problem(package: str, attribute: str, extra: str = "", install: str = "") -> str | None:
    """None if `package` imports and has `attribute`, else what is wrong with it: how to `install` it, if by no `extra`.

    Only ImportError is turned into a reason, with its text: another error raised by a package while it is
    imported is a fault to be seen as it is.
    """
    if importlib.util.find_spec(package) is None:
        install = install or f"pip install 'xdit-compile[{extra}]'"
        return f"the package {package!r} is not installed ({install})"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        return f"the package {package!r} is installed but fails to import: {error}"
    if not hasattr(module, attribute):
        return f"the package {package!r} is installed but has no {attribute!r}: another version or project?"
    return None


def flash_problem(
    device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool
) -> str | None:
    """None if a FlashAttention-2 or -3 kernel can do this, else the reason: they all share these limits."""
    if device_type != "cuda":
        return f"it runs on CUDA devices only, not on {device_type!r}"
    if not ampere_or_newer():
        return "it needs a GPU of compute capability 8.0 or newer"
    if dtype not in HALF_DTYPES:
        return f"it computes in float16 or bfloat16, not in {dtype}"
    if masked:
        return "it takes no attention mask"
    if head_dim != value_dim:
        return f"it needs values as wide as keys, not {value_dim} beside {head_dim}"
    if head_dim > 256:
        return f"it handles head dimensions up to 256, not {head_dim}"
    return None


def like_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.like`, for packages whose result is new memory of (B, S, H, D) and whose log-sum-exp is (B, H, S)."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@functools.cache
def ampere_or_newer() -> bool:
    """Whether this machine's GPU can run FlashAttention; where there is none, one to come is assumed to."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
