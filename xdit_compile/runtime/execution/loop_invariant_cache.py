"""What is kept from step to step: values that depend only on arguments which are still the same tensors.

A tensor is the same if it is the same object, in the same memory, and was not written into: PyTorch counts writes (but
those through ``.data``, and of tensors made in inference mode). Of what lies on the CPU some of the numbers are
compared as well; and nothing outlives a denoising loop. Nothing is held on to: with a tensor goes what was computed
from it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xdit_compile.errors import XditError
from xdit_compile.ir import host_values

ENTRIES = 4
"""So many prompts, at most, that one model is called with by turns."""

PROBE = 64
"""So many numbers of a tensor are compared, spread over all of it; of one that is not larger than that times itself,
all."""

LATE = ("depends on values that were written through .data, which PyTorch does not count, before the call that began "
        "this loop. That call has used values of before: its times lie on a device and became known only now. Call it "
        "again, or give it times on the CPU")

Values = tuple[torch.Tensor, ...]
Key = tuple[tuple[int, int, int], ...]
Seen = tuple[tuple[weakref.ref[torch.Tensor], int | None], ...]


@dataclass
class CachedValues:
    """The values for one set of arguments, which are ``watched``; ``storages``: where the values lie; ``seen``: all
    arguments of the last call that used it; ``probes``: some numbers of what was used."""

    values: Values
    storages: frozenset[int]
    watched: list[weakref.ref[torch.Tensor]]
    seen: Seen
    probes: list[bytes | None]

    def apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or a copy if it is one of the values."""
        return tensor.clone() if tensor.untyped_storage().data_ptr() in self.storages else tensor


class LoopInvariantCache:
    """The values of one program for the last few sets of its arguments.

    Args:
        places: which arguments of a call the program takes.
        counts: counts in ``kept`` the calls that used values of an earlier one.
    """

    def __init__(self, places: Sequence[int], counts: Counter[str]) -> None:
        self._places, self._counts = tuple(places), counts
        self._sets: dict[Key, CachedValues] = {}
        self._suspects: dict[Key, CachedValues] = {}

    def __len__(self) -> int:
        return len(self._sets)

    def forget(self, suspect: bool = False) -> None:
        """A new loop begins, or something else than the arguments has changed; ``suspect``: the call before has begun
        it, so that what was kept must come out the same."""
        self._suspects = dict(self._sets) if suspect else {}
        self._sets.clear()

    def __call__(self, arguments: Sequence[torch.Tensor], state: Sequence[torch.Tensor],
                 compute: Callable[[], Values]) -> CachedValues:
        """The values for a call with these arguments and parameters."""
        used = [*(arguments[i] for i in self._places), *state]
        seen = tuple((weakref.ref(t), version(t)) for t in arguments)
        key = _key(used)
        found = None if key is None else self._sets.pop(key, None)
        probes = [] if key is None else [*map(_probe, used)]
        # Whoever repeats a call exactly has probably changed what nobody counts: weights through ``.data``.
        if found is None or _same(found.seen, seen) or found.probes != probes:
            values = compute()
            self._check_suspect(key, values)
            found = CachedValues(values, frozenset(v.untyped_storage().data_ptr() for v in values), [], seen, probes)
            if key is not None:
                found.watched = [weakref.ref(t, _forget(weakref.ref(self), key)) for t in used]
        else:
            self._counts["kept"] += 1
        found.seen = seen
        if key is not None:
            self._sets[key] = found
        while len(self._sets) > ENTRIES:
            del self._sets[next(iter(self._sets))]
        return found


    def _check_suspect(self, key: Key | None, values: Values) -> None:
        if key is None or (suspect := self._suspects.pop(key, None)) is None:
            return
        if not all(map(torch.equal, suspect.values, values)):
            raise XditError(f"what was kept from step to step {LATE}")


def _forget(owner: weakref.ref[LoopInvariantCache], key: Key) -> Callable[[object], None]:
    def gone(_: object) -> None:
        if kept := owner():
            kept._sets.pop(key, None)

    return gone


def _key(tensors: Sequence[torch.Tensor]) -> Key | None:
    """What tells these tensors, as they are now, from others that live; None if nothing can."""
    made = []
    for t in tensors:
        writes = version(t)
        if writes is None:
            return None
        made.append((id(t), t.data_ptr(), writes))
    return tuple(made)


def version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written into, if that is counted."""
    return None if tensor.is_inference() else tensor._version


def _probe(tensor: torch.Tensor) -> bytes | None:
    if not host_values.on_host(tensor) or tensor.layout is not torch.strided:
        return None
    tensor, count = tensor.detach(), tensor.numel()
    if count <= PROBE * PROBE:
        flat = tensor.contiguous().view(-1)
    elif tensor.is_contiguous():
        flat = tensor.view(-1)[:: count // PROBE].contiguous()
    else:
        flat = tensor[torch.unravel_index(torch.arange(0, count, count // PROBE), tensor.shape)]
    return flat.view(torch.uint8).numpy().tobytes()


def _same(before: Seen, now: Seen) -> bool:
    return len(before) == len(now) and all(
        a() is b() and v == w is not None for (a, v), (b, w) in zip(before, now, strict=True))
