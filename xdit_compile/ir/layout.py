"""How a global tensor is spread over ranks: segments make dimensions, dimensions make layouts.

A dimension is a list of **segments** in order. A segment is *replicated* (every rank holds all of it) or
*sharded* over one mesh axis (rank ``i`` of the axis holds ``offsets[i] .. offsets[i+1]``, uneven allowed).
Joint attention over text and image, each split, is a dimension of two sharded segments::

    [text 512 | image 4096] on 4 ranks  ->  512/4 + 4096/4

A rank's local tensor is its pieces of all segments, in order. Everything here is pure arithmetic on those
lists: no tensors, no devices, no processes. The notation is printed by ``str``: ``7`` replicated, ``8/2``
sharded evenly over two ranks, ``7/(4,3)`` unevenly.

A segment may also belong to a **patch**: PipeFusion (arXiv 2405.14430) cuts the tokens in time as well, and what is
computed at one time holds the segments of one patch only. ``8@1`` is such a segment of patch 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

Position = Mapping[str, int]
"""Where a rank stands: its index along each mesh axis."""

SEQUENCE = "sequence"
"""The mesh axis of sequence parallelism (ring x Ulysses, Ulysses innermost)."""

TENSOR = "tensor"
"""The mesh axis of tensor parallelism: features, and the weights that make them, are shared out along it."""

BATCH = "batch"
"""The mesh axis along which batches are shared out (data x cfg)."""

PATCH = "patch"
"""Where a program stands in time: its patch, or EVERY."""

LATE = "late"
"""Whether a program is that of a step in which ranks have of others what these had a step before."""

EVERY = -1
"""All patches at once."""

Spans = list[tuple[int, int]]
"""Index ranges, one after the other."""

MAX_SEGMENTS = 4096
"""Beyond this a merged dimension is gathered instead: the bookkeeping would cost more than the data."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of indices: replicated (``axis`` is None, ``offsets`` = (0, length)) or one slice per rank of ``axis``;
    there at all times, or with one ``patch`` only."""

    offsets: tuple[int, ...]
    axis: str | None = None
    patch: int | None = None

    @property
    def length(self) -> int:
        return self.offsets[-1]

    def bounds(self, position: Position) -> tuple[int, int]:
        """The part of this segment that the rank at ``position`` holds."""
        if self.patch is not None and position[PATCH] not in (self.patch, EVERY):
            return 0, 0
        if self.axis is None:
            return 0, self.length
        index = position[self.axis]
        return self.offsets[index], self.offsets[index + 1]

    def map(self, transform) -> Segment:
        return Segment(tuple(transform(o) for o in self.offsets), self.axis, self.patch)

    @property
    def cut(self) -> bool:
        """Whether some rank, or some time, lacks it."""
        return self.axis is not None or self.patch is not None

    def __str__(self) -> str:
        when = "" if self.patch is None else f"@{self.patch}"
        if self.axis is None:
            return f"{self.length}{when}"
        sizes = [b - a for a, b in pairwise(self.offsets)]
        shares = f"{len(sizes)}" if len(set(sizes)) == 1 else f"({','.join(map(str, sizes))})"
        return f"{self.length}/{shares}{when}"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank holds of one segment: global indices ``start..stop``, at ``at`` in its local tensor."""

    sharded: bool
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: its segments, in order, with neighbouring replicated ones joined. What is asked for
    all the time is reckoned once: planning is little else."""

    segments: tuple[Segment, ...]

    @staticmethod
    def of(segments: Iterable[Segment]) -> Dim:
        joined: list[Segment] = []
        for segment in segments:
            if segment.length == 0:
                continue
            if not segment.cut and joined and not joined[-1].cut:
                joined[-1] = Segment((0, joined[-1].length + segment.length))
            else:
                joined.append(segment)
        return Dim(tuple(joined))

    @staticmethod
    def replicated(length: int) -> Dim:
        return Dim.of([Segment((0, length))])

    @staticmethod
    def even(length: int, parts: int, axis: str = SEQUENCE) -> Dim:
        """Split over ``parts`` ranks as evenly as whole numbers allow, larger shares first."""
        return Dim.of([Segment(even_offsets(length, parts), axis)])

    @staticmethod
    def patched(offsets: Sequence[int], parts: int, unit: int = 1) -> Dim:
        """A segment for each patch, of borders ``offsets``, shared out to ``parts`` ranks in multiples of ``unit``."""
        axis = SEQUENCE if parts > 1 else None
        return Dim.of(Segment(tuple(o * unit for o in even_offsets((b - a) // unit, parts)), axis, i)
                      for i, (a, b) in enumerate(pairwise(offsets)))

    def gathered(self, axis: str) -> Dim:
        """The same with every rank of ``axis`` holding what they share."""
        return Dim.of(Segment((0, s.length), None, s.patch) if s.axis == axis else s for s in self.segments)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.segments)

    def __getstate__(self) -> dict[str, object]:
        return {"segments": self.segments}  # hashes of texts differ from process to process

    @cached_property
    def size(self) -> int:
        return sum(s.length for s in self.segments)

    @cached_property
    def axes(self) -> frozenset[str]:
        """What cuts it: mesh axes, and PATCH."""
        ranks = frozenset(s.axis for s in self.segments if s.axis is not None)
        return ranks | {PATCH} if any(s.patch is not None for s in self.segments) else ranks

    @cached_property
    def sharded(self) -> bool:
        return any(s.cut for s in self.segments)

    def local_size(self, position: Position) -> int:
        return sum(stop - start for start, stop in (s.bounds(position) for s in self.segments))

    def pieces(self, position: Position) -> list[Piece]:
        """What the rank at ``position`` holds of each segment, in the order of its local tensor."""
        pieces, base, at = [], 0, 0
        for segment in self.segments:
            start, stop = segment.bounds(position)
            pieces.append(Piece(segment.axis is not None, base + start, base + stop, at))
            base, at = base + segment.length, at + stop - start
        return pieces

    def spans(self, position: Position, sharded: bool | None = None) -> Spans:
        """The global index ranges the rank at ``position`` holds, in the order of its local tensor: of all segments,
        or of the sharded or the replicated ones only."""
        return joined((p.start, p.stop) for p in self.pieces(position) if sharded in (None, p.sharded))

    def local_spans(self, position: Position, sharded: bool) -> Spans:
        """Where the sharded, or the replicated, segments lie in the local tensor."""
        return joined((p.at, p.at + p.stop - p.start) for p in self.pieces(position) if p.sharded is sharded)

    def borders(self, patches: int) -> tuple[int, ...] | None:
        """Where so many patches begin and end, if they follow each other and ranks hold all of them; else None."""
        if not self.segments or any(s.patch is None or s.axis for s in self.segments):
            return None
        order = [s.patch or 0 for s in self.segments]
        ends = dict(zip(order, accumulate(s.length for s in self.segments), strict=True))
        return (0, *ends.values()) if order == sorted(order) and list(ends) == list(range(patches)) else None

    def places(self, spans: Iterable[tuple[int, int]], position: Position) -> Spans:
        """Where these global index ranges lie in the local tensor; what is not there is left out."""
        found = (((max(start, p.start), min(stop, p.stop)), p) for start, stop in spans for p in self.pieces(position))
        return joined((p.at + a - p.start, p.at + b - p.start) for (a, b), p in found if a < b)

    def slice(self, start: int, stop: int, step: int = 1) -> Dim:
        """The indices ``start:stop:step``; a segment keeps its owner, so shares may become uneven or empty."""
        parts, base = [], 0
        for segment in self.segments:
            # The number of selected indices below a border: where that border lies in the slice.
            lo, hi = max(start, base), min(stop, base + segment.length)
            first = -(-(lo - start) // step)

            def below(offset: int, base: int = base, first: int = first) -> int:
                clipped = min(max(base + offset, start), stop)
                return max(-(-(clipped - start) // step) - first, 0)

            if hi > lo:
                parts.append(segment.map(below))
            base += segment.length
        return Dim.of(parts)

    def repeat(self, times: int) -> Dim:
        """The whole dimension ``times`` times over, as when a replicated outer dimension is merged with it."""
        return Dim.of(self.segments * times) if self.sharded else Dim.replicated(self.size * times)

    def scale(self, factor: int) -> Dim:
        """Each index becomes ``factor`` consecutive ones, as when a replicated inner dimension is merged with it."""
        return Dim.of(s.map(lambda o: o * factor) for s in self.segments)

    def split(self, outer: int, inner: int) -> tuple[Dim, Dim] | None:
        """View as (outer, inner): None when a shard border would cut through both."""
        if not self.sharded:
            return Dim.replicated(outer), Dim.replicated(inner)
        borders = accumulate((s.length for s in self.segments), initial=0)
        cuts = {base + o for base, s in zip(borders, self.segments, strict=False) for o in s.offsets}
        if all(cut % inner == 0 for cut in cuts):
            return Dim.of(s.map(lambda o: o // inner) for s in self.segments), Dim.replicated(inner)
        rows = {self.slice(i * inner, (i + 1) * inner) for i in range(outer)}
        return (Dim.replicated(outer), rows.pop()) if len(rows) == 1 else None

    def __str__(self) -> str:
        shown = self.segments if len(self.segments) <= 8 else self.segments[:3]
        rest = [f"... ({len(self.segments)} segments)"] if len(shown) < len(self.segments) else []
        return " + ".join([*map(str, shown), *rest]) or "0"


def even_offsets(length: int, parts: int) -> tuple[int, ...]:
    """Borders of ``parts`` shares as even as whole numbers allow, larger ones first."""
    share, extra = divmod(length, parts)
    return tuple(accumulate((share + (i < extra) for i in range(parts)), initial=0))


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """Without empty spans, neighbours made one."""
    out: Spans = []
    for start, stop in spans:
        if start < stop and out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        elif start < stop:
            out.append((start, stop))
    return out


def length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def concatenate(dims: Iterable[Dim]) -> Dim:
    return Dim.of(s for d in dims for s in d.segments)


def merge(dims: Sequence[Dim]) -> Dim | None:
    """Flatten neighbouring dimensions into one: None when two of them are sharded or the list would explode."""
    sharded = [i for i, d in enumerate(dims) if d.sharded]
    if not sharded:
        return Dim.replicated(math.prod(d.size for d in dims))
    at = sharded[0]
    outer = math.prod(d.size for d in dims[:at])
    if len(sharded) > 1 or outer * len(dims[at].segments) > MAX_SEGMENTS:
        return None
    return dims[at].scale(math.prod(d.size for d in dims[at + 1 :])).repeat(outer)


def reshape(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """The dimensions after a view to ``shape``, or None when a sharded dimension cannot be followed through it.

    Both shapes fall into the smallest groups of equal product; within a group the dimensions are merged, then
    split. Dimensions of size one carry nothing and are put back at the end.
    """
    if 0 in shape:
        return None if any(d.sharded for d in dims) else tuple(Dim.replicated(n) for n in shape)
    inputs, sizes = [d for d in dims if d.size != 1], [n for n in shape if n != 1]
    result: list[Dim] = []
    while inputs or sizes:
        group, targets = [inputs.pop(0)], [sizes.pop(0)]
        while (have := math.prod(d.size for d in group)) != (want := math.prod(targets)):
            if have < want:
                group.append(inputs.pop(0))
            else:
                targets.append(sizes.pop(0))
        rest = merge(group)
        for i, size in enumerate(targets):
            parts = rest.split(size, math.prod(targets[i + 1 :])) if rest else None
            if parts is None:
                return None
            result.append(parts[0])
            rest = parts[1]
    queue = iter(result)
    return tuple(Dim.replicated(1) if n == 1 else next(queue) for n in shape)


@dataclass(frozen=True)
class Layout:
    """A tensor's dimensions. ``partial`` names a mesh axis whose ranks hold summands of the true value."""

    dims: tuple[Dim, ...]
    partial: str | None = None

    @staticmethod
    def replicated(shape: Sequence[int]) -> Layout:
        return _replicated(tuple(shape))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial))

    def __getstate__(self) -> dict[str, object]:
        return {"dims": self.dims, "partial": self.partial}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)

    @cached_property
    def sharded(self) -> bool:
        return self.partial is not None or any(d.sharded for d in self.dims)

    def local_shape(self, position: Position) -> tuple[int, ...]:
        return tuple(d.local_size(position) for d in self.dims)

    def replace(self, dim: int, new: Dim) -> Layout:
        dims = list(self.dims)
        dims[dim] = new
        return Layout(tuple(dims), self.partial)

    def __str__(self) -> str:
        body = ", ".join(map(str, self.dims))
        return f"[{body}]" + (f" partial({self.partial})" if self.partial else "")


@lru_cache(maxsize=4096)
def _replicated(shape: tuple[int, ...]) -> Layout:
    """Kept, because a search lays out every parameter for every choice it tries."""
    return Layout(tuple(Dim.replicated(n) for n in shape))
