"""What a rank holds of parameters that come to the device block by block: shares of groups, in memory of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import is_

import torch
from torch import nn

from xdit_compile.errors import XditError
from xdit_compile.ir.packed_tensors import is_packed, named_parts, parts, with_parts
from xdit_compile.ir.parameter_groups import Member, ParameterGroup
from xdit_compile.ir.program import Input, part_of
from xdit_compile.ir.released_parameters import LOOK, absence, device_of, release_named
from xdit_compile.runtime.execution.held_inputs import ParameterReader

Span = Callable[[Member, int, int], torch.Tensor]
"""Reads a parameter's elements from one to another, in the order in which they lie in memory."""


class ParameterStore(Mapping[str, torch.Tensor]):
    """Shares of groups of a model's parameters, by the groups' names. What is put here the model gives up.

    Args:
        groups: all of the model.
        rank, ranks: which of so many shares is this rank's.
        offload: whether shares wait in the host's memory.
    """

    def __init__(self, groups: Sequence[ParameterGroup], rank: int, ranks: int, offload: bool) -> None:
        self.groups = {group.name: group for group in groups}
        self.rank, self.ranks, self.offload = rank, ranks, offload
        self._shares: dict[str, torch.Tensor] = {}
        self._given_up: list[str] = []
        self.left: list[torch.Tensor] = []
        """What the model has in the places of parameters that it gave up."""
        self._looks: list[tuple[int, torch.dtype, torch.device]] = []
        self._reader: ParameterReader | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._shares[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def take(self, model: nn.Module, names: Collection[str], files: Callable[[], Span] | None,
             device: torch.device) -> None:
        """Make this rank's shares of the groups ``names``, which the model gives up one by one.

        Args:
            files, device: opens what parameters that are on the meta device are read from, and where they shall be.

        Raises:
            XditError: some are on the meta device and nothing reads them.
        """
        for name in (n for n in self.groups if n in names and n not in self._shares):
            group = self.groups[name]
            held = dict(zip((m.name for m in group.members), _reader(
                model, [m.name for m in group.members]).read(), strict=True))
            absent = [n for n, t in held.items() if t.is_meta]
            if absent and files is None:
                raise absence(model, absent, "give parallelize weights=FOLDER")
            place = device if absent else device_of(next(iter(held.values())))
            # Opened anew for each group: what was read of a file counts as this process's memory while it is open.
            span = _Spans(held, files() if absent and files else None)
            self._shares[name] = share_of(group, self.rank, self.ranks, span, place, self.offload)
            del span, held
            names_of = [n for m in group.members for n in m.names]
            release_named(model, names_of)
            self._given_up += names_of
        self._reader = _reader(model, self._given_up)
        self.left = self._reader.read()
        self._looks = list(map(LOOK, self.left))

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose parameters were changed after they were given up: no share knows of it.

        Raises:
            XditError: naming one of them.
        """
        if self._reader is None:
            return
        # Done before each call, where it would be felt: by functions in C, and without names.
        with suppress(KeyError, AttributeError):
            found = self._reader.read()
            if all(map(is_, found, self.left)) and list(map(LOOK, found)) == self._looks:
                return
        if self._followed(model):
            return
        raise XditError(f"{self._changed(self._reader)} of this {type(model).__name__} was replaced, written into, "
                        "moved or cast after the first call, when this rank kept its share of the parameters and gave "
                        "up the rest (tensor, shard or offload in the spec): the change cannot reach the shares. Load "
                        "weights before the first call, adapters by load_lora_adapter or load_lora_weights at any "
                        "time, or parallelize the model anew")

    def _changed(self, reader: ParameterReader) -> str:
        """What is not as it was left."""
        try:
            found = reader.read()
        except (KeyError, AttributeError):
            return "a module"
        alike = (a is b and LOOK(a) == look for a, b, look in zip(found, self.left, self._looks, strict=True))
        return next((name for name, same in zip(self._given_up, alike, strict=True) if not same), "a parameter")

    def left_by_name(self) -> dict[str, torch.Tensor]:
        """What the model has in the places of parameters, by all their names."""
        return dict(zip(self._given_up, self.left, strict=True))

    def _followed(self, model: nn.Module) -> bool:
        """Whether the model has all that it was left with, and as it was, though by other names: adapters put modules
        around others. Groups go by the new names from then on."""
        names: dict[int, list[str]] = {}
        for name, parameter in named_parts(dict(model.named_parameters(remove_duplicate=False))).items():
            names.setdefault(id(parameter), []).append(name)
        if list(map(LOOK, self.left)) != self._looks or any(id(t) not in names for t in self.left):
            return False
        before = self.left_by_name()
        for key in self._shares:
            group = self.groups[key]
            members = tuple(replace(m, names=tuple(names[id(before[m.name])])) for m in group.members)
            self.groups[key] = replace(group, members=members)
        self._given_up = [n for key in self._shares for m in self.groups[key].members for n in m.names]
        self._reader = _reader(model, self._given_up)
        self.left = self._reader.read()
        self._looks = list(map(LOOK, self.left))
        return True


class _Spans:
    """Reads parts of parameters where they are: in the model, or in files."""

    def __init__(self, held: Mapping[str, torch.Tensor], read: Span | None) -> None:
        self._held, self._read = held, read

    def __call__(self, member: Member, first: int, last: int) -> torch.Tensor:
        tensor = self._held[member.name]
        if tensor.is_meta:
            assert self._read is not None
            return self._read(member, first, last)
        return local_piece(tensor, member)[first:last]


@contextmanager
def swapped(model: nn.Module, table: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """Within, the model has other parameters, or parts of packed ones, in the places of those that it was left with;
    those that are still there afterwards are exchanged for these again.

    Args:
        table: the others, by the identity of what the model was left with.
    """
    made: dict[int, torch.Tensor] = {}
    """By the identity of what was there."""
    before = _exchange(model, lambda p: made.setdefault(id(p), _with(p, table)))
    there = {id(made[id(p)]): p for p in before}
    try:
        yield
    finally:
        _exchange(model, lambda p: there.get(id(p), p))


def _with(parameter: torch.Tensor, table: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """What stands for a parameter when what is in ``table`` stands for what it is made of."""
    if not is_packed(parameter):
        return table.get(id(parameter), parameter)
    if not any(id(p) in table for p in parts(parameter).values()):
        return parameter
    return with_parts(parameter, lambda p: table[id(p)].detach() if id(p) in table else p)


def _exchange(model: nn.Module, other: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Put another in the place of each parameter; all that were there."""
    before: list[torch.Tensor] = []
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                before.append(parameter)
                module._parameters[leaf] = other(parameter)  # type: ignore[assignment]
    return before


def _reader(model: nn.Module, names: Sequence[str]) -> ParameterReader:
    return ParameterReader(model, [Input("parameter", name) for name in names])


def local_piece(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """All that this rank's programs take of a parameter, flat, in the order in which it lies in memory."""
    tensor = tensor.detach() if member.part is None else part_of(tensor.detach(), member.part)
    return tensor.permute(member.order).reshape(-1)


def share_of(group: ParameterGroup, rank: int, ranks: int, span: Span, device: torch.device,
             offload: bool) -> torch.Tensor:
    """Share ``rank`` of ``ranks`` of a group's memory."""
    length = group.share(ranks)
    begin, end = rank * length, (rank + 1) * length
    share = torch.zeros(length, dtype=group.dtype, device="cpu" if offload else device,
                        pin_memory=offload and device.type == "cuda")
    for member in group.members:
        first, last = max(member.offset, begin), min(member.offset + member.size, end)
        if first < last:
            share[first - begin : last - begin].copy_(span(member, first - member.offset, last - member.offset))
    return share

