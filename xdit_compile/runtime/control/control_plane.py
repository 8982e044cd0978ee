"""The control plane of a parallel group: agreeing before a call, and failing together."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup

from xdit_compile.errors import RankFailure, RankMismatch, XditError
from xdit_compile.progress import patience, say
from xdit_compile.runtime.control.abort import Connections, abort, is_peer_loss, missing_connections
from xdit_compile.runtime.control.agreement_channel import (
    DIGEST,
    AgreementChannel,
    Comparison,
    Facts,
    Gather,
    Resolve,
    exchanged,
    final,
    mismatch,
)
from xdit_compile.runtime.control.heartbeat import BEAT, SILENCE, Heartbeat, Point, Verdict, silent
from xdit_compile.runtime.control.secret import secret
from xdit_compile.runtime.control.store import attempt, own_connection

# Seconds between two looks at what became of a peer that is waited for.
_LOOK = 0.02

T = TypeVar("T")


class ControlPlane:
    """How the ranks of one parallel group agree and fail, independent of the groups that move their data.

    Constructed by all ranks of the group and by no others, in the same order as their other Controls; one
    process may have several. A failure is final: every later `agree` or `guard` raises it again at once, for
    the data groups are broken with it. `close` ends a Control; so does the end of the process.
    """

    def __init__(self, ranks: Sequence[int], timeout: float = 60.0, within: ControlPlane | None = None,
                 step: Callable[[], int] = int) -> None:
        """Connect to all `ranks` (global ranks); `timeout` in seconds limits every wait for a peer.

        Raises `RankFailure` naming a rank that does not construct its Control within the timeout, or as soon as its
        process is known to be gone. A group of one rank needs no initialised process group.

        Args:
            within: the Control of the whole job that these ranks are a part of: what ends that one ends this.
            step: counts what this rank has begun since; whoever waits for a peer asks how far that is.
        """
        self.ranks = tuple(sorted(ranks))
        self.timeout = timeout
        self._heart: Heartbeat | None = None
        self._within = within
        self._watched: dict[ProcessGroup, Connections] = {}
        self._own: list[Connections] = []
        self._channels: list[AgreementChannel] = []
        """The one that compares while this rank goes on, once it was asked for."""
        self._mismatch: RankMismatch | None = None
        """What was found unequal after a rank had gone on with it."""
        self._key = b""
        self._told_to_stop = False
        if len(self.ranks) == 1:
            return
        self.rank = dist.get_rank()
        if self.rank not in self.ranks:
            raise XditError(f"rank {self.rank} is not one of the ranks {self.ranks} of this Control")
        default: Any = dist.distributed_c10d._get_default_store()
        store = own_connection(default)
        host = None if _launcher_hosts_store() else 0
        name = f"xdit/{'-'.join(map(str, self.ranks))}"
        peers = [rank for rank in self.ranks if rank != self.rank]
        self._key = secret()
        try:
            name = f"{name}/{attempt(store, name, self.rank)}"
        except RuntimeError as error:
            raise RankFailure(*_unanswered(host)) from error
        heart = Heartbeat(store, name, self.rank, peers, timeout, host, self._key)
        heart.step = step
        # Also runs at the end of the process, while torch still works.
        self._close = weakref.finalize(self, _leave, heart, default, self._own, self._channels)
        self._heart = heart
        try:
            self._meet(heart)
            self._store, self._name = default, name
            self._gloo = self._connect("gloo")
            self._sent = torch.empty(len(self.ranks), DIGEST, dtype=torch.uint8)
            self._got = torch.empty_like(self._sent)
        except RankFailure:
            self._close()
            raise
        except BaseException as error:
            heart.convict(self.rank, f"failed while joining: {_described(error)}")
            self._close()
            raise

    def agree(self, what: str, mine: Mapping[str, str]) -> None:
        """Make sure that all ranks hold equal texts under equal keys; `what` is the call this is about.

        One small exchange while all is equal. Raises `RankMismatch` on every rank, naming the keys and who
        holds what, if anything differs, and `RankFailure` naming the rank that is gone or does not come
        within the timeout.
        """
        text = json.dumps(dict(mine), sort_keys=True).encode()
        self._together(what, text, lambda text: self._compare(what, text))

    def agree_meanwhile(self, what: str, facts: Facts, waits: bool, resolve: Resolve = final) -> None:
        """`agree` on ``facts()``, in a thread, while this rank goes on, unless it ``waits``.

        All ranks come here in the same order, and at most one comparison is under way. Where some rank has gone on with
        something else than the others, that is final: collectives end, and every rank raises `RankMismatch`, here or
        wherever else this group is asked for something next.

        Args:
            facts: called in the thread.
            resolve: told of a difference, in the thread.
        """
        heart = self._heart
        if heart is None:
            return
        self._check()
        channel = self._channel()
        self._await(channel.last)
        heart.call, heart.label = heart.call + 1, what
        channel.submit(Comparison(what, facts, waits, resolve))
        if waits:
            self._await(channel.last)

    def settle(self) -> None:
        """Wait until all that was compared meanwhile is known to be equal. Raises as `agree_meanwhile`."""
        if self._channels:
            self._check()
            self._await(self._channels[0].last)

    def _await(self, comparison: Comparison | None) -> None:
        heart = self._heart
        if comparison is None or heart is None:
            return
        start = time.monotonic()
        outer, heart.waiting = heart.waiting, True
        try:
            with heart.needing_others():
                comparison.done.wait()
        finally:
            heart.waiting = outer
        if comparison.error is None:
            return
        if is_peer_loss(comparison.error):
            raise RankFailure(*self._find(comparison.error, comparison.what, start)) from comparison.error
        if isinstance(comparison.error, RankMismatch) and comparison.recoverable:
            self._channels[0].last = None
        raise comparison.error

    def gather(self, what: str, mine: str) -> list[str]:
        """The texts of all ranks, in their order, which come here together and raise as in `agree`."""
        return [one.decode() for one in self._together(
            what, mine.encode(), lambda text: exchanged(self._gloo, self.ranks, text))]

    def to_stop(self, mine: bool) -> bool:
        """Whether all ranks say so now, or any did when they were asked the last time; only who says so waits for the
        others. All ranks ask as often. `begin` forgets what was said."""
        if self._heart is None:
            return mine
        self.settle()
        if not self._told_to_stop:
            different: list[RankMismatch] = []

            def resolve(error: RankMismatch, _: Gather) -> None:
                different.append(error)
                self._told_to_stop = True

            self.agree_meanwhile("whether to stop", lambda: {"stop": str(mine)}, mine, resolve)
            return mine and not different
        return True

    def begin(self) -> None:
        """Something new begins, which nobody was told to stop."""
        self._told_to_stop = False

    def _together(self, what: str, text: bytes, do: Callable[[bytes], Sequence[bytes]]) -> Sequence[bytes]:
        """``do(text)``, which exchanges something with all peers."""
        heart = self._heart
        if heart is None:
            return [text]
        self._check()
        heart.call, heart.label = heart.call + 1, what
        start = time.monotonic()
        try:
            with heart.needing_others():
                return do(text)
        except RuntimeError as error:
            if not is_peer_loss(error):
                raise
            raise RankFailure(*self._find(error, what, start)) from error

    @contextmanager
    def guard(self, label: str, groups: Sequence[ProcessGroup] = ()) -> Iterator[None]:
        """Around a body that runs collectives on `groups`: when one rank fails, all of them do, soon.

        An exception of this rank's own is told to the peers and goes on as it is; their collectives on
        `groups` are ended, so that they wake at once. An exception that a peer caused becomes `RankFailure`,
        naming that peer. With NCCL the body may end before its kernels do: a failure that strikes later
        raises at the next `agree`, `guard` or `check`.

        Where there are no `groups`, an exception that all ranks raise at the same point is theirs alone and ends
        nothing; a rank that raises one waits until the others have, or have gone past that point.
        """
        heart = self._heart
        if heart is None:
            yield
            return
        self._check()
        heart.label = label
        start = time.monotonic()
        outer, heart.waiting = heart.waiting, True
        try:
            for group in groups:
                if group not in self._watched:
                    self._watched[group] = Connections(group)
                    heart.connections.append(self._watched[group])
            with heart.needing_others():
                yield
        except BaseException as error:
            self._failed(heart, error, label, groups, start)
            raise
        finally:
            heart.waiting = outer
        if not outer:
            heart.ended = heart.call
        self._check()

    def fail(self, error: BaseException, label: str) -> None:
        """Tell the others of an exception outside of any guard, as one without groups would."""
        if self._heart is not None and self._heart.known is None:
            self._failed(self._heart, error, label, (), time.monotonic())

    def _failed(self, heart: Heartbeat, error: BaseException, label: str, groups: Sequence[ProcessGroup],
                start: float) -> None:
        if isinstance(error, RankMismatch):
            return
        if isinstance(error, RankFailure):
            # Perhaps of a part of these ranks; the others are to learn of it too.
            if heart.known is None:
                heart.convict(error.rank, error.reason)
                heart.end_collectives()
        elif is_peer_loss(error):
            if self._channels:
                self._channels[0].settle(SILENCE)
            if self._mismatch is not None:
                raise self._mismatch from error
            raise RankFailure(*self._find(error, label, start)) from error
        elif groups or not self._all_raised(heart, error):
            heart.convict(self.rank, f"failed: {_described(error)}")
            heart.end_collectives()

    def _all_raised(self, heart: Heartbeat, error: BaseException) -> bool:
        """Whether every peer has come to an exception of the same class at the same point, which is waited for until
        one is seen to have gone another way."""
        if heart.known is not None:
            return False
        before = heart.ended
        heart.failed = mine = Point(heart.call, heart.step(), type(error).__qualname__)
        heart.beat()
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline and not heart.verdict() and not heart.store_lost:
            if self._within is not None and self._within.verdict:
                return False
            beats = heart.peers()
            elsewhere = [b for b in beats.values() if b.failed != mine]
            if not elsewhere:
                return True
            if any(b.left or b.call > mine.call or b.step > mine.step or b.ended >= mine.call > before
                   or (b.failed is not None and b.failed.call >= mine.call) for b in elsewhere):
                return False
            time.sleep(_LOOK)
        return False

    @property
    def verdict(self) -> Verdict | None:
        """Why the group failed, as far as this rank has heard."""
        return self._heart.known if self._heart is not None else None

    def patiently(self, what: str, make: Callable[[], T]) -> T:
        """``make()``, which waits for peers in native code: in a thread that is given up when one of them is gone.

        Raises `RankFailure` naming that peer.
        """
        heart = self._heart
        if heart is None:
            return make()
        self._check()
        heart.label = what
        start = time.monotonic()
        found: list[T] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                found.append(make())
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, name="xdit-waits", daemon=True)
        thread.start()
        outer, heart.waiting = heart.waiting, True
        try:
            with heart.needing_others():
                while thread.is_alive():
                    thread.join(BEAT)
                    if thread.is_alive() and (heart.known or self._lost_a_peer()):
                        raise RankFailure(*self._find(RuntimeError("a peer is gone"), what, start))
        finally:
            heart.waiting = outer
        if raised and isinstance(raised[0], RuntimeError):
            raise RankFailure(*self._find(raised[0], what, start)) from raised[0]
        if raised:
            raise raised[0]
        return found[0]

    def _lost_a_peer(self) -> bool:
        """Whether a connection of the control group has ended."""
        return any(one.lost() for one in self._own)

    def check(self) -> None:
        """Raise `RankFailure` if the group is known to have failed; costs nothing."""
        if self._heart is not None:
            self._check()

    def close(self) -> None:
        """Leave the group; peers that still call fail, naming this rank. Closing twice does nothing."""
        if self._heart is not None:
            self._close()
            self._watched.clear()

    def _meet(self, heart: Heartbeat) -> None:
        """Wait until every peer has said something, but for none whose process is gone.

        Raises `RankFailure` naming the one that does not come, `XditError` where a peer holds another secret.
        """
        start = time.monotonic()
        default = dist.group.WORLD
        look, patient = _LOOK, patience()
        while absent := heart.absent():
            if patient is not None and time.monotonic() - start > patient:
                patient *= 2
                if all(rank in absent for rank in self.ranks if rank < self.rank):
                    say(f"waiting for rank {', '.join(map(str, absent))} to come to parallelize or load, since "
                        f"{time.monotonic() - start:.0f} s")
            if verdict := heart.verdict():
                raise RankFailure(*verdict)
            if heart.refused:
                raise XditError(f"ranks cannot be told from strangers: {heart.foreign(heart.refused[0])}")
            waited = time.monotonic() - start
            if heart.store_lost:
                raise RankFailure(*heart.convict(*_unanswered(heart.host)))
            if waited >= self.timeout:
                raise RankFailure(*heart.convict(absent[0], _absent(waited)))
            outside = 0 if default is None else default.size() - len(self.ranks)
            if look >= BEAT and default is not None and missing_connections(default) >= len(absent) + outside:
                reason = f"is gone (its connections have ended); {_absent(waited)}"
                raise RankFailure(*heart.convict(absent[0], reason))
            time.sleep(look)
            look = min(2 * look, BEAT)

    def _connect(self, name: str) -> Any:
        """A gloo group of these ranks."""
        # Not dist.new_group: unless all ranks of the job take part, it derives the group's name from how many groups
        # each process has, and ranks that differ in this wait for each other in vain.
        assert self._heart is not None
        # Its own connection: while gloo waits for a key, nobody else is served on one.
        store = PrefixStore(f"{self._name}/{name}", own_connection(self._store))
        index, limit = self.ranks.index(self.rank), timedelta(seconds=self.timeout)
        made = self.patiently("joining", lambda: dist.ProcessGroupGloo(store, index, len(self.ranks), limit))
        ends = Connections.of_gloo(store, len(self.ranks))
        self._own.append(ends)
        self._heart.connections.append(ends)
        if self._within is not None and self._within._heart is not None:
            self._within._heart.connections.append(ends)
        return made

    def _channel(self) -> AgreementChannel:
        if not self._channels:
            found = weakref.WeakMethod(self._disagreed)
            self._channels.append(AgreementChannel(
                self._connect("channel"), self.ranks, partial(_digest_of, self._key),
                lambda error: None if (told := found()) is None else told(error)))
        return self._channels[0]

    def _disagreed(self, error: RankMismatch) -> None:
        """Some rank has gone on with something else than the others: end all of them. In the channel's thread."""
        self._mismatch, heart = error, self._heart
        assert heart is not None
        heart.convict(-1, str(error))
        if self._within is not None and self._within._heart is not None:
            self._within._heart.convict(-1, str(error))
        # Not the channel itself, over which others may still be told.
        heart.end_collectives(self._own[1:])

    def _check(self) -> None:
        assert self._heart is not None
        if not self._close.alive:
            raise XditError("this Control is closed")
        if self._mismatch is not None:
            raise self._mismatch
        if self._heart.known is not None:
            self._heart.end_collectives()
            raise RankFailure(*self._heart.known)

    def _compare(self, what: str, text: bytes) -> Sequence[bytes]:
        digest = _digest_of(self._key, text)
        self._sent.numpy()[:] = memoryview(digest)
        # An all-to-all of copies, because gloo's all-gather is a ring: as many steps as there are peers.
        self._gloo.alltoall_base(self._got, self._sent, [], []).wait()
        rows = [row.tobytes() for row in self._got.numpy()]
        if any(row != digest for row in rows):
            raise mismatch(what, exchanged(self._gloo, self.ranks, text), self.ranks)
        return rows

    def _find(self, error: BaseException, label: str, start: float) -> Verdict:
        """Who is to blame that a collective of this rank ended with `error`; ends all others on the way."""
        heart = self._heart
        assert heart is not None
        # At once, before searching: some peers may wait for this rank alone.
        heart.end_collectives()
        waited = time.monotonic() - start
        before = heart.peers()
        deadline = time.monotonic() + SILENCE
        while not (verdict := heart.verdict()) and not heart.store_lost:
            if self._within is not None and self._within._heart and (wider := self._within._heart.verdict()):
                return heart.convict(*wider)
            now = heart.peers()
            for rank, beat in now.items():
                if beat.left:
                    return heart.convict(rank, f"left (process ended, or Control closed) before {label}")
            quiet = [rank for rank, beat in now.items() if rank in before and beat.number == before[rank].number]
            if not quiet or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if verdict:
            return verdict
        if heart.store_lost:
            lost = "the launcher, which hosts the rendezvous store, is gone"
            return heart.convict(*(heart.quiet() or Verdict(-1, f"{lost} during {label}")))
        if quiet:
            return heart.convict(quiet[0], silent(label, waited + SILENCE))
        for rank, beat in now.items():
            if beat.call < heart.call:
                late = f"did not come to {label}; no answer for {waited:.1f} s (alive, last in {beat.label})"
                return heart.convict(rank, late)
        return heart.convict(-1, f"{label} failed although every rank answers: {error}")


def _digest_of(key: bytes, text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=DIGEST, key=key).digest()


def _unanswered(host: int | None) -> Verdict:
    if host is None:
        return Verdict(-1, "the launcher, which hosts the rendezvous store, gives no answer")
    return Verdict(host, "hosts the store and gives no answer (process stopped or gone?)")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _absent(seconds: float) -> str:
    return f"did not construct its Control; no answer for {seconds:.1f} s"


def _leave(heart: Heartbeat, store: object, own: Sequence[Connections], channels: Sequence[AgreementChannel]) -> None:
    """Say good-bye; holds on to `store` until then, for this process may host its server."""
    for channel in channels:
        channel.stop(lambda: abort(own[1:]), _LOOK if heart.known else SILENCE)
    heart.stop()
    # Peers that wait for this rank wake.
    abort(own)


def _launcher_hosts_store() -> bool:
    # How torchrun and our launch() tell torch the same; without a launcher rank 0 hosts it.
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
