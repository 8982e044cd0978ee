"""Tensors that are not what they look like: a weight that is packed (quantized, say) is *parts*, plain tensors that
hold what is in memory, and metadata, in one object with operators of its own.

Programs know parts only, by the name of the whole and theirs: ``proj.weight::qdata``. There are two kinds of packed
tensors: those that wrap others, which PyTorch takes apart and puts together (``__tensor_flatten__``), and those that
are raw memory of their own with attributes that tell what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from xdit_compile.ir.given_up import GivenUp

PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer, GivenUp})
"""Types of tensors that hold what operators compute with, and do nothing of their own."""

OF = "::"
"""Between the name of a packed tensor and that of its part."""

RAW = "data"
"""The part that a tensor with memory of its own is."""

INSIDE = "_xdit_compile_raw"
"""The attribute under which a stand-in for such a tensor holds what it is made of."""

Make = Callable[[Tensor], Tensor]

_raw: Any = WeakIdKeyDictionary()
"""Of tensors with memory of their own, the plain tensor of that memory: the same object as long as they are."""


def whole_name(name: str) -> str:
    """Of a parameter, or of a part of one."""
    return name.partition(OF)[0]


def is_wrapper(tensor: Tensor) -> bool:
    """Whether it is made of other tensors."""
    return is_traceable_wrapper_subclass(tensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor of a type of its own is memory like any other, and operators are PyTorch's."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or INSIDE in vars(tensor)


def is_packed(tensor: Tensor) -> bool:
    """Whether it has parts."""
    return type(tensor) not in PLAIN and (is_wrapper(tensor) or has_memory(tensor))


def parts(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that one consists of, by name; of a plain one itself, without a name."""
    if not is_packed(tensor):
        return {"": tensor}
    if not is_wrapper(tensor):
        return {RAW: raw(tensor)}
    return {name + (OF + inner if inner else ""): part for name in tensor.__tensor_flatten__()[0]  # type: ignore
            for inner, part in parts(getattr(tensor, name)).items()}


def named_parts(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of parameters by name the parts, by name."""
    return dict(_named(named))


def _named(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named.items():
        if type(tensor) in PLAIN:
            yield name, tensor
        else:
            for inner, part in parts(tensor).items():
                yield name + (OF + inner if inner else ""), part


def part(tensor: Tensor, name: str) -> Tensor:
    """The part of this name."""
    for inner in name.split(OF):
        tensor = getattr(tensor, inner) if is_wrapper(tensor) else raw(tensor)
    return tensor


def raw(tensor: Tensor) -> Tensor:
    """The memory of a tensor of a type of its own, as a plain tensor."""
    if (inside := vars(tensor).get(INSIDE)) is not None:
        return inside  # type: ignore[no-any-return]
    known = _raw.get(tensor)
    with torch._C.DisableTorchFunction():
        looks = tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()
        if known is None or (known.data_ptr(), known.shape, known.dtype, known.stride()) != looks:
            # Writes into one are counted for both.
            known = _raw[tensor] = tensor.detach().as_subclass(Tensor)
    return known


def with_parts(tensor: Tensor, make: Make, around: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """A tensor like this one, of what ``make`` makes of its parts.

    Args:
        around: how to make one that has memory of its own, of the original and that memory, instead of PyTorch's way.
    """
    if not is_packed(tensor):
        return make(tensor)
    if not is_wrapper(tensor):
        made = (around or _as)(tensor, make(raw(tensor)))
    else:
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: with_parts(getattr(tensor, name), make, around) for name in names}
        made = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())  # type: ignore
    if isinstance(tensor, nn.Parameter):
        made._is_param = True  # type: ignore[attr-defined]
    return made


def metadata(tensor: Tensor) -> dict[str, Any]:
    """What a packed tensor holds beside its parts."""
    if not is_wrapper(tensor):
        return dict(vars(tensor))
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: metadata(getattr(tensor, name)) for name in names if is_packed(getattr(tensor, name))}
    return {**{k: v for k, v in vars(tensor).items() if k not in names}, "": (context, inner)}


def _as(tensor: Tensor, memory: Tensor) -> Tensor:
    made = Tensor._make_subclass(type(tensor), memory, tensor.requires_grad)
    vars(made).update(vars(tensor))
    return made
