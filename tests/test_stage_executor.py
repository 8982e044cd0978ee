"""What is kept between steps and what follows from pieces of results: without processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor, Promise, Tape, materialize
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.pipefusion.denoising_loops import DenoisingLoop, DenoisingLoops, Step
from xdit_compile.runtime.pipefusion.schedule import WHOLE
from xdit_compile.runtime.pipefusion.stage_communicator import PatchedResults

BORDERS = (0, 3, 4, 7)
ROWS = BORDERS[-1]


# --------------------------------------------------------------------------------------------------
# PatchedResults


def rows(shape: Sequence[int], dim: int) -> Tensor:
    """Of each element, where it is along ``dim``."""
    index = torch.arange(shape[dim], dtype=torch.float32)
    return index.view([-1 if i == dim % len(shape) else 1 for i in range(len(shape))]).expand(*shape).clone()


class Coming:
    """Results of a call that come in pieces, or as a whole that is cut."""

    def __init__(self, *wholes: Tensor, dim: int = -2, borders: tuple[int, ...] = BORDERS, whole: bool = False) -> None:
        self.cut = Cut(dim, borders)
        units = (WHOLE,) if whole else tuple(range(len(borders) - 1))
        self.call = PatchedResults(units, [self.cut] * len(wholes))
        for unit in units:
            self.call.tensors[unit] = [w.clone() if whole else self.cut.piece(w, unit).clone() for w in wholes]
        self.fetched = 0
        self.tape = Tape(self._fetch)
        self.tensors = self.tape.deferred(self.call, wholes)

    def _fetch(self) -> None:
        self.fetched += 1
        if self.call.values is None:
            self.call.assemble()


def pieces(tensor: Tensor) -> list[Tensor] | None:
    """All pieces of a deferred tensor, if it comes in some."""
    assert isinstance(tensor, DeferredTensor) and tensor.promise.values is None
    if (cut := tensor.cut) is None:
        return None
    return [tensor.promise.piece(tensor.place, p) for p in range(cut.patches)]


def moved(draw: Any, x: Tensor, at: int) -> Callable[[Tensor], Tensor]:
    """An operator that moves the elements of a tensor shaped as ``x`` and leaves dimension ``at`` as it is."""
    others = [d for d in range(x.ndim) if d != at]
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "clone": lambda t: t.clone(), "detach": lambda t: t.detach(), "double": lambda t: t.double().float()}
    if x.ndim < 5:
        new = draw(st.integers(-x.ndim - 1, x.ndim))
        known["unsqueeze"] = lambda t: t.unsqueeze(new)
        known["None"] = lambda t: t[None]
        known["stack"] = lambda t: torch.stack([t, t], dim=new)
        known["expand"] = lambda t: t.expand(2, *[-1 if i % 2 else n for i, n in enumerate(t.shape)]).clone()
    if x.ndim > 1:
        one, two = draw(st.sampled_from(others)), draw(st.integers(0, x.ndim - 1))
        order = draw(st.permutations(range(x.ndim)))
        size = x.shape[one]
        start = draw(st.integers(0, size - 1))
        known |= {
            "transpose": lambda t: t.transpose(one, two - t.ndim), "permute": lambda t: t.permute(*order),
            "slice": lambda t: t.narrow(one, start, size - start), "select": lambda t: t.select(one - t.ndim, start),
            "unbind": lambda t: t.unbind(one)[start], "chunk": lambda t: t.chunk(2, dim=one)[0],
            "split": lambda t: t.split([start, size - start], one)[1],
            "cat": lambda t: torch.cat([t, t], dim=one - t.ndim),
            "squeeze": lambda t: t.squeeze(one)}
    if x.ndim == 2:
        known["t"] = lambda t: t.t()
    if not x.is_contiguous():
        return known[draw(st.sampled_from(sorted(known)))]
    if at > 1:
        known["flatten before"] = lambda t: t.flatten(0, at - 1)
    if at < x.ndim - 2:
        known["flatten after"] = lambda t: t.reshape(*t.shape[: at + 1], -1)
    if x.shape[-1] % 2 == 0 and at != x.ndim - 1 and x.ndim < 5:
        known["unflatten"] = lambda t: t.unflatten(-1, (2, -1))
    return known[draw(st.sampled_from(sorted(known)))]


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda t: t + 0.5, "rsub": lambda t: 1.5 - t, "tanh": torch.tanh, "square": lambda t: t**2,
    "clamp": lambda t: t.clamp(-1, 1), "where": lambda t: torch.where(t > 0, t, -0.1 * t), "neg": torch.neg,
    "scalar": lambda t: t * torch.tensor(1.7), "divide": lambda t: t / 3, "lerp": lambda t: torch.lerp(t, 2 * t, 0.3)}


def with_known(draw: Any, x: Tensor, at: int) -> Callable[[Tensor], Tensor]:
    """An operator with a tensor that is known: whole, repeated along some dimensions, or with fewer of them."""
    shape = [draw(st.sampled_from([1, n])) for n in x.shape]
    shape = shape[draw(st.integers(0, x.ndim - 1)) :]
    known = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return draw(st.sampled_from([lambda t: t + known, lambda t: known * t, lambda t: torch.lerp(t, known, 0.25),
                                 lambda t: torch.where(known > 0, t, known)]))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_chains_of_operators_on_pieces(data: Any) -> None:
    """Each keeps the pieces, which are those of what plain tensors give; where they are, a tensor of rows tells."""
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    at = draw(st.integers(0, len(shape)))
    shape.insert(at, ROWS)
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coming = Coming(plain, dim=at - len(shape), whole=draw(st.booleans()))
    (deferred,) = coming.tensors
    label, chain = rows(shape, at), [(plain, deferred)]
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["move", "move", "element", "known", "earlier", "condition"]))
        if kind == "move":
            op = moved(draw, plain, at)
            label = op(label)
        elif kind == "element":
            op = ELEMENTWISE[draw(st.sampled_from(sorted(ELEMENTWISE)))]
        elif kind == "known":
            op = with_known(draw, plain, at)
        elif kind == "condition":
            # Channels that are known, beside those that come.
            if not (others := [d for d in range(plain.ndim) if d != at]):
                continue
            dim = draw(st.sampled_from(others))
            known = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
            op, label = (lambda t, d=dim, k=known: torch.cat([k, t], d)), torch.cat([label, label], dim)
        else:
            same = [(p, d) for p, d in chain if p.shape == plain.shape and isinstance(d, DeferredTensor)
                    and d.cut == deferred.cut]
            other, delayed = draw(st.sampled_from(same)) if same else (plain, deferred)
            plain, deferred = plain + 2 * other, deferred + 2 * delayed
            chain.append((plain, deferred))
            continue
        plain, deferred = op(plain), op(deferred)
        chain.append((plain, deferred))
        (at,) = (d for d, n in enumerate(label.shape) if n == ROWS and torch.equal(label, rows(label.shape, d)))
        assert isinstance(deferred, DeferredTensor) and deferred.shape == plain.shape
        assert deferred.cut == Cut(at - plain.ndim, BORDERS)
    found = pieces(deferred)
    assert found is not None
    for patch, piece in enumerate(found):
        torch.testing.assert_close(piece, deferred.cut.piece(plain, patch), rtol=0, atol=0)
    assert coming.fetched == 0, "pieces wait for nothing else"
    for wanted, later in chain:
        torch.testing.assert_close(materialize(later), wanted, rtol=0, atol=0)
    assert coming.fetched == 1


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda t: t[:, 2:], "select": lambda t: t[:, 1], "chunk": lambda t: t.chunk(2, dim=1)[0],
    "split": lambda t: t.split([3, 4], dim=1)[1], "unbind": lambda t: t.unbind(1)[3],
    "cat": lambda t: torch.cat([t, t], dim=1), "cat with known": lambda t: torch.cat([t, torch.ones(2, 1, 5)], dim=1),
    "merged": lambda t: t.flatten(1), "merged with the batch": lambda t: t.flatten(0, 1),
    "divided": lambda t: t.reshape(2, 5, 7), "turned": lambda t: t[:, :5] + t[:, 2:].transpose(0, 1)[:5].sum(),
    "other rows": lambda t: t[:, :5] + t.transpose(1, 2)[..., :5], "spread": lambda t: t + t[:, :1]}


@pytest.mark.parametrize("name", MIXING)
def test_operators_that_mix_pieces(name: str) -> None:
    """They have none, and neither has what follows; the whole is right."""
    plain = torch.randn(2, ROWS, 5)
    (deferred,) = Coming(plain).tensors
    result = MIXING[name](deferred)
    assert not isinstance(result, DeferredTensor) or result.promise.values is not None or (
        pieces(result) is None and pieces(result + 1) is None and pieces(result[None]) is None)
    torch.testing.assert_close(materialize(result), MIXING[name](plain), rtol=0, atol=0)


def test_what_is_not_element_wise_waits_for_all() -> None:
    for op in (torch.sum, torch.cumsum, torch.sort, torch.flip, torch.softmax, torch.std):
        plain = torch.randn(2, ROWS, 5)
        coming = Coming(plain)
        args = (1,) if op in (torch.cumsum, torch.softmax) else ([1],) if op is torch.flip else ()
        actual, wanted = op(coming.tensors[0] + 1, *args), op(plain + 1, *args)
        assert coming.fetched == 1
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_results_that_are_cut_otherwise_do_not_meet_in_pieces() -> None:
    plain = torch.randn(2, ROWS, ROWS)
    (one,) = Coming(plain).tensors
    (other,) = (c := Coming(plain, dim=-1)).tensors
    assert pieces(one + one.transpose(1, 2)) is None, "cut along two dimensions"
    assert pieces(one + one) is not None
    # Of two tapes: computed at once.
    torch.testing.assert_close(one + other, plain + plain, rtol=0, atol=0)
    assert c.fetched == 1


def test_a_known_tensor_is_taken_as_it_was() -> None:
    plain, noise = torch.randn(2, ROWS, 5), torch.ones(2, ROWS, 5)
    (deferred,) = Coming(plain).tensors
    later, view = deferred + noise, deferred * noise[:, :, :1]
    noise.zero_()
    assert all(torch.equal(p, q) for p, q in zip(pieces(later), (plain + 1).split([3, 1, 3], 1), strict=True))
    assert torch.equal(materialize(later), plain + 1) and torch.equal(materialize(view), plain)


def test_squeezed_pieces_of_one_row() -> None:
    plain = torch.randn(1, ROWS, 5)
    deferred = Coming(plain).tensors[0].squeeze()
    found = pieces(deferred)
    if found is not None:
        assert [p.shape for p in found] == [deferred.cut.piece(plain.squeeze(), i).shape for i in range(3)]


def test_pieces_of_one_row_squeezed_where_nothing_is_to_squeeze() -> None:
    plain = torch.randn(2, ROWS, 5)
    deferred = Coming(plain).tensors[0].squeeze(1)
    found = pieces(deferred)
    if found is not None:
        assert [p.shape for p in found] == [(2, 3, 5), (2, 1, 5), (2, 3, 5)]


def test_a_result_that_does_not_come_in_pieces() -> None:
    coming = Coming(torch.randn(2, ROWS, 5))
    call = PatchedResults((0, 1, 2), [Cut(-2, BORDERS), None])
    whole, other = torch.randn(2, ROWS, 5), torch.randn(3)
    for unit in range(3):
        call.tensors[unit] = [Cut(-2, BORDERS).piece(whole, unit), other if unit == 2 else torch.empty(0)]
    one, two = coming.tape.deferred(call, [whole, other])
    assert pieces(one) is not None and pieces(two) is None and pieces(one[..., :3] + two) is None
    call.assemble()
    assert torch.equal(materialize(one), whole) and torch.equal(materialize(two), other)


# --------------------------------------------------------------------------------------------------
# The order in which deferred tensors are resolved


def test_writing_into_one_view_shows_in_the_others() -> None:
    def act(x: Tensor) -> list[Tensor]:
        y = x + 1
        seen, lost = y.view(-1), y * 2
        del lost
        z = y * 3
        y.mul_(2)
        return [y, seen, z, seen + 1]

    plain = torch.randn(2, ROWS, 5)
    for actual, wanted in zip(act(Coming(plain).tensors[0]), act(plain), strict=True):
        assert torch.equal(materialize(actual), wanted)


def test_what_is_wanted_no_more_is_not_computed() -> None:
    coming = Coming(torch.randn(2, ROWS, 5))
    (x,) = coming.tensors
    kept = x + 1
    gone = kept * 2
    promise = gone.promise
    del gone
    materialize(kept)
    assert promise.values is not None, "somebody holds it"
    recorded = [reference() for reference in coming.tape._recorded]
    assert recorded == []


def test_results_that_are_here_are_used_in_order() -> None:
    """Up to the first that still waits."""
    coming = Coming(torch.ones(2, ROWS, 5))
    tape, second = coming.tape, Promise()
    (x,) = coming.tensors
    (y,) = tape.deferred(second, [torch.ones(2, ROWS, 5)])
    one, two, three = x + 1, y + 1, x + 2
    tape.advance()
    assert all(t.promise.values is None for t in (one, two, three))
    coming.call.assemble()
    tape.advance()
    assert [t.promise.values is None for t in (one, two, three)] == [False, True, True]
    second.values = [torch.zeros(2, ROWS, 5)]
    tape.advance()
    assert [t.promise.values[0].unique().item() for t in (one, two, three)] == [2, 1, 3]
    assert coming.fetched == 0


def test_pieces_after_the_whole_is_known() -> None:
    plain = torch.randn(2, ROWS, 5)
    coming = Coming(plain)
    (x,) = coming.tensors
    y = (x + 1)[..., 2:] * 2
    coming.call.assemble()
    for patch in range(3):
        assert torch.equal(y.promise.piece(y.place, patch), y.cut.piece((plain + 1)[..., 2:] * 2, patch))
    assert torch.equal(materialize(y), (plain + 1)[..., 2:] * 2)


# --------------------------------------------------------------------------------------------------
# DenoisingLoops


class Loops:
    """Calls of loops, with the memory they were given numbered."""

    def __init__(self) -> None:
        self.loops = DenoisingLoops()
        self.made = 0

    def __call__(self, key: str, *times: float, epoch: int = 0) -> int:
        """How many steps the call's loop then had."""
        self.loop: DenoisingLoop = self.loops.next(Step("", (), lambda: key, lambda: times, epoch, self._make))
        return self.loop.steps

    def _make(self) -> list[Tensor]:
        self.made += 1
        return [torch.tensor(self.made)]


