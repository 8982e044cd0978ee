"""Attention kernels that also return their log-sum-exp, behind two operators, and the merge of their results.

Importing this package registers `torch.ops.xdit_compile.attention_lse` and `.attention` (see `ops`).
"""

from xdit_compile.kernels import ops as _ops
from xdit_compile.kernels.base import Kernel, KernelUnavailable
from xdit_compile.kernels.merging import merge
from xdit_compile.kernels.registry import KERNELS, resolve

attention = _ops.attention
attention_lse = _ops.attention_lse

__all__ = ["KERNELS", "Kernel", "KernelUnavailable", "attention", "attention_lse", "merge", "resolve"]
