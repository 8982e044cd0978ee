"""Parameters that ranks have parts and shares of, put together and taken apart again: a group at a time, by all ranks
together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from xdit_compile.ir.carried_types import carried
from xdit_compile.ir.layout import TENSOR, Layout
from xdit_compile.ir.parameter_groups import Member
from xdit_compile.ir.program import Part
from xdit_compile.runtime.execution.parameter_store import ParameterStore, local_piece, share_of


class WholeParameters:
    """What ``store`` has shares of.

    Args:
        shares: the ranks that hold the others of a group, in order; parts: those that hold the other parts of it. None
            where this rank has all.
    """

    def __init__(self, store: ParameterStore, shares: ProcessGroup | None, parts: ProcessGroup | None) -> None:
        self._store, self._shares, self._parts = store, shares, parts

    def gathered(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of a group, whole, by name."""
        group, share = self._store.groups[name], self._store[name]
        place = next((_place(g) for g in (self._shares, self._parts) if g is not None), share.device)
        memory = share.to(place)
        if self._shares is not None:
            memory = torch.empty(share.numel() * self._store.ranks, dtype=share.dtype, device=place)
            dist.all_gather_into_tensor(carried(memory), carried(share.to(place)), group=self._shares)
        made = {}
        for member in group.members:
            held = torch.as_strided(memory, member.shape, member.stride, member.offset)
            # Apart from the others: who edits one writes into no other.
            made[member.name] = held.clone() if member.part is None else self._assembled(held, member)
        return made

    def put(self, name: str, values: Mapping[str, torch.Tensor]) -> None:
        """Keep of these parameters this rank's share, in the memory of the one before."""
        def span(member: Member, first: int, last: int) -> torch.Tensor:
            return local_piece(values[member.name], member)[first:last]

        store = self._store
        share = store[name]
        share.copy_(share_of(store.groups[name], store.rank, store.ranks, span, share.device, store.offload))

    def _assembled(self, held: torch.Tensor, member: Member) -> torch.Tensor:
        """A parameter of which ``held`` is this rank's part."""
        layout, group = member.layout, self._parts
        assert layout is not None and group is not None
        ranks = range(dist.get_world_size(group))
        shapes = [layout.local_shape({TENSOR: r}) for r in ranks]
        longest = max(torch.Size(shape).numel() for shape in shapes)
        mine = held.new_zeros(longest)
        mine[:held.numel()] = held.reshape(-1)
        pieces = [torch.empty_like(mine) for _ in ranks]
        dist.all_gather([*map(carried, pieces)], carried(mine), group=group)
        # Laid out as it was, which what is computed with it may depend on.
        whole = torch.empty([layout.shape[i] for i in member.order], dtype=held.dtype, device=held.device).permute(
            [member.order.index(i) for i in range(len(layout.shape))])
        for rank, shape in zip(ranks, shapes, strict=True):
            _fill(whole, pieces[rank][:torch.Size(shape).numel()].reshape(shape), _part(layout, rank))
        return whole


def _part(layout: Layout, rank: int) -> Part:
    return tuple(tuple(dim.spans({TENSOR: rank})) for dim in layout.dims)


def _fill(whole: torch.Tensor, piece: torch.Tensor, part: Part) -> None:
    """Put ``piece`` where this part of ``whole`` is."""
    for spans in itertools.product(*(_with_places(dim) for dim in part)):
        there = tuple(slice(start, stop) for start, stop, _ in spans)
        whole[there] = piece[tuple(slice(place, place + stop - start) for start, stop, place in spans)]


def _with_places(spans: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int]]:
    """Of each range where it begins among all of them."""
    places = itertools.accumulate((stop - start for start, stop in spans), initial=0)
    return [(start, stop, place) for (start, stop), place in zip(spans, places, strict=False)]


def _place(group: ProcessGroup) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else (
        torch.device("cpu"))
