"""The algebra of layouts is that of tensors: transform and take pieces, or take pieces and transform.

The model of a dimension is a list with each index's owner: a rank, or EVERYONE. All claims are checked by
what plain lists and tensors do.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xdit_compile.ir.layout import (
    EVERY,
    MAX_SEGMENTS,
    PATCH,
    SEQUENCE,
    Dim,
    Layout,
    Position,
    Segment,
    concatenate,
    even_offsets,
    length,
    merge,
    reshape,
)

EVERYONE = -1
Owners = list[int]

settings.register_profile("layout", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("layout")


@st.composite
def segments(draw: st.DrawFn, parts: int, unit: int = 1) -> Segment:
    """Replicated or cut at random borders, shares of zero included; all borders are multiples of ``unit``."""
    length = draw(st.integers(0, 8))
    if draw(st.booleans()):
        return Segment((0, unit * length))
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
    return Segment(tuple(unit * c for c in (0, *cuts, length)), SEQUENCE)


@st.composite
def dims(draw: st.DrawFn, parts: int, unit: int = 1, least: int = 0) -> Dim:
    found = Dim.of(draw(st.lists(segments(parts, unit), min_size=1, max_size=4)))
    assume(found.size >= least)
    return found


worlds = st.integers(1, 4)


def positions(parts: int) -> list[dict[str, int]]:
    return [{SEQUENCE: rank} for rank in range(parts)]


def held(dim: Dim, rank: int) -> list[int]:
    """The global indices a rank holds."""
    return [i for a, b in dim.spans({SEQUENCE: rank}) for i in range(a, b)]


def owners(dim: Dim, parts: int) -> Owners:
    """Who holds each index. Fails if nobody does, or some but not all."""
    holders: list[list[int]] = [[] for _ in range(dim.size)]
    for rank in range(parts):
        for index in held(dim, rank):
            holders[index].append(rank)
    for who in holders:
        assert len(who) == 1 or who == list(range(parts)), holders
    # In a world of one, cut and whole are the same.
    return [who[0] if len(who) == 1 and parts > 1 else EVERYONE for who in holders]


def piece(x: torch.Tensor, at: list[Dim] | tuple[Dim, ...], rank: int) -> torch.Tensor:
    """What a rank holds of a tensor."""
    assert tuple(x.shape) == tuple(d.size for d in at)
    for i, dim in enumerate(at):
        x = x.index_select(i, torch.tensor(held(dim, rank), dtype=torch.long))
    return x


@given(st.data(), worlds)
def test_pieces_are_sized_ascending_and_complete(data: st.DataObject, parts: int) -> None:
    drawn = data.draw(st.lists(segments(parts), max_size=4))
    dim = Dim.of(drawn)
    assert dim.size == sum(s.length for s in drawn)
    expected = []
    for s in drawn:
        shares = [b - a for a, b in pairwise(s.offsets)]
        expected += (
            [EVERYONE] * s.length if s.axis is None else [r for r, n in enumerate(shares) for _ in range(n)]
        )
    assert owners(dim, parts) == (expected if parts > 1 else [EVERYONE] * dim.size)
    for rank, position in enumerate(positions(parts)):
        spans = dim.spans(position)
        assert all(a < b for a, b in spans)
        assert all(b < c for (_, b), (c, _) in pairwise(spans)), "neighbouring spans are one"
        assert dim.local_size(position) == len(held(dim, rank))
    assert dim.sharded == any(s.axis and s.length for s in drawn)
    assert dim.axes == ({SEQUENCE} if dim.sharded else set())


@given(st.data(), worlds)
def test_neighbouring_replicated_segments_are_one_and_empty_ones_none(
    data: st.DataObject, parts: int
) -> None:
    dim = data.draw(dims(parts))
    assert all(s.length for s in dim.segments)
    assert not any(a.axis is None and b.axis is None for a, b in pairwise(dim.segments))
    assert Dim.of(dim.segments) == dim


@given(st.data(), worlds)
def test_slice_keeps_the_owner_of_each_index(data: st.DataObject, parts: int) -> None:
    dim = data.draw(dims(parts))
    start = data.draw(st.integers(0, dim.size))
    stop = data.draw(st.integers(start, dim.size))
    step = data.draw(st.integers(1, 5))
    cut = dim.slice(start, stop, step)
    assert owners(cut, parts) == owners(dim, parts)[start:stop:step]


@given(st.data(), worlds)
def test_slices_of_a_slice(data: st.DataObject, parts: int) -> None:
    dim = data.draw(dims(parts, least=1))
    start, step = data.draw(st.integers(0, dim.size - 1)), data.draw(st.integers(1, 3))
    once = dim.slice(start, dim.size, step)
    stride = data.draw(st.integers(1, 3))
    assert owners(once.slice(0, once.size, stride), parts) == owners(dim, parts)[start::step][::stride]


@given(st.data(), worlds)
def test_slice_is_what_a_rank_slices_of_its_piece(data: st.DataObject, parts: int) -> None:
    dim = data.draw(dims(parts, least=1))
    start = data.draw(st.integers(0, dim.size - 1))
    stop = data.draw(st.integers(start + 1, dim.size))
    step = data.draw(st.integers(1, 4))
    cut, kept = dim.slice(start, stop, step), set(range(start, stop, step))
    for rank in range(parts):
        mine = [i for i in held(dim, rank) if i in kept]
        assert [start + step * i for i in held(cut, rank)] == mine


@given(st.data(), worlds, st.integers(1, 4))
def test_repeat(data: st.DataObject, parts: int, times: int) -> None:
    dim = data.draw(dims(parts))
    assert owners(dim.repeat(times), parts) == owners(dim, parts) * times


@given(st.data(), worlds, st.integers(1, 4))
def test_scale(data: st.DataObject, parts: int, factor: int) -> None:
    dim = data.draw(dims(parts))
    assert owners(dim.scale(factor), parts) == [o for o in owners(dim, parts) for _ in range(factor)]


@given(st.data(), worlds)
def test_concatenate(data: st.DataObject, parts: int) -> None:
    joined = data.draw(st.lists(dims(parts), max_size=4))
    assert owners(concatenate(joined), parts) == [o for d in joined for o in owners(d, parts)]
    whole = torch.arange(sum(d.size for d in joined))
    split = whole.split([d.size for d in joined]) if joined else []
    for rank in range(parts):
        local = [piece(x, [d], rank) for x, d in zip(split, joined, strict=True)]
        assert held(concatenate(joined), rank) == (torch.cat(local).tolist() if local else [])


@given(st.data(), worlds)
def test_slices_put_together_are_the_dimension(data: st.DataObject, parts: int) -> None:
    dim = data.draw(dims(parts))
    cuts = sorted({0, dim.size, *data.draw(st.lists(st.integers(0, dim.size), max_size=3))})
    assert owners(concatenate(dim.slice(a, b) for a, b in pairwise(cuts)), parts) == owners(dim, parts)


@given(st.data(), worlds)
def test_split_is_a_view_of_each_piece_or_nothing(data: st.DataObject, parts: int) -> None:
    inner = data.draw(st.integers(1, 4))
    dim = data.draw(st.one_of(dims(parts, inner, least=1), dims(parts, least=1)))
    if data.draw(st.booleans()):
        dim = dim.repeat(data.draw(st.integers(1, 3)))
        inner = data.draw(st.sampled_from([inner, dim.size // 2, dim.size])) or 1
    assume(dim.size % inner == 0)
    outer = dim.size // inner
    cut = dim.split(outer, inner)
    if cut is None:
        return  # what must not be given up is in the test of there and back
    whole = torch.arange(dim.size)
    for rank in range(parts):
        mine = piece(whole.view(outer, inner), cut, rank)
        assert mine.flatten().tolist() == held(dim, rank)


@given(st.data(), worlds)
def test_merge_is_a_view_of_each_piece(data: st.DataObject, parts: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    at = data.draw(st.integers(0, len(sizes) - 1))
    group = [Dim.replicated(n) for n in sizes]
    group[at] = data.draw(dims(parts, least=1))
    merged = merge(group)
    assert merged is not None
    shape = [d.size for d in group]
    assert merged.size == math.prod(shape)
    whole = torch.arange(math.prod(shape)).view(shape)
    for rank in range(parts):
        assert piece(whole, group, rank).flatten().tolist() == held(merged, rank)


def test_merge_of_two_sharded_dimensions_or_of_too_many_segments_is_refused() -> None:
    assert merge([Dim.even(4, 2), Dim.even(4, 2)]) is None
    assert merge([Dim.replicated(MAX_SEGMENTS), Dim.even(4, 2)]) is not None
    assert merge([Dim.replicated(MAX_SEGMENTS + 1), Dim.even(4, 2)]) is None
    assert merge([Dim.even(4, 2), Dim.replicated(MAX_SEGMENTS + 1)]) is not None
    assert merge([Dim.replicated(MAX_SEGMENTS + 1), Dim.replicated(4)]) == Dim.replicated(
        4 * MAX_SEGMENTS + 4
    )


def factorisations(n: int) -> st.SearchStrategy[list[int]]:
    """Shapes of ``n`` elements, with ones in them."""

    @st.composite
    def shape(draw: st.DrawFn) -> list[int]:
        sizes, left = [], n
        while left > 1:
            sizes.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
            left //= sizes[-1]
        return [*sizes, *draw(st.lists(st.just(1), max_size=1))]

    return shape()


@given(st.data(), worlds)
def test_reshape_is_a_reshape_of_each_piece_or_nothing(data: st.DataObject, parts: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    before = [Dim.replicated(n) for n in sizes]
    unit = data.draw(st.integers(1, 3))
    before.insert(data.draw(st.integers(0, len(before))), data.draw(dims(parts, unit, least=1)))
    shape = data.draw(factorisations(math.prod(d.size for d in before)))
    after = reshape(before, shape)
    if after is None:
        return
    assert [d.size for d in after] == shape
    whole = torch.arange(math.prod(shape))
    for rank in range(parts):
        mine = piece(whole.view([d.size for d in before]), before, rank)
        assert torch.equal(mine.reshape([d.local_size({SEQUENCE: rank}) for d in after]),
                           piece(whole.view(shape), after, rank))  # fmt: skip


@given(st.data(), worlds)
def test_reshape_there_and_back(data: st.DataObject, parts: int) -> None:
    """What flattening makes, unflattening takes apart again: tokens to a grid, heads to features."""
    before = [Dim.replicated(data.draw(st.integers(1, 4))) for _ in range(3)]
    before[data.draw(st.integers(0, 2))] = data.draw(dims(parts, least=2))
    sizes = [d.size for d in before]
    flat = reshape(before, [math.prod(sizes)])
    assert flat is not None
    back = reshape(flat, sizes)
    assert back is not None
    for rank in range(parts):
        whole = torch.arange(math.prod(sizes)).view(sizes)
        # Flat, because nothing at all has many shapes.
        assert piece(whole, back, rank).flatten().tolist() == piece(whole, before, rank).flatten().tolist()


def test_reshape_of_what_is_known_to_follow() -> None:
    tokens = Dim.even(12, 3)
    assert reshape([Dim.replicated(2), tokens, Dim.replicated(8)], [2, 12, 4, 2]) == (
        Dim.replicated(2), tokens, Dim.replicated(4), Dim.replicated(2))  # fmt: skip
    assert reshape([tokens, Dim.replicated(4)], [48]) == (Dim.even(48, 3),)
    assert reshape([Dim.even(48, 3)], [12, 4]) == (tokens, Dim.replicated(4))
    assert reshape([Dim.replicated(5), tokens], [60]) == (tokens.repeat(5),)
    assert reshape([tokens.repeat(5)], [5, 12]) == (Dim.replicated(5), tokens)
    assert reshape([tokens], [1, 12, 1]) == (Dim.replicated(1), tokens, Dim.replicated(1))
    assert reshape([Dim.even(9, 2)], [3, 3]) is None, "a border cuts through a row"
    assert reshape([], []) == ()
    assert reshape([Dim.replicated(0), Dim.replicated(3)], [3, 0]) == (Dim.replicated(3), Dim.replicated(0))


@given(st.integers(0, 50), st.integers(1, 8))
def test_even_shares_differ_by_one_at_most_larger_first(length: int, parts: int) -> None:
    shares = [Dim.even(length, parts).local_size(p) for p in positions(parts)]
    assert shares == [len(x) for x in torch.arange(length).tensor_split(parts)]


def test_printing() -> None:
    assert str(Dim.replicated(7)) == "7"
    assert str(Dim.even(8, 2)) == "8/2"
    assert str(Dim.even(7, 2)) == "7/(4,3)"
    assert str(concatenate([Dim.even(512, 4), Dim.even(4096, 4)])) == "512/4 + 4096/4"
    assert str(concatenate([Dim.replicated(3), Dim.even(8, 2)])) == "3 + 8/2"
    assert str(concatenate([Dim.replicated(3), Dim.replicated(4)])) == "7"
    assert str(Dim.replicated(0)) == "0"
    assert str(Dim.even(4, 2).repeat(100)) == "4/2 + 4/2 + 4/2 + ... (100 segments)"
    layout = Layout((Dim.replicated(1), Dim.even(7, 2), Dim.replicated(5)))
    assert str(layout) == "[1, 7/(4,3), 5]"
    assert str(Layout(layout.dims, SEQUENCE)) == "[1, 7/(4,3), 5] partial(sequence)"


@given(st.data(), worlds)
def test_layout_of_a_tensor(data: st.DataObject, parts: int) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    layout = Layout.replicated(shape)
    assert layout.shape == tuple(shape) and not layout.sharded
    at, dim = data.draw(st.integers(0, len(shape) - 1)), data.draw(dims(parts))
    cut = layout.replace(at, dim)
    assert cut.shape == (*shape[:at], dim.size, *shape[at + 1 :])
    assert cut.sharded == dim.sharded
    assert Layout(layout.dims, SEQUENCE).sharded, "a pending sum is no whole value"
    for rank, position in enumerate(positions(parts)):
        assert cut.local_shape(position) == (*shape[:at], len(held(dim, rank)), *shape[at + 1 :])


@given(st.data(), worlds)
def test_dimensions_are_values(data: st.DataObject, parts: int) -> None:
    dim = data.draw(dims(parts))
    same = Dim.of(Segment(s.offsets, s.axis) for s in dim.segments)
    assert dim == same and hash(dim) == hash(same)
    assert Layout((dim,)) == Layout((same,)) and hash(Layout((dim,))) == hash(Layout((same,)))
    assert dim.slice(0, dim.size) == dim.scale(1) == dim.repeat(1) == concatenate([dim]) == dim


# Patches: what is not at hand at some time. The model of an index is (its patch, its rank), None for all of them.


@st.composite
def timely(draw: st.DrawFn, patches: int, parts: int, unit: int = 1) -> Segment:
    """At all times or of one patch, on all ranks or cut."""
    drawn = draw(segments(parts, unit))
    return Segment(drawn.offsets, drawn.axis, draw(st.sampled_from([None, *range(patches)])))


@st.composite
def timely_dims(draw: st.DrawFn, patches: int, parts: int, unit: int = 1, least: int = 0) -> Dim:
    """Anything, or patches one after the other, each shared out, with or without text of the first patch before it."""
    if draw(st.booleans()):
        found = Dim.of(draw(st.lists(timely(patches, parts, unit), min_size=1, max_size=4)))
    else:
        offsets = [unit * o for o in sorted(draw(st.lists(st.integers(0, 9), min_size=patches, max_size=patches)))]
        found = Dim.patched([0, *offsets], parts, unit)
        if draw(st.booleans()):
            text = Segment(tuple(unit * o for o in even_offsets(draw(st.integers(1, 4)), parts)), SEQUENCE, 0)
            found = concatenate([Dim.of([text]), found])
    assume(found.size >= least)
    return found


counts, ranks = st.integers(1, 3), st.integers(1, 3)


def times(patches: int, parts: int) -> list[dict[str, int]]:
    return [{PATCH: patch, SEQUENCE: rank} for patch in (EVERY, *range(patches)) for rank in range(parts)]


def belongs(dim: Dim) -> list[tuple[int | None, int | None]]:
    """The patch and the rank of each index, by the segments alone."""
    found = []
    for s in dim.segments:
        if s.axis is None:
            found += [(s.patch, None)] * s.length
        else:
            found += [(s.patch, rank) for rank, (a, b) in enumerate(pairwise(s.offsets)) for _ in range(a, b)]
    return found


def at_hand(dim: Dim, position: Position) -> list[int]:
    """The global indices at a position, by the model."""
    return [i for i, (patch, rank) in enumerate(belongs(dim))
            if (patch is None or position[PATCH] in (patch, EVERY)) and rank in (None, position[SEQUENCE])]


def listed(spans: list[tuple[int, int]]) -> list[int]:
    return [i for a, b in spans for i in range(a, b)]


def local(x: torch.Tensor, at: list[Dim] | tuple[Dim, ...], position: Position) -> torch.Tensor:
    """What is at a position of a tensor, by the model."""
    assert tuple(x.shape) == tuple(d.size for d in at)
    for i, dim in enumerate(at):
        x = x.index_select(i, torch.tensor(at_hand(dim, position), dtype=torch.long))
    return x


@given(st.data(), counts, ranks)
def test_each_patch_is_at_hand_at_its_time_and_all_at_once(data: st.DataObject, patches: int, parts: int) -> None:
    drawn = data.draw(st.lists(timely(patches, parts), max_size=4))
    dim = Dim.of(drawn)
    assert belongs(dim) == [owner for s in drawn for owner in belongs(Dim((s,)))]
    for position in times(patches, parts):
        mine = at_hand(dim, position)
        assert listed(dim.spans(position)) == mine
        assert dim.local_size(position) == len(mine)
        for sharded in (True, False):
            assert listed(dim.spans(position, sharded)) == [
                i for i in mine if (belongs(dim)[i][1] is not None) is sharded]
            assert [mine[i] for i in listed(dim.local_spans(position, sharded))] == listed(dim.spans(position, sharded))
    # Of patches each index is there once, and all of a rank's come at once in their order.
    for rank in range(parts):
        parted = [at_hand(dim, {PATCH: patch, SEQUENCE: rank}) for patch in range(patches)]
        cut = [i for mine in parted for i in mine if belongs(dim)[i][0] is not None]
        assert len(set(cut)) == len(cut)
        assert listed(dim.spans({PATCH: EVERY, SEQUENCE: rank})) == sorted({i for mine in parted for i in mine})
    everywhere = [i for p in times(patches, parts)[parts:] for i in listed(dim.spans(p)) if None not in belongs(dim)[i]]
    assert sorted(everywhere) == [i for i, owner in enumerate(belongs(dim)) if None not in owner]
    assert dim.sharded == any(owner != (None, None) for owner in belongs(dim))
    assert dim.axes == ({PATCH} if any(p is not None for p, _ in belongs(dim)) else set()) | (
        {SEQUENCE} if any(r is not None for _, r in belongs(dim)) else set())
    assert all(s.length for s in dim.segments)
    assert not any(not a.cut and not b.cut for a, b in pairwise(dim.segments))


@given(st.data(), counts, ranks)
def test_indices_keep_their_patch_and_rank(data: st.DataObject, patches: int, parts: int) -> None:
    """In slices, repetitions, multiples and joined dimensions; what each position does with its own is the same."""
    dim = data.draw(timely_dims(patches, parts))
    start = data.draw(st.integers(0, dim.size))
    stop, step = data.draw(st.integers(start, dim.size)), data.draw(st.integers(1, 4))
    factor, others = data.draw(st.integers(1, 4)), data.draw(st.lists(timely_dims(patches, parts), max_size=2))
    owner = belongs(dim)
    assert belongs(dim.slice(start, stop, step)) == owner[start:stop:step]
    assert belongs(dim.repeat(factor)) == owner * factor
    assert belongs(dim.scale(factor)) == [o for o in owner for _ in range(factor)]
    assert belongs(concatenate([dim, *others])) == [o for d in (dim, *others) for o in belongs(d)]
    whole = torch.arange(dim.size)
    parted = [torch.arange(d.size) + 100 * i for i, d in enumerate((dim, *others))]
    for position in times(patches, parts):
        mine, at = whole[listed(dim.spans(position))], slice(start, stop, step)
        kept = [i for i in mine.tolist() if i in range(start, stop, step)]
        assert whole[at][listed(dim.slice(start, stop, step).spans(position))].tolist() == kept
        assert torch.equal(whole.repeat(factor)[listed(dim.repeat(factor).spans(position))], mine.repeat(factor))
        assert torch.equal(whole.repeat_interleave(factor)[listed(dim.scale(factor).spans(position))],
                           mine.repeat_interleave(factor))
        assert torch.equal(torch.cat(parted)[listed(concatenate([dim, *others]).spans(position))],
                           torch.cat([x[listed(d.spans(position))]
                                      for x, d in zip(parted, (dim, *others), strict=True)]))
    assert dim.slice(0, dim.size) == dim.scale(1) == dim.repeat(1) == concatenate([dim]) == dim


@given(st.data(), counts, ranks)
def test_views_are_views_of_what_is_at_hand(data: st.DataObject, patches: int, parts: int) -> None:
    before = [Dim.replicated(n) for n in data.draw(st.lists(st.integers(1, 4), max_size=3))]
    unit = data.draw(st.integers(1, 3))
    before.insert(data.draw(st.integers(0, len(before))), data.draw(timely_dims(patches, parts, unit, least=2)))
    sizes = [d.size for d in before]
    shape = data.draw(factorisations(math.prod(sizes)))
    after = reshape(before, shape)
    whole = torch.arange(math.prod(sizes))
    flat = reshape(before, [math.prod(sizes)])
    assert flat is not None
    back = reshape(flat, sizes)
    assert back is not None, "what is merged splits again"
    inner = data.draw(st.sampled_from([n for n in range(1, flat[0].size + 1) if flat[0].size % n == 0]))
    split = flat[0].split(flat[0].size // inner, inner)
    assert split is not None or inner > unit or any(o % inner for s in flat[0].segments for o in s.offsets)
    for position in times(patches, parts):
        mine = local(whole.view(sizes), before, position)
        assert listed(flat[0].spans(position)) == mine.flatten().tolist()
        assert torch.equal(local(whole.view(sizes), back, position).flatten(), mine.flatten())
        for dims_, view in ((after, shape), (split, [flat[0].size // inner, inner])):
            if dims_ is not None:
                assert torch.equal(mine.reshape([d.local_size(position) for d in dims_]),
                                   local(whole.view(view), dims_, position))


@given(st.data(), counts, ranks)
def test_gathered_is_what_the_ranks_of_one_time_share(data: st.DataObject, patches: int, parts: int) -> None:
    dim = data.draw(timely_dims(patches, parts))
    gathered = dim.gathered(SEQUENCE)
    assert gathered.axes == dim.axes - {SEQUENCE} and gathered.gathered(SEQUENCE) == gathered
    assert dim.gathered("other") == dim
    for position in times(patches, parts):
        shared = {i for rank in range(parts) for i in at_hand(dim, {**position, SEQUENCE: rank})}
        assert listed(gathered.spans(position)) == sorted(shared)


@given(st.data(), counts, ranks)
def test_places_are_where_ranges_lie_in_a_piece(data: st.DataObject, patches: int, parts: int) -> None:
    dim = data.draw(timely_dims(patches, parts))
    ends = st.integers(0, dim.size)
    ranges = [(min(p), max(p)) for p in data.draw(st.lists(st.tuples(ends, ends), max_size=4))]
    for position in times(patches, parts):
        mine = at_hand(dim, position)
        places = dim.places(ranges, position)
        assert [mine[i] for i in listed(places)] == [i for i in listed(ranges) if i in mine]
        assert dim.places(dim.spans(position), position) == ([(0, len(mine))] if mine else [])
        assert length(places) == len(listed(places)) and all(a < b for a, b in places)


@given(st.data(), counts, ranks, st.integers(1, 3))
def test_patched_shares_out_each_patch_by_units(data: st.DataObject, patches: int, parts: int, unit: int) -> None:
    rows = data.draw(st.lists(st.integers(0, 6), min_size=patches, max_size=patches))
    offsets = [0]
    for n in rows:
        offsets.append(offsets[-1] + n * unit)
    dim = Dim.patched(offsets, parts, unit)
    assert dim.size == offsets[-1]
    expected = []
    for patch, n in enumerate(rows):
        shares = [len(x) for x in torch.arange(n).tensor_split(parts)]
        expected += [(patch, rank if parts > 1 else None) for rank, share in enumerate(shares)
                     for _ in range(share * unit)]
    assert belongs(dim) == expected
    gathered = dim.gathered(SEQUENCE)
    if all(rows):
        assert gathered.borders(patches) == tuple(offsets)
        assert dim.borders(patches) == (None if parts > 1 else tuple(offsets))


@given(st.data(), counts, ranks)
def test_borders_are_those_of_patches_that_follow_each_other(data: st.DataObject, patches: int, parts: int) -> None:
    dim = data.draw(st.one_of(timely_dims(patches, parts), timely_dims(patches, 1).map(lambda d: d.gathered(SEQUENCE))))
    owner = [patch for patch, rank in belongs(dim) if rank is None and patch is not None]
    found = dim.borders(patches)
    if len(owner) < dim.size or not owner or owner != sorted(owner) or set(owner) != set(range(patches)):
        assert found is None
    else:
        assert found is not None and found == (*(owner.index(p) for p in range(patches)), dim.size)
        for patch, (a, b) in enumerate(pairwise(found)):
            assert dim.spans({PATCH: patch}) == [(a, b)]


def test_printing_of_patches() -> None:
    assert str(Dim.patched([0, 4, 8], 1)) == "4@0 + 4@1"
    assert str(Dim.patched([0, 4, 9], 2)) == "4/2@0 + 5/(3,2)@1"
    assert str(Dim.patched([0, 4, 12], 2, unit=2)) == "4/2@0 + 8/2@1"
    assert str(concatenate([Dim.of([Segment((0, 3), None, 0)]), Dim.replicated(2), Dim.even(4, 2)])) == "3@0 + 2 + 4/2"
    assert str(Layout((Dim.patched([0, 4, 8], 2), Dim.replicated(3)))) == "[4/2@0 + 4/2@1, 3]"


def test_neighbours_of_one_patch_stay_apart_and_values_differ_by_it() -> None:
    early, late = Segment((0, 3), None, 0), Segment((0, 3), None, 1)
    assert Dim.of([early, early]).segments == (early, early)
    assert Dim.of([early]) != Dim.of([late]) != Dim.replicated(3)
    assert merge([Dim.of([early]), Dim.of([late])]) is None, "one dimension of a tensor is cut"
    assert reshape([Dim.of([early, late])], [3, 2]) is None, "a border cuts through a row"
    assert reshape([Dim.of([early, late])], [2, 3]) == (Dim.of([Segment((0, 1), None, 0), Segment((0, 1), None, 1)]),
                                                        Dim.replicated(3))
