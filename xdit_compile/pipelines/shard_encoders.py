"""Encoders whose parameters are cut over all ranks: each rank computes the whole, so that the answer is that of one
device to the bit, with a block's parameters gathered while the block before runs and dropped after it.

An encoder is not captured: its own code runs, whatever its hooks, caches and outputs do. What a block needs is put into
its place when the block is called, and taken out again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xdit_compile.driver.checkpoint import Checkpoint
from xdit_compile.driver.edits import loading
from xdit_compile.driver.parallel_model import Method, Parallel, instance_of_subclass, moved
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import bind_call, named_leaves
from xdit_compile.ir.carried_types import carried
from xdit_compile.ir.parameter_groups import groups_of, is_block
from xdit_compile.ir.released_parameters import absence, device_of_model, missing_parameters
from xdit_compile.runtime.control.replicas import Replicas
from xdit_compile.runtime.control.tensor_digest import digests
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.runtime.execution.parameter_store import ParameterStore
from xdit_compile.runtime.parallel_group import CheckInputs, ParallelGroup


def sharded(encoder: nn.Module, group: ParallelGroup, check_inputs: CheckInputs, weights: Checkpoint | None) -> Any:
    """``encoder`` with each rank's share of its parameters, once it was called; ``weights``: where they are read from,
    if it is on the meta device."""
    shares = EncoderShares(encoder, group, check_inputs, weights)
    members: dict[str, Any] = loading(type(encoder), lambda: None if shares.store is None else (shares.store, group))
    members |= {
        "forward": Method("forward", encoder.forward, _forward(type(encoder), shares)), "runners": {},
        "shares": shares, "device": property(device_of_model), "_apply": moved(type(encoder))}
    return instance_of_subclass(encoder, Parallel, members, vars(encoder))


def _forward(cls: Any, shares: EncoderShares) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = materialize((args, kwargs))
        named, others = named_leaves(bind_call(self, args, kwargs))
        group = shares.group
        group.counts["calls"] += 1
        group.control.agree(f"the inputs of {cls.__name__}", digests(named) | others)
        shares.prepare()
        # Its own forward, or one that was put on the encoder before.
        own = vars(self).get("forward") or functools.partial(cls.forward, self)
        with group.control.guard(cls.__name__, (group.everyone,)), shares.coming():
            return own(*args, **kwargs)

    return forward


class EncoderShares:
    """This rank's shares of an encoder's parameters, and how they come together.

    Attributes:
        store: the shares, once the encoder was called.
    """

    def __init__(self, encoder: nn.Module, group: ParallelGroup, check_inputs: CheckInputs,
                 weights: Checkpoint | None) -> None:
        self.encoder, self.group, self.check_inputs, self.weights = encoder, group, check_inputs, weights
        self.store: ParameterStore | None = None
        self._blocks: dict[str, list[str]] = {}
        """Groups of each block, by the block's path."""
        self._order: list[str] = []
        """Blocks as the last call came to them."""
        self._running = False

    def prepare(self) -> None:
        """Keep a share of each group and give up the rest, at the first call; see that nothing has changed, at others.

        Raises:
            XditError: on every rank alike; parameters are nowhere, differ between ranks, or were changed since.
        """
        if self.store is not None:
            self.store.check(self.encoder)
            return
        try:
            self._take()
        except Exception as error:
            self.group.control.agree("the shares of an encoder", {"error": f"{type(error).__name__}: {error}"})
            raise
        self.group.control.agree("the shares of an encoder", {"files": self.weights.digest() if self.weights else ""})

    def _take(self) -> None:
        groups = groups_of(self.encoder.named_parameters(remove_duplicate=False))
        device = device_of_model(self.encoder)
        if self.weights is not None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device
            inside = {n for g in groups for m in g.members for n in m.names}
            held = [*self.encoder.named_parameters(remove_duplicate=False), *self.encoder.named_buffers()]
            self.weights.load(self.encoder, [n for n, _ in held if n not in inside], device)
        elif absent := missing_parameters(self.encoder, [n for n, _ in self.encoder.named_parameters()]):
            raise absence(self.encoder, absent, "give parallelize weights={NAME: FOLDER} for this component too")
        if self.check_inputs:
            # Given up, they cannot be compared any more.
            replicas = Replicas()
            replicas.summary({type(self.encoder).__name__: self.encoder})
            replicas.compare(self.group.control)
        store = ParameterStore(groups, self.group.rank, len(self.group.ranks), offload=False)
        store.take(self.encoder, set(store.groups), self.weights.spans if self.weights else None, device)
        for name, of in store.groups.items():
            if is_block(of.path) and type(self.encoder.get_submodule(of.path)).forward is not nn.Module.forward:
                self._blocks.setdefault(of.path, []).append(name)
        for path, module in self.encoder.named_modules():
            if path and any(p is not None and p.is_meta for p in module._parameters.values()):
                module.register_forward_pre_hook(functools.partial(self._begins, path))
        self.store = store

    def _begins(self, path: str, *_: Any) -> None:
        """A part runs that has no parameters of its own while the encoder does not.

        Raises:
            XditError: it was called by itself.
        """
        if not self._running:
            raise XditError(f"{path} of this {type(self.encoder).__name__} was called by itself, and under "
                            "encoders=shard its parameters are only there while the encoder runs; leave encoders=shard "
                            "out, or give encoders=everywhere where auto chose it")

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Within, the encoder runs: what lies outside of blocks is there, and blocks' parameters come and go."""
        assert self.store is not None
        outside = [name for name, of in self.store.groups.items() if of.path not in self._blocks]
        arrivals, seen = _Arrivals(self), list[str]()
        with ExitStack() as stack:
            stack.callback(arrivals.settle)
            for name in outside:
                stack.enter_context(self._placed([name], [arrivals.start(name)]))
            for path in self._blocks:
                block = self.encoder.get_submodule(path)
                stack.enter_context(_around(block, functools.partial(self._block, path, arrivals, seen)))
            before, self._running = self._running, True
            try:
                yield
            finally:
                self._running = before
        self._order = seen

    @contextmanager
    def _block(self, path: str, arrivals: _Arrivals, seen: list[str]) -> Iterator[None]:
        """A block runs: its parameters are there, and the next one's are under way."""
        names = self._blocks[path]
        came = [arrivals.take(name) for name in names]
        place = len(seen)
        seen.append(path)
        if self._order[place : place + 1] == [path] and place + 1 < len(self._order):
            arrivals.expect(self._blocks[self._order[place + 1]])
        with self._placed(names, came):
            yield

    @contextmanager
    def _placed(self, names: Sequence[str], came: Sequence[_Arrival]) -> Iterator[None]:
        """Within, parameters of these groups are where the model looks for them."""
        assert self.store is not None
        put: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, arrival in zip(names, came, strict=True):
                memory, group = arrival.wait(), self.store.groups[name]
                for member in group.members:
                    seen = torch.as_strided(memory, member.shape, member.stride, member.offset)
                    made = nn.Parameter(seen, requires_grad=False)
                    for path, _, leaf in (n.rpartition(".") for n in member.names):
                        held = self.encoder.get_submodule(path)._parameters
                        put.append((held, leaf, held[leaf]))
                        held[leaf] = made
            yield
        finally:
            for held, leaf, before in put:
                held[leaf] = before

    def gathered(self, name: str) -> _Arrival:
        """A group's parameters, which begin to come."""
        assert self.store is not None
        share = self.store[name]
        made = torch.empty(share.numel() * self.store.ranks, dtype=share.dtype, device=share.device)
        work = dist.all_gather_into_tensor(carried(made), carried(share), group=self.group.everyone, async_op=True)
        return _Arrival(made, work)