def test_a_loop() -> None:
    call = Loops()
    assert [call("a", t) for t in (9, 7, 5, 3)] == [1, 2, 3, 4]
    assert call.made == 1
    assert [call("b", t) for t in (0.1, 0.4, 0.9)] == [1, 2, 3], "times may rise, too"


def test_the_same_prompt_again() -> None:
    """With new noise: the same times from the start, or others that begin later than the last ones ended."""
    call = Loops()
    assert [call("a", t) for t in (9, 7, 5, 9, 7, 5, 8, 4)] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert call.made == 1, "memory is used again"
    assert [call("a", t) for t in (9, 9, 9)] == [1, 1, 1], "loops of one step"


def test_times_that_go_back() -> None:
    """As where a step is repeated with noise added."""
    call = Loops()
    assert [call("a", t) for t in (9, 7, 5, 7, 5, 3)] == [1, 2, 3, 1, 2, 3]


def test_times_that_stay() -> None:
    """Solvers of second order call twice at a time."""
    call = Loops()
    assert [call("a", t) for t in (9, 7, 7, 5, 5, 5, 3)] == [1, 2, 3, 4, 5, 6, 7]


def test_two_conditions_in_turn() -> None:
    call = Loops()
    assert [(call("a", t), call("b", t)) for t in (9, 7, 5)] == [(1, 1), (2, 2), (3, 3)]
    a, b = (call(key, 3) and call.loop for key in "ab")
    assert a is not b and a.caches is not b.caches and call.made == 2
    assert [(call("a", t), call("b", t)) for t in (9, 7)] == [(1, 1), (2, 2)], "a new picture"


