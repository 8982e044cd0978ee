"""Taking turns: of the calls a pipeline makes one after the other, each group of ranks computes its own.

Classifier-free guidance as most video pipelines do it calls the model once with the condition and once without. With
``cfg_degree`` groups, call ``i`` of a model is computed by group ``i mod cfg_degree`` and promised to the others
(``deferred_tensor.py``). A group sends a result when it has it, and the others fetch it when they need it, so that no
rank waits for what another does with the results, only for the call that it computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.process_groups import make_group
from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor, Promise, Tape
from xdit_compile.spec import ShardingSpec


@dataclass
class _Call:
    """A call that some group computes: its results, or room for them."""

    owner: int
    tensors: list[torch.Tensor]
    promise: Promise = field(default_factory=Promise)
    works: list[dist.Work] = field(default_factory=list)


class GuidanceRoundRobin:
    """Whose turn it is, and what was promised and not fetched yet. All ranks make theirs together.

    Attributes:
        group: one rank of each group, which exchange results.
        mine: which of the groups this rank is in.
        fetched: how often results were fetched, by the number of calls made since the time before. A single call
            gained nothing: its result was used before the next call was made.
        sent: bytes this rank has sent.
    """

    def __init__(self, spec: ShardingSpec, ranks: Sequence[int], control: ControlPlane) -> None:
        here, size = ranks.index(dist.get_rank()), spec.model_degree
        self.degree, self.mine = spec.cfg_degree, here // size % spec.cfg_degree
        base = here - self.mine * size
        peers = tuple(ranks[base + i * size] for i in range(self.degree))
        self._control, self.group = control, make_group("xdit_compile.cfg", peers, control)
        self._tape = Tape(self._fetch)
        self._calls: list[_Call] = []
        self._leaving: list[_Call] = []
        self._taken: Counter[object] = Counter()
        self.fetched: Counter[int] = Counter()
        self.sent = 0

    def members(self, spec: ShardingSpec, ranks: Sequence[int]) -> list[int]:
        """The ranks of this rank's group, which together run a call under ``spec`` without ``cfg``."""
        return [r for i, r in enumerate(ranks) if i // spec.model_degree % self.degree == self.mine]

    def turn(self, model: object) -> int:
        """Whose turn it is to compute the next call of ``model``. Never begun anew, so that it does not depend on
        what a rank did with the results."""
        return self._taken[model] % self.degree

    def next(self, model: object) -> int:
        """`turn`, which is taken."""
        owner = self.turn(model)
        self._taken[model] += 1
        return owner

    def promise(self, owner: int, results: Sequence[torch.Tensor] | None, likes: Sequence[torch.Tensor]
                ) -> list[DeferredTensor]:
        """What the group ``owner`` computes (``results``, on its ranks) as deferred tensors shaped as ``likes``. That
        all groups make the same call is not checked here."""
        room = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in likes] if results is None else [
            t.contiguous() for t in results]
        self._calls.append(call := _Call(owner, room))
        if owner == self.mine:
            self._post()
            self.sent += sum(t.nbytes for t in room) * (self.degree - 1)
        return self._tape.deferred(call.promise, likes)

    def settle(self) -> None:
        """Fetch what is still promised."""
        if self._calls:
            self._tape.play()

    def _post(self) -> None:
        """Start to send and receive, in the order of the calls, which is the same on all ranks."""
        self._leaving = [c for c in self._leaving if not all(w.is_completed() for w in c.works)]
        for call in self._calls:
            if not call.works:
                call.works = [dist.broadcast(t, group=self.group, group_src=call.owner, async_op=True)
                              for t in call.tensors]
                self._leaving += [call] if call.owner == self.mine else []

    def _fetch(self) -> None:
        with self._control.guard("fetching what other groups computed", (self.group,)):
            self._post()
            calls, self._calls = self._calls, []
            for call in calls:
                if call.owner != self.mine:
                    for work in call.works:
                        work.wait()
                call.promise.values = call.tensors
        self.fetched[len(calls)] += 1
