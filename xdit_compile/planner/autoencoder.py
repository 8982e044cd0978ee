"""How many ranks share a pipeline's autoencoder: the degree of ``vae``, which has no part in the other degrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from xdit_compile.errors import XditError
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import Call
from xdit_compile.planner.candidates import divisors
from xdit_compile.planner.costs import forward_seconds
from xdit_compile.planner.device_memory import estimated_values, held_parameters
from xdit_compile.planner.plan import Question
from xdit_compile.planner.plan_report import duration
from xdit_compile.planner.work import Work, WorkCounter
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class SharedDecoding:
    """The degree that takes the least time, of those that a device has memory for.

    Attributes:
        seconds: of one call, by degree; those that do not go are left out.
    """

    degree: int
    seconds: Mapping[int, float]

    def line(self) -> str:
        """What was chosen and why, in a few words."""
        if not self.seconds:
            return f"vae={self.degree}: how its autoencoder is to be shared out is not known"
        best = self.seconds[self.degree]
        if len(self.seconds) == 1:
            return f"vae={self.degree}: {duration(best)} to decode"
        other = 1 if self.degree > 1 else min((d for d in self.seconds if d > 1), key=self.seconds.__getitem__)
        return f"vae={self.degree}: {duration(best)} to decode, {duration(self.seconds[other])} with vae={other}"


def shared_decoding(call: Call, question: Question) -> SharedDecoding:
    """The best degree for one call of an autoencoder, by what ranks do and send, as ``Planner`` counts it."""
    try:
        bound = call.bound()
        counter = WorkCounter(captured(call.module, bound.args, bound.kwargs))
    except XditError:
        return SharedDecoding(1, {})
    seconds, memory = dict[int, float](), dict[int, float]()
    for degree in divisors(question.world):
        # A ring, as `ParallelGroup.vae` has it: an autoencoder's attention has a single head.
        spec = replace(ShardingSpec(ring_degree=degree), backend=question.base.backend)
        try:
            work = counter.exact(spec)
            assert isinstance(work, Work)
            whole = counter.whole
            seconds[degree] = forward_seconds(work, whole, spec, question.machine).total
            memory[degree] = held_parameters(whole.parameters, spec) + estimated_values(work, whole, spec)
        except XditError:
            continue
    fitting = [d for d in seconds if memory[d] <= question.most] or [max(seconds, default=1)]
    return SharedDecoding(min(fitting, key=lambda d: (seconds.get(d, 0.0), d)), seconds)
