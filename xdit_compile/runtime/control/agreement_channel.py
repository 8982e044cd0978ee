"""Comparing what ranks hold while they go on: a thread and a gloo group of their own.

Each comparison is one exchange of digests, in the order in which they were asked for, which is the same on all ranks.
Whoever needs to know before it goes on waits for the answer; others look at it later. What is found unequal when a rank
has gone on is final: that rank has computed with it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from xdit_compile.errors import RankMismatch, XditError
from xdit_compile.runtime.control.secret import VARIABLE

DIGEST = 16
# The key of what went wrong: what else the ranks hold means nothing then.
_ERROR = "error"

Gather = Callable[[str], list[str]]
"""The texts of all ranks, in their order."""
Facts = Callable[[], Mapping[str, str]]
Resolve = Callable[[RankMismatch, Gather], None]


def final(error: RankMismatch, gather: Gather) -> None:
    """What is unequal stays so."""
    raise error


@dataclass
class Comparison:
    """One comparison, and what came of it.

    Attributes:
        facts: texts by key; asked for in the channel's thread, where it may wait for a device.
        waits: whether this rank goes on only when all are known to be equal.
        resolve: told of a difference, with what gathers texts; raises it, or knows better. The same on all ranks.
        recoverable: of a difference, whether all ranks have waited for it.
    """

    what: str
    facts: Facts
    waits: bool
    resolve: Resolve = final
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    recoverable: bool = False


class AgreementChannel:
    """The thread of one group of ranks.

    Args:
        group: a bare ProcessGroupGloo that nobody else uses.
        digest: of a text, in ``DIGEST`` bytes.
        found: told of an unequal comparison that some rank has not waited for, in the channel's thread.

    Attributes:
        last: the comparison that was asked for last.
    """

    def __init__(self, group: Any, ranks: Sequence[int], digest: Callable[[bytes], bytes],
                 found: Callable[[RankMismatch], None]) -> None:
        self._group, self._ranks, self._digest, self._found = group, tuple(ranks), digest, found
        self._sent = torch.empty(len(ranks), DIGEST + 1, dtype=torch.uint8)
        self._got = torch.empty_like(self._sent)
        self._queue: SimpleQueue[Comparison | None] = SimpleQueue()
        self.last: Comparison | None = None
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="xdit-agreement", daemon=True)
        self._thread.start()

    def submit(self, comparison: Comparison) -> None:
        """Ask for a comparison. Returns at once."""
        self.last = comparison
        self._queue.put(comparison)

    def settle(self, timeout: float) -> None:
        """Give what is under way this many seconds to become known."""
        if self.last is not None:
            self.last.done.wait(timeout)

    def stop(self, end: Callable[[], None], seconds: float) -> None:
        """End the thread: when it has nothing more to do, or after so many ``seconds`` by ``end``, which ends what the
        group does. A thread that were in there at the end of the process would take this down with it."""
        self._queue.put(None)
        if self._thread is threading.current_thread():  # which has dropped the last reference
            return
        self._thread.join(seconds)
        end()
        self._thread.join(seconds)

    def _run(self) -> None:
        while self._next():
            pass

    def _next(self) -> bool:
        """Do what is asked for next. Nothing of it is held on to while the thread waits for more."""
        if (comparison := self._queue.get()) is None:
            return False
        try:
            if self._broken is not None:
                raise self._broken
            self._compare(comparison)
        except RankMismatch as error:
            comparison.error = error
        except BaseException as error:
            # A peer is gone, or the device failed: the order of exchanges is lost.
            comparison.error = self._broken = error
        comparison.facts, comparison.resolve = dict, final
        comparison.done.set()
        return True

    def _compare(self, comparison: Comparison) -> None:
        text = json.dumps(dict(comparison.facts()), sort_keys=True).encode()
        mine = self._digest(text)
        self._sent.numpy()[:] = memoryview(mine + bytes([comparison.waits]))
        # An all-to-all of copies, because gloo's all-gather is a ring: as many steps as there are peers.
        self._group.alltoall_base(self._got, self._sent, [], []).wait()
        rows = [row.tobytes() for row in self._got.numpy()]
        if all(row[:DIGEST] == mine for row in rows):
            return
        comparison.recoverable = all(row[DIGEST] for row in rows)
        try:
            error = mismatch(comparison.what, exchanged(self._group, self._ranks, text), self._ranks)
            comparison.resolve(error, lambda text: [
                one.decode() for one in exchanged(self._group, self._ranks, text.encode())])
        except RankMismatch as error:
            if not comparison.recoverable:
                self._found(error)
            raise


def exchanged(group: Any, ranks: Sequence[int], text: bytes) -> list[bytes]:
    """``text`` of every rank, over a bare ProcessGroupGloo."""
    sizes = [torch.empty(1, dtype=torch.int64) for _ in ranks]
    group.allgather([sizes], [torch.tensor([len(text)])]).wait()
    longest = max(int(size) for size in sizes)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in ranks]
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    group.allgather([texts], [padded]).wait()
    return [one.numpy().tobytes() for one in texts]


def mismatch(what: str, texts: Sequence[bytes], ranks: Sequence[int]) -> RankMismatch:
    """What to raise of texts, JSON mappings, whose digests are not equal.

    Raises:
        XditError: the texts are equal, so that it is the key of the digests that differs.
    """
    if len({one.rstrip() for one in texts}) == 1:
        raise XditError(f"the ranks {tuple(ranks)} sign their messages with different secrets: {VARIABLE} must be the "
                        "same for all of them")
    held = [json.loads(one) for one in texts]
    keys = {key for mapping in held for key in mapping}
    unequal = frozenset(key for key in keys if len({mapping.get(key) for mapping in held}) > 1)
    return RankMismatch(_differences(what, held, ranks), unequal)


def _differences(what: str, held: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> str:
    """One line per key whose text is not the same on all ranks."""
    lines = [f"ranks do not agree on {what}:"]
    keys = dict.fromkeys(key for mapping in held for key in mapping)
    for key in [_ERROR] if _ERROR in keys else keys:
        holders: dict[str, list[int]] = {}
        for rank, mapping in zip(ranks, held, strict=True):
            text = f"have {mapping[key]}" if key in mapping else "do not have it"
            holders.setdefault(text, []).append(rank)
        if len(holders) > 1:
            parts = [f"ranks {','.join(map(str, them))} {text}" for text, them in holders.items()]
            lines.append(f"  {key}: {'; '.join(parts)}")
    return "\n".join(lines)
