"""What the stages of a pipeline exchange: values of one stage for a later one, and results for everybody.

A patch's values go from stage to stage, and its results from the last stage to all, as soon as they are there and while
other patches are computed. Nobody waits for a whole step: what a call returns is deferred (``deferred_tensor.py``),
patch by patch, and the next call takes its patches from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from xdit_compile.errors import XditError
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.process_groups import make_group
from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor, Promise, Tape
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.pipefusion.schedule import WHOLE

Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]


class PatchedResults(Promise):
    """The results of one call, which come unit by unit: the whole at once, or patch by patch."""

    def __init__(self, units: tuple[int, ...], cuts: Sequence[Cut | None]) -> None:
        super().__init__(cuts=cuts)
        self.units = units
        self.tensors: dict[int, Sequence[torch.Tensor]] = {}
        self.works: dict[int, list[dist.Work]] = {}

    def wait(self, unit: int) -> Sequence[torch.Tensor]:
        for work in self.works.pop(unit, ()):
            work.wait()
        return self.tensors[unit]

    def _piece(self, place: int, patch: int) -> torch.Tensor:
        cut = self.cuts[place]
        assert cut is not None
        return self.wait(patch)[place] if patch in self.units else cut.piece(self.wait(WHOLE)[place], patch)

    def assemble(self) -> None:
        """Wait for all units and make the results of them. What does not come in pieces comes with the last."""
        all_units = [self.wait(unit) for unit in self.units]
        patched = self.units[0] != WHOLE
        self.values = [cut.joined([pieces[i] for pieces in all_units]) if cut and patched else all_units[-1][i]
                       for i, cut in enumerate(self.cuts)]
        self.tensors = {}


@dataclass
class Sent:
    """Messages on their way, whose tensors must live until they have left."""

    works: list[dist.Work] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(w.is_completed() for w in self.works)


class StageCommunicator:
    """The stages that one rank sends to and receives from, and the results they all wait for.

    Args:
        column: the ranks of this rank's pipeline, one of each stage; ``stage`` is this rank's.
        audience: the ranks that are told the results: the column, or those of all groups that take turns.

    Attributes:
        sent: bytes this rank has sent to later stages; ``results_sent``: and of results, to all others.
    """

    def __init__(self, column: Sequence[int], stage: int, audience: Sequence[int], control: ControlPlane) -> None:
        self.column, self.stage, self.audience = tuple(column), stage, tuple(audience)
        self._control = control
        self._results = make_group("xdit_compile.results", self.audience, control)
        self._edges: dict[tuple[int, int], dist.ProcessGroup] = {}
        self.tape = Tape(self._fetch)
        self._calls: list[PatchedResults] = []
        self._leaving: list[Sent] = []
        self.sent = self.results_sent = 0

    @property
    def last(self) -> bool:
        return self.stage == len(self.column) - 1

    def all(self) -> tuple[dist.ProcessGroup, ...]:
        return (self._results, *self._edges.values())

    def connect(self, edges: Sequence[tuple[int, int]]) -> None:
        """Make the groups of pairs of stages. All ranks of a column come here together."""
        for pair in edges:
            # One for each direction of each pair: messages of two directions on one would wait for each other.
            if self.stage in pair and pair not in self._edges:
                peers = (self.column[pair[0]], self.column[pair[1]])
                self._edges[pair] = make_group(f"xdit_compile.edge.{pair[0]}.{pair[1]}", peers, self._control)

    # Values

    def send(self, target: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start to send to stage ``target``, which receives tensors of these shapes in this order."""
        group = self._edges[self.stage, target]
        kept = [t.contiguous() for t in tensors if t.numel()]
        self.sent += sum(t.nbytes for t in kept)
        self._leave(Sent([_work(dist.isend(t, group=group, group_dst=1)) for t in kept], kept))

    def receive(self, source: int, shapes: Shapes, device: torch.device) -> Callable[[], list[torch.Tensor]]:
        """Start to receive from stage ``source``; returns what waits for the tensors."""
        group = self._edges[source, self.stage]
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        works = [_work(dist.irecv(t, group=group, group_src=0)) for t in tensors if t.numel()]

        def wait() -> list[torch.Tensor]:
            for work in works:
                work.wait()
            return tensors

        return wait

    # Results

    def promise(self, cuts: Sequence[Cut | None], units: tuple[int, ...]) -> PatchedResults:
        """What a call will return, in units."""
        call = PatchedResults(units, cuts)
        self._calls.append(call)
        return call

    def deferred(self, call: PatchedResults, likes: Sequence[torch.Tensor]) -> list[DeferredTensor]:
        """What the call returns, as tensors shaped as ``likes``."""
        return self.tape.deferred(call, likes)

    def publish(self, call: PatchedResults, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start to send the results of one unit to everybody."""
        call.tensors[unit] = tensors
        kept = [t.contiguous() for t in tensors if t.numel()]
        self.results_sent += sum(t.nbytes for t in kept) * (len(self.audience) - 1)
        self._leave(Sent(self._broadcast(kept, dist.get_rank()), kept))

    def expect(self, call: PatchedResults, unit: int, likes: Sequence[torch.Tensor], owner: int) -> None:
        """Start to receive the results of one unit from the global rank ``owner``. All ranks come to all units of all
        calls in the same order."""
        shapes = [list(t.shape) for t in likes]
        for shape, cut in zip(shapes, call.cuts, strict=True):
            if unit != WHOLE and cut is not None:
                shape[cut.dim] = cut.borders[unit + 1] - cut.borders[unit]
            elif unit not in (WHOLE, call.units[-1]):
                shape[:] = [0]
        made = [torch.empty(s, dtype=t.dtype, device=t.device) for s, t in zip(shapes, likes, strict=True)]
        call.tensors[unit] = made
        call.works[unit] = self._broadcast([t for t in made if t.numel()], owner)

    def advance(self) -> None:
        """Compute what was recorded of results that are here, so that it need not be remembered."""
        self._calls = [c for c in self._calls if c.values is None]
        self.tape.advance()

    def collect(self, calls: Sequence[PatchedResults]) -> None:
        """Wait for all of these and join their units."""
        for call in calls:
            if call.values is None:
                call.assemble()

    def settle(self) -> None:
        """Wait for all that is promised."""
        if self._calls:
            self.tape.play()

    def _fetch(self) -> None:
        with self._control.guard("waiting for the last stage", self.all()):
            self.collect(self._calls)
        self._calls = []

    def _broadcast(self, tensors: Sequence[torch.Tensor], owner: int) -> list[dist.Work]:
        source = self.audience.index(owner)
        return [dist.broadcast(t, group=self._results, group_src=source, async_op=True) for t in tensors]

    def _leave(self, sent: Sent) -> None:
        self._leaving = [s for s in self._leaving if not s.done] + [sent]


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise XditError("this rank is not one of the two that exchange a message")
    return work
