"""How a model's parameters lie in groups, each of which comes to the device as one stretch of memory per dtype.

A group is a block (the outermost numbered module) or, outside of all blocks, what one child of the model has. That goes
by names alone, so that every program of a model, every rank and every process finds the same groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from xdit_compile.ir.given_up import kind_of
from xdit_compile.ir.layout import Layout, Position
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.program import Part

ALIGNMENT = 512
"""Bytes. Each parameter begins at a multiple of these, as it would in memory of its own: what kernels compute may
depend on that."""

SMALL = 1024
"""Bytes. What lies outside of blocks and is smaller stays whole on every rank."""


@dataclass(frozen=True)
class Member:
    """One parameter of a group.

    Attributes:
        names: all names that it goes by, that of its first module first.
        shape, stride: as the model has it, or of the part that this rank has among tensor ranks; offset: where it
            begins in the group's memory, in elements.
        layout: how tensor ranks share it out, once that is known, and part: which part this rank has; None for all.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    layout: Layout | None = None
    part: Part | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def order(self) -> tuple[int, ...]:
        """Its dimensions, as they lie in memory: the one with the longest steps first."""
        return tuple(sorted(range(len(self.shape)), key=lambda i: (-self.stride[i], i)))


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one dtype that come together.

    Attributes:
        name: the path of the block and the dtype; path: of the block alone.
        length: elements, gaps included.
    """

    path: str
    dtype: torch.dtype
    members: tuple[Member, ...]
    length: int

    @property
    def name(self) -> str:
        return f"{self.path}:{str(self.dtype).removeprefix('torch.')}"

    def share(self, ranks: int) -> int:
        """Elements that each of so many ranks holds: the same on all, the last one's filled up."""
        step = _step(self.dtype)
        return -(-self.length // (ranks * step)) * step


def parameter_groups(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """The groups of a model's parameters, of packed ones of their parts. Buffers stay out of them."""
    return groups_of(named_parts(dict(model.named_parameters(remove_duplicate=False))).items())


def groups_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> tuple[ParameterGroup, ...]:
    """The groups of these parameters but for packed ones. What is one tensor under several names is one member."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in parameters:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    found: dict[tuple[str, torch.dtype], list[int]] = {}
    for key, tensor in tensors.items():
        if _fits(tensor):
            found.setdefault((block_of(names[key][0]), tensor.dtype), []).append(key)
    return tuple(
        group_of(path, dtype, [Member(tuple(names[k]), tuple(tensors[k].shape), tuple(tensors[k].stride()))
                               for k in keys])
        for (path, dtype), keys in found.items()
        if is_block(path) or sum(tensors[k].numel() for k in keys) * dtype.itemsize >= SMALL)


def group_of(path: str, dtype: torch.dtype, members: Iterable[Member]) -> ParameterGroup:
    """These parameters one after the other, each where memory of its own could begin."""
    laid, at, step = [], 0, _step(dtype)
    for member in members:
        laid.append(replace(member, offset=at))
        at += -(-member.size // step) * step
    return ParameterGroup(path, dtype, tuple(laid), at)


def cut_groups(groups: Sequence[ParameterGroup], layouts: Mapping[str, Layout],
               position: Position) -> tuple[ParameterGroup, ...]:
    """These groups, of each parameter that ``layouts`` names with the part that the rank at ``position`` has; those
    that were cut before stay as they are."""
    made = []
    for group in groups:
        members = []
        for member in group.members:
            if member.layout is None:
                layout = next((layouts[n] for n in member.names if n in layouts), Layout.replicated(member.shape))
                shape = layout.local_shape(position)
                part = tuple(tuple(dim.spans(position)) for dim in layout.dims) if layout.sharded else None
                stride = strides_of(shape, member.order) if part else member.stride
                member = replace(member, shape=shape, stride=stride, layout=layout, part=part)
            members.append(member)
        made.append(group_of(group.path, group.dtype, members))
    return tuple(made)


def strides_of(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor whose dimensions lie in memory in this order, that with the longest steps first."""
    steps = {i: math.prod(shape[j] for j in order[k + 1 :]) for k, i in enumerate(order)}
    return tuple(steps[i] for i in range(len(shape)))


def block_of(name: str) -> str:
    """The path of the outermost numbered module that the parameter ``name`` is in, else of its outermost module."""
    path = name.split(".")[:-1]
    number = next((i for i, step in enumerate(path) if step.isdecimal()), 0)
    return ".".join(path[:number + 1])


def is_block(path: str) -> bool:
    return path.rpartition(".")[2].isdecimal()


def by_member(groups: Sequence[ParameterGroup]) -> dict[str, tuple[ParameterGroup, Member]]:
    """Where each parameter lies, by all its names."""
    return {name: (group, member) for group in groups for member in group.members for name in member.names}


def _step(dtype: torch.dtype) -> int:
    return max(ALIGNMENT // dtype.itemsize, 1)


def _fits(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of a stretch of memory, in whatever order."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.numel():
        return False
    if kind_of(tensor) not in (torch.Tensor, nn.Parameter) and not isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
