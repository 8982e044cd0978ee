"""An exact account of the collectives some code runs: how many, and the bytes this rank gives to others.

One counter for every contestant, below all of them: PyTorch's dispatcher sees functional and non-functional
collectives alike, with their sizes. What an algorithm inside a backend relays is not counted, only what the
collective itself has to bring from this rank to the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
SILENT = (
    "wait_tensor",
    "_wrap_tensor_autograd",
    "barrier",
    "monitored_barrier_",
    "check_for_nan",
    "recv_",
    "recv_any_source_",
    "irecv",
)
"""Of those namespaces: what gives no tensor of this rank to another."""


@dataclass
class Traffic:
    """What one rank sent."""

    collectives: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    """Both by the name of the operator, as in ``all_to_all_single``."""
    control: int = 0
    """Bytes that went through gloo groups outside the dispatcher: our control plane's digests."""

    def add(self, name: str, size: float) -> None:
        self.collectives[name] += 1
        self.bytes[name] += math.ceil(size)


class Count(TorchDispatchMode):
    """Within: every collective of this thread is added to ``traffic``. An unknown one is an error, not 0."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if of_dtensors(types):
            return NotImplemented
        if func.namespace in NAMESPACES:
            name = func._schema.name.split("::")[1]
            if name not in SILENT:
                if name not in SENT:
                    raise NotImplementedError(f"no rule for the bytes of {func}")
                self.traffic.add(name, SENT[name](*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def of_dtensors(types: Iterable[type]) -> bool:
    """Whether an operator is one of DTensors: what counts is what their shards do, and what is sent for them, both of
    which come by after a mode has let it pass."""
    return any(issubclass(t, DTensor) for t in types)


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count this thread's collectives, and the bytes of bare gloo groups beside the dispatcher."""
    traffic = Traffic()
    bare = dist.ProcessGroupGloo.alltoall_base

    def alltoall_base(self: Any, output: Tensor, given: Tensor, *rest: Any) -> Any:
        traffic.control += _size(given) * (self.size() - 1) // self.size()
        return bare(self, output, given, *rest)

    dist.ProcessGroupGloo.alltoall_base = alltoall_base
    try:
        with Count(traffic):
            yield traffic
    finally:
        dist.ProcessGroupGloo.alltoall_base = bare


def _size(value: Any) -> int:
    """Bytes of a tensor, or of all in a list."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else sum(map(_size, value))


def _group(value: Any) -> ProcessGroup:
    if isinstance(value, str):
        return _resolve_process_group(value)
    return value if isinstance(value, ProcessGroup) else ProcessGroup.unbox(value)


def _others(given: Tensor, splits: Any, group: Any) -> float:
    """Bytes of an all-to-all that are not for this rank itself."""
    found = _group(group)
    if not splits:
        return _size(given) * (found.size() - 1) / found.size()
    row = _size(given) // given.shape[0] if given.shape[0] else 0
    return row * (sum(splits) - splits[found.rank()])


def _to_all(given: Any, group: Any) -> int:
    return _size(given) * (_group(group).size() - 1)


def _share(given: Any, group: Any) -> float:
    """Each rank is given its share, the own one stays: reduce-scatter."""
    return _size(given) * (_group(group).size() - 1) / _group(group).size()


def _broadcast(given: Any, group: Any, root: int) -> int:
    return _to_all(given, group) if _group(group).rank() == root else 0


# An all-reduce is a reduce-scatter and an all-gather of the shares.
SENT: dict[str, Callable[..., float]] = {
    "all_to_all_single": lambda x, out, splits, group: _others(x, splits, group),
    "all_gather_into_tensor": lambda x, n, group: _to_all(x, group),
    "all_gather_into_tensor_out": lambda x, n, group, out: _to_all(x, group),
    "all_gather_into_tensor_coalesced": lambda x, n, group: _to_all(x, group),
    "all_reduce": lambda x, op, group: 2 * _share(x, group),
    "all_reduce_": lambda x, op, group: 2 * _share(x, group),
    "all_reduce_coalesced": lambda x, op, group: 2 * _share(x, group),
    "reduce_scatter_tensor": lambda x, op, n, group: _share(x, group),
    "broadcast": lambda x, root, group: _broadcast(x, group, root),
    "broadcast_": lambda x, group, root, *_: _broadcast(x, group, root),
    "isend": lambda x, to, tag, group: _size(x),
    "alltoall_base_": lambda out, x, group, to, splits, *_: _others(x, splits, group),
    "alltoall_": lambda out, x, group, *_: _size(x) - _size(x[_group(group).rank()]),
    "allgather_": lambda out, x, group, *_: _to_all(x, group),
    "_allgather_base_": lambda out, x, group, *_: _to_all(x, group),
    "allgather_into_tensor_coalesced_": lambda out, x, group, *_: _to_all(x, group),
    "allreduce_": lambda x, group, *_: 2 * _share(x, group),
    "_reduce_scatter_base_": lambda out, x, group, *_: _share(x, group),
    "send": lambda x, group, to, tag: _size(x),
}
