"""The processes that run one parallel model, or all models of one pipeline, together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist

from xdit_compile.errors import RankFailure, SpecError, XditError
from xdit_compile.runtime.control.abort import is_peer_loss
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.message_codec import decoded, encoded
from xdit_compile.runtime.control.process_groups import ProcessGroups, make_group
from xdit_compile.runtime.deferred.guidance_round_robin import GuidanceRoundRobin
from xdit_compile.runtime.pipefusion.stage_communicator import StageCommunicator
from xdit_compile.spec import ShardingSpec

log = logging.getLogger(__name__)

CheckInputs = bool | Literal["behind", "always"]
"""When ranks compare what they call a model with: ``behind`` (or True), the first call of a kind and the first step of
a loop before they run and all others meanwhile; ``always``, all before they run; False, never."""


def check_when(check_inputs: object) -> None:
    """Refuse what is no `CheckInputs`.

    Raises:
        SpecError: naming what it may be.
    """
    if not isinstance(check_inputs, bool) and check_inputs not in ("behind", "always"):
        raise SpecError(f"check_inputs is True, False, 'behind' or 'always', got {check_inputs!r}")


class ParallelGroup:
    """A spec, the global ranks that carry it out, in the order of its mesh, and how they agree and fail.

    Attributes:
        rank: this process's place among them.
        timeout: seconds to wait for another rank.
        data_if_possible: whether a batch that ``data`` cannot cut is no error.
        audience: the ranks that are told what this one's pipeline computes; empty for those of the pipeline itself.
        epoch: counts a pipeline's calls: what was kept in one is of another picture.
        running: whether a pipeline's call is under way.
        late: what looks at values that were not waited for, by the identity of the model's runner.
        counts: how many ``calls`` of parallel models its ranks have made, and how many were ``shared`` by all of
            them, and how many used values ``kept`` from a step before.
    """

    def __init__(self, spec: ShardingSpec, ranks: Sequence[int], timeout: float,
                 within: ParallelGroup | None = None) -> None:
        self.spec, self.ranks, self.timeout = spec, tuple(ranks), timeout
        self.rank = 0 if len(ranks) == 1 else self.ranks.index(dist.get_rank())
        self.counts: Counter[str] = Counter() if within is None else within.counts
        counts = self.counts
        self.control: ControlPlane = ControlPlane(self.ranks, timeout, None if within is None else within.control,
                                        lambda: counts["calls"])
        self.data_if_possible = self.running = False
        self.epoch = 0
        self.audience: tuple[int, ...] = ()
        self.late: dict[int, Callable[[], None]] = {}

    @cached_property
    def process_groups(self) -> ProcessGroups:
        return ProcessGroups(self.spec, self.ranks, self.control)

    @property
    def stage(self) -> int:
        """Which stage of a pipeline this rank is."""
        return self.rank // self.spec.ranks_per_stage % self.spec.pipefusion_degree

    @cached_property
    def communicator(self) -> StageCommunicator:
        """What the stages of this rank's pipeline exchange. All its ranks ask for it together the first time."""
        first = self.rank - self.stage * self.spec.ranks_per_stage
        column = [self.ranks[first + i * self.spec.ranks_per_stage] for i in range(self.spec.pipefusion_degree)]
        return StageCommunicator(column, self.stage, self.audience or column, self.control)

    @property
    def communicators(self) -> list[StageCommunicator]:
        """Those that were asked for, of the groups that take turns too."""
        return [group.communicator for group in (self, vars(self).get("subgroup"))
                if group is not None and "communicator" in vars(group)]

    def settle(self) -> None:
        """Wait for all that was promised."""
        for one in self._pending():
            one()

    def settle_comparisons(self) -> None:
        """Wait until all that ranks have compared meanwhile is known to be equal, and what was not waited for is
        looked at.

        Raises:
            RankMismatch: something is not.
            XditError: a call was not what it was taken for.
        """
        for look in self.late.values():
            look()
        for group in (vars(self).get("subgroup"), vars(self).get("vae"), self):
            if group is not None:
                group.control.settle()

    def _pending(self) -> list[Callable[[], object]]:
        """What waits for it, for each kind of it by itself."""
        return [*([self.round_robin.settle] if self.round_robin else []),
                *(communicator.settle for communicator in self.communicators)]

    @cached_property
    def round_robin(self) -> GuidanceRoundRobin | None:
        """Where calls can be shared out among groups. All ranks ask for it together the first time."""
        if self.spec.cfg_degree == 1:
            return None
        return GuidanceRoundRobin(self.spec, self.ranks, self.control)

    @cached_property
    def subgroup(self) -> ParallelGroup | None:
        """The ranks that run what is too small to be shared out by all: the group that this rank takes turns with, or
        those that share an autoencoder for one sample. All its ranks ask for it together."""
        if self.round_robin is not None:
            if self.spec.sequence_degree % self.spec.shard_degree:
                most = self.spec.sequence_degree
                raise SpecError(f"{self.spec}: the groups of guidance take turns in calls whose batch cannot be cut, "
                                "so that each has to have all parameters by itself, but "
                                f"shard={self.spec.shard_degree} cuts them over more ranks than " + (
                                    f"those of one group and stage; use shard={most}" if most > 1 else
                                    "the one of a group and stage; add ulysses=N"))
            spec = replace(self.spec, cfg_degree=1, vae_degree=1, encoders="everywhere")
            made = ParallelGroup(spec, self.round_robin.members(spec, self.ranks), self.timeout, self)
            shift = self.rank - self.round_robin.mine * spec.model_degree
            made.audience = tuple(
                self.ranks[shift + i * spec.model_degree + (stage - self.stage) * spec.ranks_per_stage]
                for i in range(self.round_robin.degree) for stage in range(spec.pipefusion_degree))
            return made
        return self._block(replace(self.spec, data_degree=1)) if self.data_if_possible else None

    @cached_property
    def vae(self) -> ParallelGroup:
        """The group that shares an autoencoder with this rank: the sides of its pictures, and the pictures themselves
        if there are ranks enough. All its ranks ask for it together."""
        own = self.spec
        data = own.data_degree if own.world_size % (own.data_degree * own.vae_degree) == 0 else 1
        # A ring, because an autoencoder's attention has a single head.
        made = self._block(ShardingSpec(
            ring_degree=own.vae_degree, data_degree=data, backend=own.backend, compile_mode=own.compile_mode,
            onediff_backend=own.onediff_backend, compile_options=own.compile_options,
            attention_kernel=own.attention_kernel))
        made.data_if_possible = data > 1
        return made

    def _block(self, spec: ShardingSpec) -> ParallelGroup:
        """This rank and its neighbours, as many as ``spec`` asks for."""
        first = self.rank - self.rank % spec.world_size
        return ParallelGroup(spec, self.ranks[first : first + spec.world_size], self.timeout, self)

    @cached_property
    def everyone(self) -> dist.ProcessGroup:
        """All ranks as one group. They ask for it together the first time."""
        return make_group("xdit_compile.all", self.ranks, self.control)

    def gather(self, what: str, mine: Any) -> list[Any]:
        """What every rank holds, in order: numbers, texts and containers of them, but no tensors. All ranks come here
        together; ``what`` says for what, where one does not."""
        text, tensors = encoded(mine)
        if tensors:
            raise XditError("gather takes values without tensors")
        return [decoded(one.encode(), _none) for one in self.control.gather(what, text.decode())]

    def broadcast(self, value: Any, owner: int, device: torch.device) -> Any:
        """What rank ``owner`` holds, on all; tensors arrive on ``device``. Of any of ``codec``'s types."""
        group, place = self.everyone, _device_of(self.everyone)
        text, tensors = encoded(value) if self.rank == owner else (b"", [])
        size = torch.tensor([len(text)], device=place)
        dist.broadcast(size, group=group, group_src=owner)
        sent = _bytes(text, place) if self.rank == owner else torch.empty(int(size), dtype=torch.uint8, device=place)
        dist.broadcast(sent, group=group, group_src=owner)
        if self.rank != owner:
            def made(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
                tensors.append(torch.empty(shape, dtype=dtype, device=device))
                return tensors[-1]

            value = decoded(sent.cpu().numpy().tobytes(), made)
        for tensor in tensors:
            dist.broadcast(tensor.contiguous() if self.rank == owner else tensor, group=group, group_src=owner)
        return value

    def abandon_call(self) -> None:
        """A call ended with an exception. If all ranks raised it alike, what is still on the way is waited for and the
        groups are fine; else a collective failed."""
        if self.control.verdict is None:
            guard = self.control.guard("giving up a call", tuple(self.groups_of_all()))
            with suppress(RankFailure), guard:  # known from then on, and raised by every later call
                for one in self._pending():
                    self._finish_quietly(one)

    def _finish_quietly(self, pending: Callable[[], object]) -> None:
        try:
            pending()
        except Exception as error:
            if isinstance(error, RankFailure) or is_peer_loss(error):
                raise
            # Of something recorded that nobody will use; all has arrived before.
            log.debug("what was recorded cannot be computed", exc_info=True)

    def groups_of_all(self) -> Iterator[dist.ProcessGroup]:
        """Those that were made, of this group and of the parts of it."""
        known = vars(self)
        for name in ("process_groups", "communicator"):
            if name in known:
                yield from known[name].all()
        if "everyone" in known:
            yield self.everyone
        if "round_robin" in known and self.round_robin is not None:
            yield self.round_robin.group
        for name in ("subgroup", "vae"):
            if known.get(name) is not None:
                yield from known[name].groups_of_all()


def _bytes(text: bytes, place: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(place)


def _none(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    raise XditError("a message without tensors holds one")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must be for a collective of ``group``."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
