"""Where denoising loops begin: there, what PyTorch does not count is compared, and nothing is kept of steps before."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch

from xdit_compile.ir import host_values
from xdit_compile.ir.step_inputs import timestep_inputs
from xdit_compile.runtime.deferred.deferred_tensor import materialize

Times = tuple[float, ...]
"""The least and the greatest of each of a call's times."""

class Begun(NamedTuple):
    """Whether a call begins a loop, and whether the call before it has turned out to have begun one."""

    here: bool
    before: bool


class LoopBoundaries:
    """Tells the first step of a denoising loop from the others.

    Inside of a pipeline each of its calls is one. Else a loop goes on as long as its times go one way, and no call
    comes again at the same time: several conditions have a call each. Nobody waits for times that lie on a device: they
    are looked at one call later.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._times: list[Times] = []
        """The last two that differed."""
        self._calls: set[Hashable] = set()
        self._arriving: tuple[Callable[[], Times], Hashable] | None = None
        self._said = False
        """Whether the call whose times are arriving was taken for the first of a loop."""

    def begins(self, epoch: int | None, named: Mapping[str, torch.Tensor], call: Hashable) -> Begun:
        """Whether a call is the first of its loop.

        Args:
            epoch: of the pipeline whose call is under way; None outside of pipelines.
            named: the tensors of the call. Without times it is no step of a loop, but one by itself.
            call: what the call is made with beside its sample and its times.
        """
        if epoch is not None or epoch != self._epoch:
            new, self._epoch = epoch != self._epoch, epoch
            self._times, self._calls, self._arriving = [], {call}, None
            if epoch is not None:
                return Begun(new, False)
        times = times_later(named)
        if all(host_values.on_host(materialize(named[n])) for n in timestep_inputs(named)):
            self._arriving = None
            return Begun(self._moves(times(), call), False)
        before, self._arriving = self._arriving, (times, call)
        late = before is not None and self._moves(before[0](), before[1]) and not self._said
        self._said = before is None
        return Begun(before is None, late)

    def _moves(self, times: Times, call: Hashable) -> bool:
        """Whether these times are not the next of those before."""
        last = self._times[-1] if self._times else ()
        if times and times == last and call not in self._calls:
            self._calls.add(call)
            return False
        known, self._calls = self._times, {call}
        self._times = [*known[-1:], times]
        if not times or times == last or len(times) != len(last):
            self._times = [times]
            return True
        moves = [(new - old) * (old - older) for new, old, older in zip(times, last, known[0], strict=True)]
        if any(move < 0 for move in moves):
            self._times = [times]
            return True
        return False


def times_later(named: Mapping[str, torch.Tensor]) -> Callable[[], Times]:
    """What gives the times of a call, and waits for a device only when it is called."""
    found = [t for n in sorted(timestep_inputs(named)) if (t := materialize(named[n]).detach()).numel()]
    ends = [_ends(t) for t in found]
    return lambda: tuple(x for both in ends for x in both())


def _ends(tensor: torch.Tensor) -> Callable[[], Sequence[float]]:
    """What gives the least and the greatest of a tensor's values."""
    if tensor.numel() == 1 and host_values.on_host(tensor):
        # As of most models, at each call.
        (value,) = tensor.reshape(-1).tolist()
        return lambda: (float(value), float(value))
    wide = tensor.double()
    return host_values.to_host(torch.stack([wide.min(), wide.max()]))