class _Arrival:
    """Memory that is being filled, and what waits for it."""

    def __init__(self, memory: torch.Tensor, work: Any) -> None:
        self._memory, self._work = memory, work

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._memory


class _Arrivals:
    """What is under way in one call: no more than the next block."""

    def __init__(self, shares: EncoderShares) -> None:
        self._shares = shares
        self._expected: dict[str, _Arrival] = {}

    def start(self, name: str) -> _Arrival:
        return self._shares.gathered(name)

    def expect(self, names: Sequence[str]) -> None:
        """Let these begin to come."""
        for name in names:
            if name not in self._expected:
                self._expected[name] = self.start(name)

    def take(self, name: str) -> _Arrival:
        """One that comes or has come."""
        return self._expected.pop(name, None) or self.start(name)

    def settle(self) -> None:
        """Wait for what nobody took."""
        for arrival in self._expected.values():
            arrival.wait()
        self._expected = {}


@contextmanager
def _around(module: nn.Module, within: Callable[[], Any]) -> Iterator[None]:
    """Within, each call of ``module``, hooks included, is made in the context that ``within`` makes anew."""
    def call(*args: Any, **kwargs: Any) -> Any:
        with within():
            return type(module)._call_impl(module, *args, **kwargs)

    vars(module)["_call_impl"] = call
    try:
        yield
    finally:
        del vars(module)["_call_impl"]
