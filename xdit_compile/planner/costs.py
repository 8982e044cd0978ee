"""Seconds of a loop of denoising under a spec, from what its ranks do and how fast the machine is.

A device computes while its host starts the next operators, if it is asynchronous; exchanges are waited for, but for
what a ring brings while attention goes on (arXiv 2310.01889), as far as a machine does that, and for parameters that
come while a block computes. Stages follow PipeFusion's schedule, which is simulated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from xdit_compile.ir.beside import EncoderBytes
from xdit_compile.ir.layout import BATCH
from xdit_compile.ir.mesh import SHARD, members
from xdit_compile.planner.machine import Link, Machine
from xdit_compile.planner.work import Exchange, Staged, Whole, Work
from xdit_compile.runtime.pipefusion.schedule import RESULT, WHOLE, Edge, schedule, simulate
from xdit_compile.spec import ALL, ShardingSpec

SIMULATED = 4
"""Steps in patches that are simulated; all that follow take as long as the last of them."""


@dataclass(frozen=True)
class Loop:
    """What is asked for.

    Attributes:
        steps: of denoising; calls: of the model in each step, one for each term of guidance; batch: samples of a call.
    """

    steps: int = 28
    calls: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Seconds:
    """Where the time of the busiest rank goes, in a whole loop.

    Attributes:
        products, attention: of operations; rest: of element-wise work, and of weights that are waited for.
        host: what the host takes longer to start all that than the device to do it.
        links: what exchanges are waited for, by axis of the mesh.
        waiting: a stage for others: at the beginning, in exact steps, and where stages are uneven.
    """

    products: float = 0.0
    attention: float = 0.0
    rest: float = 0.0
    host: float = 0.0
    links: Mapping[str, float] = field(default_factory=dict)
    waiting: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.rest + self.host + sum(self.links.values()) + self.waiting

    def parts(self) -> dict[str, float]:
        """By name, the largest first."""
        named = {"matrix products": self.products, "attention": self.attention, "other work": self.rest,
                 "starting operators": self.host, "waiting for stages": self.waiting,
                 **{f"exchanges ({axis})": s for axis, s in self.links.items()}}
        return dict(sorted(((n, s) for n, s in named.items() if s > 0), key=lambda item: -item[1]))

    def times(self, factor: float) -> Seconds:
        """So often."""
        return Seconds(self.products * factor, self.attention * factor, self.rest * factor, self.host * factor,
                       {axis: s * factor for axis, s in self.links.items()}, self.waiting * factor)

    def plus(self, other: Seconds) -> Seconds:
        """One after the other."""
        links = {axis: self.links.get(axis, 0.0) + other.links.get(axis, 0.0) for axis in (*self.links, *other.links)}
        return Seconds(self.products + other.products, self.attention + other.attention, self.rest + other.rest,
                       self.host + other.host, links, self.waiting + other.waiting)


def loop_seconds(work: Work | Staged, whole: Whole, spec: ShardingSpec, machine: Machine, loop: Loop) -> Seconds:
    """All steps of a loop, on the busiest rank.

    Raises:
        SpecError: the machine has no link between ranks that must talk, or no rates for the model's dtype.
    """
    turns = math.ceil(loop.calls / spec.cfg_degree) if takes_turns(spec, loop) else loop.calls
    calls = max(turns, 1)
    if isinstance(work, Work):
        step = _with_parameters(forward_seconds(work, whole, spec, machine), whole, spec, machine)
        found = step.times(calls * loop.steps)
    else:
        found = _staged(work, whole, spec, machine, loop.steps).times(calls)
    if takes_turns(spec, loop):
        # Each result goes to all groups.
        result = _link_seconds(Exchange("all_gather", BATCH, 1, whole.arguments), spec, machine)
        found = found.plus(Seconds(links={BATCH: result * loop.steps}))
    return found


def encoder_seconds(encoders: Sequence[EncoderBytes], spec: ShardingSpec, machine: Machine) -> Seconds:
    """What it takes until encoders' parameters have come, in a call of a pipeline. What encoders compute is the same
    under every spec."""
    if spec.encoders != "shard" or not any(e.messages for e in encoders):
        return Seconds()
    ranks = list(range(spec.world_size))
    link = machine.link(ranks, "all_gather")
    sent = sum(e.cut * e.calls for e in encoders) * (len(ranks) - 1) / len(ranks)
    return Seconds(links={"encoders": sum(e.messages for e in encoders) * link.latency + sent * _crowd(
        link, ranks, "all_gather", machine) / link.bandwidth})


def takes_turns(spec: ShardingSpec, loop: Loop) -> bool:
    """Whether groups of guidance take turns in calls, because the batch of one is too small to be cut."""
    return spec.cfg_degree > 1 and loop.batch < spec.batch_degree


def forward_seconds(work: Work, whole: Whole, spec: ShardingSpec, machine: Machine) -> Seconds:
    """One forward, or one unit of a stage."""
    rates = machine.rates_of(whole.dtype)
    left = machine.compiled if spec.backend != "eager" else 1.0
    products = work.products / rates.products + work.packed / machine.packing
    attention = work.attention / rates.attention
    rest = (work.moved * left + work.weights) / machine.moved + work.functions / machine.functions
    links: dict[str, float] = defaultdict(float)
    for x in work.exchanges:
        seconds = _link_seconds(x, spec, machine)
        if x.kind == "ring":
            seconds -= machine.overlap * min(seconds, attention * (spec.ring_degree - 1) / spec.ring_degree)
        links[x.axis] += seconds
    started = work.launches * left * machine.launch + sum(x.count for x in work.exchanges) * machine.collective
    device = products + attention + rest + sum(links.values())
    host = max(started - device, 0.0) if machine.asynchronous else started
    return Seconds(products, attention, rest, host, dict(links))


def link_of(axis: str, kind: str, spec: ShardingSpec, machine: Machine) -> tuple[Link, list[int]]:
    """What the slowest group along ``axis`` talks over, and its ranks."""
    found = [(machine.link(g, kind), list(g)) for g in _groups(axis, spec)]
    return min(found, key=lambda item: item[0].bandwidth)


@lru_cache(maxsize=256)
def _groups(axis: str, spec: ShardingSpec) -> tuple[tuple[int, ...], ...]:
    """Some of the groups along ``axis``: kept, because every kind of exchange and every patch asks."""
    return tuple(sorted({tuple(members(axis, rank, spec)) for rank in {0, spec.world_size // 2, spec.world_size - 1}}))


def _link_seconds(x: Exchange, spec: ShardingSpec, machine: Machine) -> float:
    link, ranks = link_of(x.axis, x.kind, spec, machine)
    return x.count * link.latency + x.nbytes * _crowd(link, ranks, x.kind, machine) / link.bandwidth


def _crowd(link: Link, ranks: list[int], kind: str, machine: Machine) -> float:
    """How many ranks' bytes go through a link that all devices of a node share, per byte that a rank sends."""
    if not link.shared:
        return 1.0
    here = [r for r in ranks if r // machine.devices == ranks[0] // machine.devices]
    groups = max(machine.devices // max(len(here), 1), 1)
    if kind == "ring":
        return float(groups)  # one rank of each group has its neighbour on the next node
    return groups * len(here) * (len(ranks) - len(here)) / max(len(ranks) - 1, 1)


def _with_parameters(step: Seconds, whole: Whole, spec: ShardingSpec, machine: Machine) -> Seconds:
    """A forward whose parameters come block by block, while the block before computes."""
    held = whole.parameters / spec.tensor_degree / spec.pipefusion_degree
    coming = 0.0
    if spec.shard_degree > 1:
        sent = int(held * (spec.shard_degree - 1) / spec.shard_degree)
        coming += _link_seconds(Exchange("all_gather", SHARD, 1, sent), spec, machine)
    if spec.offload != "none":
        coming += held / spec.shard_degree / machine.host_copy
    exposed = max(coming - (step.products + step.attention + step.rest), 0.05 * coming)
    return step.plus(Seconds(links={SHARD: exposed})) if coming else step


# Stages


def _staged(work: Staged, whole: Whole, spec: ShardingSpec, machine: Machine, steps: int) -> Seconds:
    warmup = steps if spec.warmup_steps == ALL or spec.patches == 1 else min(int(spec.warmup_steps), steps)
    once = [forward_seconds(w, whole, spec, machine) for w in work.once]
    units = [{unit: forward_seconds(w, whole, spec, machine) for unit, w in us.items()} for us in work.units]
    shared = [s.total / spec.patches for s in once]

    def run_seconds(stage: int, unit: int) -> float:
        return units[stage][unit].total + (once[stage].total if unit == WHOLE else shared[stage])

    def transfer_seconds(edge: Edge, unit: int) -> float:
        ranks = [edge.source * spec.ranks_per_stage, edge.target * spec.ranks_per_stage]
        link = machine.link(ranks, "ring")
        nbytes = edge.whole if unit == WHOLE else edge.nbytes[unit]
        return link.latency + nbytes * _crowd(link, ranks, "ring", machine) / link.bandwidth

    # Only the first stage needs results to go on.
    edges = [e for e in work.edges if e.name != RESULT or e.target == 0]
    most = min(steps, warmup + SIMULATED)
    ends = [simulate(schedule(spec.pipefusion_degree, spec.patches, n, min(warmup, n), edges), run_seconds,
                     transfer_seconds).seconds for n in ([most - 1, most] if steps > most else [most])]
    total = ends[-1] + (steps - most) * (ends[-1] - ends[0])
    # Of the stage that has most to do; all else is waiting.
    busiest = max(range(len(units)), key=lambda i: sum(s.total for s in units[i].values()) + once[i].total)
    exact, patches = units[busiest][WHOLE], [s for unit, s in units[busiest].items() if unit != WHOLE]
    own = exact.times(warmup).plus(_sum(patches).times(steps - warmup)).plus(once[busiest].times(steps))
    return replace(own, waiting=max(total - own.total, 0.0))


def _sum(found: list[Seconds]) -> Seconds:
    made = Seconds()
    for seconds in found:
        made = made.plus(seconds)
    return made
