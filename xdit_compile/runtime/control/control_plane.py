"""The control plane of a parallel group: agreeing before a call, and failing together."""

from __future__ import annotations

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup

from xdit_compile.errors import RankFailure, RankMismatch, XditError
from xdit_compile.runtime.control.abort import Connections, abort, is_peer_loss
from xdit_compile.runtime.control.heartbeat import SILENCE, Heartbeat, Verdict, silent

_DIGEST = 16
# Seconds after which a store that does not answer counts as lost.
_STORE_TIMEOUT = timedelta(seconds=5)


class ControlPlane:
    """How the ranks of one parallel group agree and fail, independent of the groups that move their data.

    Constructed by all ranks of the group and by no others, in the same order as their other Controls; one
    process may have several. A failure is final: every later `agree` or `guard` raises it again at once, for
    the data groups are broken with it. `close` ends a Control; so does the end of the process.
    """

    def __init__(self, ranks: Sequence[int], timeout: float = 60.0) -> None:
        """Connect to all `ranks` (global ranks); `timeout` in seconds limits every wait for a peer.

        Raises `RankFailure` naming a rank that does not construct its Control within the timeout. A group of
        one rank needs no initialised process group.
        """
        self.ranks = tuple(sorted(ranks))
        self.timeout = timeout
        self._heart: Heartbeat | None = None
        self._watched: dict[ProcessGroup, Connections] = {}
        if len(self.ranks) == 1:
            return
        self.rank = dist.get_rank()
        if self.rank not in self.ranks:
            raise XditError(f"rank {self.rank} is not one of the ranks {self.ranks} of this Control")
        # Its own connection: someone else's long wait on the default store must not hold up the heartbeat.
        default: Any = dist.distributed_c10d._get_default_store()
        store = default.clone()
        host = None if _launcher_hosts_store() else 0
        store.set_timeout(_STORE_TIMEOUT)
        name = f"xdit/{'-'.join(map(str, self.ranks))}"
        # Counted in the store, not in this process, so that the count starts anew with a new default group.
        store = PrefixStore(f"{name}/{store.add(f'{name}/made{self.rank}', 1)}", store)
        peers = [rank for rank in self.ranks if rank != self.rank]
        heart = Heartbeat(PrefixStore("heart", store), self.rank, peers, timeout, host)
        # Also runs at the end of the process, while torch still works.
        self._close = weakref.finalize(self, _leave, heart, default)
        self._heart = heart
        self._connect(PrefixStore("gloo", store))

    def agree(self, what: str, mine: Mapping[str, str]) -> None:
        """Make sure that all ranks hold equal texts under equal keys; `what` is the call this is about.

        One small exchange while all is equal. Raises `RankMismatch` on every rank, naming the keys and who
        holds what, if anything differs, and `RankFailure` naming the rank that is gone or does not come
        within the timeout.
        """
        text = json.dumps(dict(mine), sort_keys=True).encode()
        self._exchanged(what, text, lambda rows, digest: all(row == digest for row in rows))

    def anyone(self, what: str, mine: bool) -> bool:
        """Whether `mine` is true on any rank; all ranks come here together, and raise as in `agree`."""
        if self._heart is None:
            return mine
        texts = [json.dumps({what: answer}).encode() for answer in ("no", "yes")]
        no, yes = map(_digest, texts)
        rows = self._exchanged(what, texts[mine], lambda rows, _: set(rows) <= {no, yes})
        return yes in rows

    def _exchanged(self, what: str, text: bytes, fine: Callable[[Sequence[bytes], bytes], bool]) -> Sequence[bytes]:
        """The digests of every rank's text. Raises `RankMismatch` unless they are `fine`, given them and the own."""
        if self._heart is None:
            return [_digest(text)]
        self._check()
        self._heart.call, self._heart.label = self._heart.call + 1, what
        start = time.monotonic()
        try:
            return self._compare(what, text, fine)
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
            yield
        except (RankFailure, RankMismatch):
            raise
        except BaseException as error:
            if is_peer_loss(error):
                raise RankFailure(*self._find(error, label, start)) from error
            heart.convict(self.rank, f"failed: {type(error).__name__}: {error}")
            abort(heart.connections)
            raise
        finally:
            heart.waiting = outer
        self._check()

    def check(self) -> None:
        """Raise `RankFailure` if the group is known to have failed; costs nothing."""
        if self._heart is not None:
            self._check()

    def close(self) -> None:
        """Leave the group; peers that still call fail, naming this rank. Closing twice does nothing."""
        if self._heart is not None:
            self._close()
            self._watched.clear()

    def _connect(self, store: PrefixStore) -> None:
        # Not dist.new_group: unless all ranks of the job take part, it derives the group's name from how many
        # groups each process has, and ranks that differ in this wait for each other in vain.
        assert self._heart is not None
        start = time.monotonic()
        index, limit = self.ranks.index(self.rank), timedelta(seconds=self.timeout)
        try:
            self._gloo: Any = dist.ProcessGroupGloo(store, index, len(self.ranks), limit)
        except RuntimeError as error:
            waited = time.monotonic() - start
            absent = self._heart.absent()
            reason = f"did not construct its Control; no answer for {waited:.1f} s"
            verdict = self._heart.convict(absent[0] if absent else -1, reason)
            self._close()
            raise RankFailure(*verdict) from error
        self._heart.connections.append(Connections.of_gloo(store, len(self.ranks)))
        self._sent = torch.empty(len(self.ranks), _DIGEST, dtype=torch.uint8)
        self._got = torch.empty_like(self._sent)

    def _check(self) -> None:
        assert self._heart is not None
        if not self._close.alive:
            raise XditError("this Control is closed")
        if self._heart.known is not None:
            raise RankFailure(*self._heart.known)

    def _compare(self, what: str, text: bytes, fine: Callable[[Sequence[bytes], bytes], bool]) -> Sequence[bytes]:
        digest = _digest(text)
        self._sent.numpy()[:] = memoryview(digest)
        # An all-to-all of copies, because gloo's all-gather is a ring: as many steps as there are peers.
        self._gloo.alltoall_base(self._got, self._sent, [], []).wait()
        rows = [row.tobytes() for row in self._got.numpy()]
        if not fine(rows, digest):
            raise RankMismatch(_differences(what, [json.loads(one) for one in self._exchange(text)], self.ranks))
        return rows

    def _exchange(self, text: bytes) -> list[bytes]:
        """`text` of every rank."""
        sizes = [torch.empty(1, dtype=torch.int64) for _ in self.ranks]
        self._gloo.allgather([sizes], [torch.tensor([len(text)])]).wait()
        longest = max(int(size) for size in sizes)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in self.ranks]
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        self._gloo.allgather([texts], [padded]).wait()
        return [one.numpy().tobytes() for one in texts]

    def _find(self, error: BaseException, label: str, start: float) -> Verdict:
        """Who is to blame that a collective of this rank ended with `error`; ends all others on the way."""
        heart = self._heart
        assert heart is not None
        # At once, before searching: some peers may wait for this rank alone.
        abort(heart.connections)
        waited = time.monotonic() - start
        before = heart.peers()
        deadline = time.monotonic() + SILENCE
        while not (verdict := heart.verdict()) and not heart.store_lost:
            now = heart.peers()
            for rank, beat in now.items():
                if beat.left:
                    return heart.convict(rank, f"left (process ended, or Control closed) before {label}")
            quiet = [rank for rank, beat in now.items() if beat.number == before[rank].number]
            if not quiet or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if verdict:
            return verdict
        if heart.store_lost:
            if heart.host is None:
                lost = f"the launcher, which hosts the rendezvous store, is gone during {label}"
                return heart.convict(-1, lost)
            return heart.convict(heart.host, f"{silent(label, waited)}; it hosts the store, which is gone")
        if quiet:
            return heart.convict(quiet[0], silent(label, waited + SILENCE))
        for rank, beat in now.items():
            if beat.call < heart.call:
                late = f"did not come to {label}; no answer for {waited:.1f} s (alive, last in {beat.label})"
                return heart.convict(rank, late)
        return heart.convict(-1, f"{label} failed although every rank answers: {error}")


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST).digest()


def _leave(heart: Heartbeat, store: object) -> None:
    """Say good-bye; holds on to `store` until then, for this process may host its server."""
    heart.stop()
    # The control group's connections are the first; peers that wait on it for this rank wake.
    abort(heart.connections[:1])


def _launcher_hosts_store() -> bool:
    # How torchrun and our launch() tell torch the same; without a launcher rank 0 hosts it.
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _differences(what: str, held: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> str:
    """One line per key whose text is not the same on all ranks."""
    lines = [f"ranks do not agree on {what}:"]
    for key in dict.fromkeys(key for mapping in held for key in mapping):
        holders: dict[str, list[int]] = {}
        for rank, mapping in zip(ranks, held, strict=True):
            text = f"have {mapping[key]}" if key in mapping else "do not have it"
            holders.setdefault(text, []).append(rank)
        if len(holders) > 1:
            parts = [f"ranks {','.join(map(str, them))} {text}" for text, them in holders.items()]
            lines.append(f"  {key}: {'; '.join(parts)}")
    return "\n".join(lines)
