"""What an operator has to be given beside what its fake kernel compares: some kernels believe it, and would read or
write elsewhere, or end the process. Arguments are fake tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xdit_compile.errors import ArtifactError

MOST_RESULTS = 2**16
"""Of one operator."""
GroupSizes = Mapping[str, int]
"""The size of each group of processes that graphs may name."""
INDEXED: Mapping[str, tuple[int, int | None, bool]] = {
    "aten.embedding.default": (1, 0, False),
    "aten.gather.default": (2, 1, False),
    "aten.index_select.default": (2, 1, False),
    "aten.scatter.src": (2, 1, False),
    "aten.scatter.value": (2, 1, False),
    "aten.scatter_add.default": (2, 1, False),
    "aten.index_copy.default": (2, 1, False),
    "aten.index.Tensor": (1, None, True),
    "aten.index_put.default": (1, None, True),
}
"""Of operators that take indices: the argument that holds them; that which says the dimension, or 0 for the first
dimension of the first argument, or None where they are a list, one for each; whether they may count from the end."""


def before(kind: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], results: int,
           groups: GroupSizes) -> None:
    """Checks that come before the fake kernel runs.

    Args:
        args, kwargs: the former all that may be given by place; the latter the rest.
        results: how many the file says that there are.

    Raises:
        ArtifactError: the operator may not be called so.
    """
    if results > MOST_RESULTS:
        raise ArtifactError(f"it makes {results} results")
    if kind == "several" and (found := _count(name, args)) != results:
        raise ArtifactError(f"it makes {found} results, but {results} are taken")
    if kind == "bits" and args[1] is torch.bool:
        raise ArtifactError("it takes bytes for truth values")
    if kind == "attention":
        _attention(name, *args, **kwargs)
    elif kind == "window":
        _window(args)
    elif kind == "collective":
        _collective(name, args, groups)


def _count(name: str, args: Sequence[Any]) -> int:
    """How many results an operator has that makes several."""
    x = args[0]
    if isinstance(x, (list, tuple)):
        return len(x)
    place = 1 if name == "aten.unbind.int" else 2
    size = x.shape[args[place] if len(args) > place else 0]
    if name == "aten.unbind.int":
        return size
    if name.startswith("aten.split_with_sizes"):
        return len(args[1])
    if args[1] < 1:
        raise ArtifactError(f"it splits by {args[1]}")
    if name.startswith("aten.chunk"):
        each = -(-size // args[1])
        return -(-size // each) if each else args[1]
    return max(1, -(-size // args[1]))


def _attention(name: str, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **options: Any) -> None:
    """Kernels rely on all of this, and compare little of it."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim >= 3) or (name.startswith("xdit_compile") and q.ndim != 4):
        raise ArtifactError(f"attention of {shapes}")
    alike = q.shape[:-3] == k.shape[:-3] == v.shape[:-3] if q.ndim > 3 else True
    heads, kv_heads = q.shape[-3], k.shape[-3]
    grouped = q.ndim > 3 and (name.startswith("xdit_compile") or options.get("enable_gqa"))
    fits = (q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2] and kv_heads == v.shape[-3]
            and (heads == kv_heads or (grouped and kv_heads and heads % kv_heads == 0)))
    if not (alike and fits) or not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ArtifactError(f"attention of {shapes} ({q.dtype}, {k.dtype}, {v.dtype}), which do not fit together")
    if name.startswith("aten") and min(q.numel(), k.numel(), v.numel()) == 0:
        raise ArtifactError(f"attention of {shapes}: some of it is empty")
    if mask is not None:
        full = (*q.shape[:-1], k.shape[-2])
        fits = mask.ndim <= len(full) and all(m in (1, n) for m, n in zip(
            reversed(mask.shape), reversed(full), strict=False))
        if not fits or (mask.dtype != torch.bool and not mask.dtype.is_floating_point):
            raise ArtifactError(f"attention of {shapes} with a mask {list(mask.shape)} of {mask.dtype}")
    if name.startswith("aten") and rest and rest[0] != 0.0:
        raise ArtifactError("attention drops out values, which inference does not")


def _window(args: Sequence[Any]) -> None:
    """Strides and the like are numbers of a size that windows have; what is asked for is not counted in 64 bits."""
    numbers = [n for a in args if isinstance(a, (list, tuple)) for n in a if isinstance(n, int)]
    numbers += [a for a in args if isinstance(a, int)]
    if any(not 0 <= n < 2**31 for n in numbers):
        raise ArtifactError(f"its windows have the numbers {numbers}")
    if any(isinstance(a, torch.Tensor) and a.numel() == 0 for a in args):
        raise ArtifactError("its windows are over nothing")


def _collective(name: str, args: Sequence[Any], groups: GroupSizes) -> None:
    """Sizes of groups and of what each rank is sent: they are not compared when values are exchanged."""
    operator = name.split(".")[1]
    if operator == "wait_tensor":
        return
    group = args[-1]
    if not isinstance(group, str) or group not in groups:
        raise ArtifactError(f"it sends to the group {group!r:.100}, which is none of this artifact: "
                            f"{', '.join(groups) or 'it has none'}")
    size, x = groups[group], args[0]
    if operator == "all_to_all_single":
        receive, send = args[1:3]
        if len(receive) != size or len(send) != size or x.ndim == 0 or sum(send) != x.shape[0] or min(
                *receive, *send) < 0:
            raise ArtifactError(f"it sends {send} and receives {receive} rows of {list(x.shape)} among {size} ranks")
    elif operator == "all_gather_into_tensor":
        if args[1] != size or x.ndim == 0:
            raise ArtifactError(f"it exchanges {list(x.shape)} among {args[1]!r:.100} ranks, but the group has {size}")
    elif args[1] != "sum":
        raise ArtifactError(f"it reduces by {args[1]!r:.100}, and programs only sum up")


def indices(name: str, args: Sequence[Any], shape: Callable[[Any], Sequence[int]]) -> list[tuple[Any, int, int]]:
    """The indices that an operator takes, each with the least and the most it may be.

    Args:
        args: of the operator; shape: gives that of one that is a tensor.
    """
    if name not in INDEXED:
        return []
    place, along, from_the_end = INDEXED[name]
    if along is None:
        sizes = shape(args[0])
        return [(x, -sizes[i] if from_the_end else 0, sizes[i] - 1) for i, x in enumerate(args[place])
                if x is not None and i < len(sizes)]
    sizes = shape(args[0])
    dim = 0 if along == 0 else args[along]
    return [(args[place], 0, sizes[dim] - 1)] if math.prod(shape(args[place])) else []
