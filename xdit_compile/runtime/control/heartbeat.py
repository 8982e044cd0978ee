"""Telling the peers of a group that this rank lives, and learning from the store what became of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch.distributed import Store

from xdit_compile.runtime.control.abort import Connections, abort

# Seconds between two beats; a verdict is noticed within this time even when no connection breaks.
BEAT = 0.5
# Seconds without a beat after which, once something has already failed, a rank counts as gone.
SILENCE = 4 * BEAT

T = TypeVar("T")


class Verdict(NamedTuple):
    """The one cause that all ranks of a group report for its failure."""

    rank: int
    reason: str


class Beat(NamedTuple):
    """What a rank last said of itself."""

    number: int  # grows with every beat
    call: int  # how many parallel calls it has begun
    label: str  # the last of them
    left: bool  # it said good-bye


class Heartbeat:
    """A thread that beats for this rank and wakes it when its group has failed.

    It touches neither the data groups nor the control group in normal operation, only its own connection to
    the store. When the store is lost (`store_lost`) it ends quietly: a job may end in any order.
    """

    def __init__(
        self, store: Store, rank: int, peers: Sequence[int], timeout: float, host: int | None
    ) -> None:
        """Beat on `store`, which no one else uses; a peer silent for `timeout` s in `waiting` is given up.

        `host` is the rank whose process hosts the store, None when no rank does.
        """
        self.host = host
        self.store_lost = False
        self.call, self.label = 0, "start"
        self.waiting = False  # this rank is inside a parallel call
        self.connections: list[Connections] = []  # what a failure has to end
        self.known: Verdict | None = None  # the verdict, once this rank has met it
        self._store, self._rank, self._peers, self._timeout = store, rank, tuple(peers), timeout
        self._number = 0
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="xdit-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say good-bye and end the thread; peers that wait for this rank then know at once."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._try(self._beat)
        # The store ends with its host. The peers first get the time to see it leave: torch's store client
        # writes a warning with a stack trace for every request that finds no server.
        deadline = time.monotonic() + 2 * BEAT
        while self.host == self._rank and time.monotonic() < deadline:
            if all(beat.left for beat in self.peers().values()):
                break
            time.sleep(BEAT / 10)

    def verdict(self) -> Verdict | None:
        """Why the group failed, if that is known; None also when the store is lost."""
        if self.known is None:
            self.known = self._try(self._read_verdict)
        return self.known

    def convict(self, rank: int, reason: str) -> Verdict:
        """Make this the verdict unless there is one; what the group's verdict is now."""
        mine = json.dumps([rank, reason])
        told = self._try(lambda: self._store.compare_set("verdict", "", mine))
        self.known = Verdict(*json.loads(told or mine))
        return self.known

    def absent(self) -> list[int]:
        """The peers that never said anything."""
        return self._try(lambda: [r for r in self._peers if not self._store.check([f"beat{r}"])]) or []

    def peers(self) -> dict[int, Beat]:
        """The last beat of every peer; empty when the store is lost."""
        return self._try(self._read_peers) or {}

    def _run(self) -> None:
        while not self.store_lost and not self._stop.wait(BEAT):
            self._try(self._beat)
            if self.host in self._peers and (beats := self.peers()) and beats[self.host].left:
                self.store_lost = True
            if self.verdict() or (self.waiting and self._release()):
                abort(self.connections)
                return

    def _release(self) -> bool:
        """Whether a peer has been silent for so long that waiting for it has no point."""
        now = time.monotonic()
        for rank, beat in self.peers().items():
            known, since = self._heard.get(rank, (None, now))
            self._heard[rank] = (beat, since if beat == known else now)
            if beat == known and now - since >= self._timeout:
                self.convict(rank, silent(self.label, now - since))
                return True
        return False

    def _beat(self) -> None:
        self._number += 1
        beat = Beat(self._number, self.call, self.label, self._stop.is_set())
        self._store.set(f"beat{self._rank}", json.dumps(beat))

    def _read_verdict(self) -> Verdict | None:
        if not self._store.check(["verdict"]):
            return None
        return Verdict(*json.loads(self._store.get("verdict")))

    def _read_peers(self) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat{rank}" for rank in self._peers])
        return {rank: Beat(*json.loads(text)) for rank, text in zip(self._peers, texts, strict=True)}

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
