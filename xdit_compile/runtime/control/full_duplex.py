"""All-to-alls and all-gathers over gloo in both directions at once.

gloo's own send before they receive. A rank that comes later then has its note that it is ready to receive wait behind
all that it sends, and what its peer sends waits for the note: on slow links an exchange takes twice as long, in about
half of all cases. Here ranks first say that they are ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

TAG = 1
"""Of the messages, which nobody else sends on these groups."""


COLLECTIVES = tuple(name for name in (
    "allgather", "all_gather_single", "allreduce", "allreduce_coalesced", "barrier", "broadcast", "gather", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced",
    "scatter") if hasattr(ProcessGroup, name))
"""What else a group does, by the names of this version of PyTorch."""


class FullDuplexGroup(ProcessGroup):
    """The same ranks as ``group``, a gloo group, over the same connections."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self._group = group
        cpu = torch.device("cpu")
        self._register_backend(cpu, ProcessGroup.BackendType.GLOO, group._get_backend(cpu))
        self._set_group_name(group.group_name)

    def alltoall_base(  # type: ignore[override]
            self, output: torch.Tensor, given: torch.Tensor, received: Sequence[int], sent: Sequence[int],
            options: Any = None) -> Work:
        """Blocks of rows go to the ranks in order, ``sent`` rows to each, or equally many; as PyTorch calls it."""
        ranks = self.size()
        parts = output.split(list(received)) if received else output.chunk(ranks)
        blocks = given.split(list(sent)) if sent else given.chunk(ranks)
        return _All(self._exchange(parts, blocks), (output, given))

    def allgather_into_tensor_coalesced(  # type: ignore[override]
            self, outputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor], options: Any = None) -> Work:
        """Each of ``outputs`` holds what all ranks have given, one after the other."""
        ranks = self.size()
        given = [tensor.contiguous() for tensor in given]
        works = [work for output, mine in zip(outputs, given, strict=True)
                 for work in self._exchange(output.view(ranks, *mine.shape).unbind(), [mine] * ranks)]
        return _All(works, (*outputs, *given))

    all_gather_single_coalesced = allgather_into_tensor_coalesced  # type: ignore[assignment]  # its name since 2.13

    def _exchange(self, parts: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]) -> list[Work]:
        """Starts to fill ``parts``, of each rank one, and to send ``blocks``, to each rank one."""
        me, ranks = self.rank(), self.size()
        works = [self._group.recv([parts[peer]], peer, TAG)
                 for peer in ((me - i) % ranks for i in range(1, ranks)) if parts[peer].numel()]
        works += [self._group.send([blocks[peer]], peer, TAG)
                  for peer in ((me + i) % ranks for i in range(1, ranks)) if blocks[peer].numel()]
        parts[me].copy_(blocks[me])
        return works


def _as_ever(name: str) -> Callable[..., Work]:
    """A collective that ``group`` does. Not inherited: PyTorch would hold Python's lock (the GIL) while it asks the
    group for its own, whose thread holds that and may want Python's to let go of tensors of an earlier collective. And
    a compiled function that waits holds Python's lock too (pytorch/pytorch issue 197516), which a wait in Python gives
    up."""
    def collective(self: FullDuplexGroup, *arguments: Any) -> Work:
        return _All((getattr(self._group, name)(*arguments),), ())

    return collective


for _name in COLLECTIVES:
    setattr(FullDuplexGroup, _name, _as_ever(_name))


class _All(Work):
    """Several at once; ``held``: tensors that must live until then."""

    def __init__(self, works: Sequence[Work], held: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self._works, self._held = works, held

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait()
        return True


def full_duplex(group: ProcessGroup) -> ProcessGroup:
    """``group``, or what stands for it where its backend is gloo."""
    return FullDuplexGroup(group) if dist.get_backend(group) == dist.Backend.GLOO else group