def test_a_condition_that_missed_a_step() -> None:
    call = Loops()
    assert [call(k, t) for k, t in zip("ababaaab", (9, 9, 7, 7, 5, 3, 2, 2), strict=True)] == [1, 1, 2, 2, 3, 4, 5, 1]
    call = Loops()
    assert [call(k, t) for k, t in zip("ababaab", (9, 9, 7, 7, 5, 3, 3), strict=True)] == [1, 1, 2, 2, 3, 4, 1]


def test_another_resolution_in_between() -> None:
    for between in ((5,), (9, 7, 5), (5, 3)):
        call = Loops()
        assert [call("small", t) for t in (9, 7)] == [1, 2]
        assert [call("large", t) for t in between] == list(range(1, len(between) + 1))
        assert [call("small", t) for t in (4, 3)] == [1, 2] if between == (5,) else [call("small", 2)] == [1]


def test_another_call_of_the_pipeline() -> None:
    call = Loops()
    assert [call("a", t, epoch=1) for t in (9, 7)] == [1, 2]
    assert [call("a", t, epoch=2) for t in (5, 3)] == [1, 2], "even if it looks as if it went on"
    assert call.made == 2


def test_a_condition_of_which_nothing_is_used_for_long_is_forgotten() -> None:
    call = Loops()
    for i in range(20):
        call(f"prompt {i}", 9)
        call(f"prompt {i}", 7 - i / 100)
    assert len(call.loops._loops) <= 2
