"""xdit_compile: a compiler that runs any Diffusion Transformer on many devices, with the answer of one."""

from xdit_compile.launch import launch
from xdit_compile.parallel import parallelize
from xdit_compile.spec import ShardingSpec

__all__ = ["ShardingSpec", "launch", "parallelize"]
