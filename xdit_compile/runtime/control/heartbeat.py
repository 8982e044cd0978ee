"""Telling the peers of a group that this rank lives, and learning from the store what became of them."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch.distributed import PrefixStore, Store

from xdit_compile.progress import doing, patience, say
from xdit_compile.runtime.control.abort import Connections, abort
from xdit_compile.runtime.control.group_cache import give_up
from xdit_compile.runtime.control.secret import VARIABLE, signed, verified

# Seconds between two beats; a verdict is noticed within this time even when no connection breaks.
BEAT = 0.5
# Seconds without a beat after which, once something has already failed, a rank counts as gone.
SILENCE = 4 * BEAT
# Seconds for which the host of the store stays when it leaves a group that has failed, so that all learn why.
FAREWELL = 20 * BEAT

T = TypeVar("T")


class Verdict(NamedTuple):
    """The one cause that all ranks of a group report for its failure."""

    rank: int
    reason: str


class Point(NamedTuple):
    """Where a rank was when an exception of its own ended what it did."""

    call: int
    step: int
    kind: str  # the exception's class


class Beat(NamedTuple):
    """What a rank last said of itself."""

    number: int  # grows with every beat
    call: int  # how many agreements it has begun
    label: str  # the last of them, or what it does that takes long
    inside: bool  # it is in there
    left: bool  # it said good-bye
    step: int  # how many calls of models it has begun
    ended: int  # the last agreement after which a body that fails together came to its end
    failed: Point | None  # the last exception that it told the others of
    told: bool  # it knows why the group failed


class Heartbeat:
    """A thread that beats for this rank and wakes it when its group has failed.

    It touches neither the data groups nor the control group in normal operation, only its own connection to
    the store. When the store is lost (`store_lost`) it goes on only for as long as that means something: a job may
    end in any order.
    """

    def __init__(self, store: Store, name: str, rank: int, peers: Sequence[int], timeout: float, host: int | None,
                 key: bytes = b"") -> None:
        """Beat under `name` in the job's `store`, by a connection which no one else uses; a peer silent for `timeout` s
        in `waiting` is given up.

        `host` is the rank whose process hosts the store, None when no rank does. What is written is signed with `key`
        for the group `name`.
        """
        self.host = host
        self.store_lost = False
        self.call, self.label, self.ended = 0, "start", -1
        self.step: Callable[[], int] = int
        self.failed: Point | None = None
        self.waiting = False  # this rank is inside a parallel call
        self.since: float | None = None  # when it began what needs the others
        self.connections: list[Connections] = []  # what a failure has to end
        self.known: Verdict | None = None  # the verdict, once this rank has met it
        self._job_store = store
        self._store, self._rank, self._peers, self._timeout = PrefixStore(name, store), rank, tuple(peers), timeout
        self._name, self._key = name, key
        self._number = 0
        self._last: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}  # when a peer last came to something else
        self._told_after = 0.0
        self._refused: set[str] = set()
        self._stop = threading.Event()
        self._try(self._beat)
        self._thread = threading.Thread(target=self._run, name="xdit-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say good-bye and end the thread; peers that wait for this rank then know at once."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not threading.current_thread():  # which may have dropped the last reference
            self._thread.join()
        self._try(self._beat)
        # The store ends with its host. The peers first get the time to see it leave, and why: torch's store client
        # writes a warning with a stack trace for every request that finds no server.
        deadline = time.monotonic() + (FAREWELL if self.known else 2 * BEAT)
        while self.host == self._rank and time.monotonic() < deadline:
            beats = self.peers()
            if all(b.left or (b.told if self.known else False) or self.silence(r) > SILENCE for r, b in beats.items()):
                break
            time.sleep(BEAT / 10)

    def verdict(self) -> Verdict | None:
        """Why the group failed, if that is known; None also when the store is lost."""
        if self.known is None:
            self.known = self._try(self._read_verdict)
        return self.known

    def convict(self, rank: int, reason: str) -> Verdict:
        """Make this the verdict unless there is one; what the group's verdict is now."""
        mine = signed(self._key, self._in_store("verdict"), json.dumps([rank, reason]))

        def tell() -> Verdict:
            told = self._store.compare_set("verdict", "", mine)
            found = self._verdict_in(told)
            if found is None:  # a stranger's
                self._store.compare_set("verdict", told.decode(errors="replace"), mine)
            return found or Verdict(rank, reason)

        self.known = self.known or self._try(tell) or Verdict(rank, reason)
        return self.known

    def end_collectives(self, but: Sequence[Connections] = ()) -> None:
        """End what runs on all connections ``but`` these, here and on the peers. Their groups are not used again."""
        ended = [one for one in self.connections if one not in but]
        # First: who wakes may make another model at once.
        give_up([one.group for one in ended if one.group is not None], self._job_store)
        abort(ended)

    def absent(self) -> list[int]:
        """The peers that never said anything."""
        self.peers()
        return [rank for rank in self._peers if rank not in self._last]

    def peers(self) -> dict[int, Beat]:
        """The last beat of every peer that was heard; empty when the store is lost."""
        return self._try(self._read_peers) or {}

    def silence(self, rank: int) -> float:
        """Seconds since a beat of this peer was new."""
        return time.monotonic() - self._heard.get(rank, time.monotonic())

    def quiet(self) -> Verdict | None:
        """When the store is lost: who is to blame. Its host, unless another peer had fallen silent before: then the
        host has left because of that one."""
        silent_ones = [r for r in self._peers if r != self.host and self._long_silent(r)]
        if silent_ones:
            return Verdict(silent_ones[0], silent(self.label, self.silence(silent_ones[0])))
        if self.host is None:
            return None
        seconds = self.silence(self.host)
        return Verdict(self.host, f"{silent(self.label, seconds)}; it hosts the store, which is gone")

    def beat(self) -> None:
        """Tell the others at once where this rank is."""
        self._try(self._beat)

    @contextmanager
    def needing_others(self) -> Iterator[None]:
        """Around what this rank can end only together with the others."""
        outer = self.since
        self.since = outer or time.monotonic()
        try:
            yield
        finally:
            self.since = outer

    def _run(self) -> None:
        while not self._stop.wait(BEAT):
            self._try(self._beat)
            beats = self.peers()
            if self.host in self._peers and self.host in beats and beats[self.host].left:
                self.store_lost = True
                return
            if self.store_lost and (self.host not in self._peers or not self.waiting):
                continue
            if self.store_lost:
                self.known = self.known or self.quiet()
            self._tell_of_wait(beats)
            if self.verdict() or (self.waiting and self._release(beats)):
                self._try(self._beat)
                self.end_collectives()
                return

    def _tell_of_wait(self, beats: dict[int, Beat]) -> None:
        """Say for whom this rank waits, when it has for long, ever less often. Of ranks that wait, the first speaks."""
        since, seconds = self.since, patience()
        if since is None or seconds is None:
            self._told_after = 0.0
            return
        if time.monotonic() - since < max(seconds, self._told_after):
            return
        # Beats are a little old: who comes from one thing to the next is not late.
        late = [rank for rank, b in beats.items() if (b.call < self.call or b.step < self.step())
                and time.monotonic() - self._moved[rank] >= seconds]
        if late and self._rank == min(rank for rank in (self._rank, *beats) if rank not in late):
            self._told_after = 2 * (time.monotonic() - since)
            for rank in late:
                where = f"it is in {beats[rank].label}" if beats[rank].inside else (
                    f"it is in code of its own, after {beats[rank].label}")
                say(f"waiting for rank {rank} in {self.label}: {where}, since "
                    f"{time.monotonic() - self._moved[rank]:.0f} s")

    def _release(self, beats: dict[int, Beat]) -> bool:
        """Whether a peer has been silent for so long that waiting for it has no point."""
        for rank in beats:
            if self.silence(rank) >= self._timeout:
                self.convict(rank, silent(self.label, self.silence(rank)))
                return True
        return False

    def _long_silent(self, rank: int) -> bool:
        """Whether a peer missed beats that others, which were heard later, did not."""
        latest = max(self._heard.values(), default=0.0)
        return rank in self._heard and latest - self._heard[rank] > SILENCE

    def _in_store(self, key: str) -> str:
        return f"{self._name}/{key}"

    def _beat(self) -> None:
        self._number += 1
        beat = Beat(self._number, self.call, doing() or self.label, bool(doing()) or self.since is not None,
                    self._stop.is_set(), self.step(), self.ended, self.failed, self.known is not None)
        key = f"beat{self._rank}"
        self._store.set(key, signed(self._key, self._in_store(key), json.dumps(beat)))

    def _read_verdict(self) -> Verdict | None:
        return self._verdict_in(self._store.get("verdict")) if self._store.check(["verdict"]) else None

    def _verdict_in(self, held: bytes) -> Verdict | None:
        found = self._read("verdict", held, 2)
        return Verdict(*found) if found else None

    def _read_peers(self) -> dict[int, Beat]:
        keys = {rank: f"beat{rank}" for rank in self._peers}
        there = list(keys) if len(self._last) == len(keys) else [r for r in keys if self._store.check([keys[r]])]
        for rank, held in zip(there, self._store.multi_get([keys[r] for r in there]) if there else [], strict=True):
            found = self._read(keys[rank], held, len(Beat._fields))
            if found is None:
                continue
            beat = Beat(*found)
            beat = beat._replace(failed=Point(*beat.failed) if beat.failed else None)
            if rank not in self._last or beat.number > self._last[rank].number:  # not an old one, shown again
                if rank not in self._last or beat[1:] != self._last[rank][1:]:
                    self._moved[rank] = time.monotonic()
                self._last[rank], self._heard[rank] = beat, time.monotonic()
        return dict(self._last)

    def _read(self, key: str, held: bytes, entries: int) -> list[Any] | None:
        """What was written under a key of the store by a rank. Anything else is not heeded, and is said once."""
        text = verified(self._key, self._in_store(key), held)
        try:
            found = None if text is None else json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list) and len(found) == entries:
            return found
        if key not in self._refused:
            self._refused.add(key)
            warnings.warn(f"{self.foreign(key)}; it is not heeded", RuntimeWarning, stacklevel=2)
        return None

    @property
    def refused(self) -> list[str]:
        """The keys of the store under which something is written that no rank with this secret wrote."""
        return sorted(self._refused)

    def foreign(self, key: str) -> str:
        """What is wrong with what is written under ``key``."""
        how = f"is not signed with this rank's {VARIABLE}: it differs or is missing there, or" if self._key else (
            "is none of this package's messages: a rank has another version of it, or")
        return f"what the store holds as {self._in_store(key)} {how} somebody else writes to the store"

    def _try(self, action: Callable[[], T]) -> T | None:
        if self.store_lost:
            return None
        try:
            return action()
        except RuntimeError:  # every error of torch's stores: the host of the store is gone or hangs
            self.store_lost = True
            return None


def silent(label: str, seconds: float) -> str:
    """The reason given for a rank that no longer answers."""
    return f"stopped responding (process gone?) during {label}; no answer for {seconds:.1f} s"
