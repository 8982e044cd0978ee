"""Attention kernels that also return their log-sum-exp, behind two operators, and the merge of their results.

Importing this package registers `torch.ops.xdit_compile.attention_lse` and `.attention` (see `ops`).
"""

from . import ops as _ops
from .base import Kernel, KernelUnavailable
from .merging import merge
from .registry import KERNELS, resolve

attention = _ops.attention
attention_lse = _ops.attention_lse

__all__ = ["KERNELS", "Kernel", "KernelUnavailable", "attention", "attention_lse", "merge", "resolve"]
