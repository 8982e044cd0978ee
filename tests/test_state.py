"""What of a model a captured program depends on: its structure and what it reads, not which objects these are."""

from __future__ import annotations

import copy
import datetime
import gc
import operator
import random
import re
import sys
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.frontend.model_state import DEPTH, describe
from xdit_compile.frontend.objects import MISSING
from xdit_compile.frontend.program_cache import captured
from xdit_compile.frontend.state_watch import LookedInto, Watch, _Dictionaries
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.spec import ShardingSpec


def model() -> nn.Sequential:
    """Three layers, two of one shape."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)).eval().requires_grad_(False)


def put_again(m: nn.Sequential) -> None:
    m[0] = copy.deepcopy(m[0])


def attribute_to_the_end(m: nn.Sequential) -> None:
    size = m[0].in_features
    del m[0].in_features
    m[0].in_features = size


def none_elsewhere(m: nn.Sequential) -> None:
    del m.extra
    m.register_module("extra", None)


def sets_in_another_order(m: nn.Sequential) -> None:
    m.names = {8, 0}


@pytest.mark.parametrize("change", [put_again, attribute_to_the_end, none_elsewhere, sets_in_another_order])
def test_same(change: Callable[[nn.Sequential], None]) -> None:
    m = model()
    m.extra, m.names = None, {0, 8}
    before = describe(m).value
    change(m)
    assert describe(m).value == before


def shared(m: nn.Sequential) -> None:
    m[1] = m[0]


def another_number(m: nn.Sequential) -> None:
    m.factor = 1.0


def truth(m: nn.Sequential) -> None:
    m.factor = True


def without_bias(m: nn.Sequential) -> None:
    m[0].bias = None


def exchanged(m: nn.Sequential) -> None:
    """The same modules, in other places."""
    m[1], m[2] = m[2], m[1]


@pytest.mark.parametrize("change", [shared, another_number, truth, without_bias, exchanged])
def test_different(change: Callable[[nn.Sequential], None]) -> None:
    m = model()
    m.factor = 1
    before = describe(m).value
    change(m)
    assert describe(m).value != before


def test_program_reads_the_layers_that_are_there_and_keeps_none() -> None:
    m, x = model(), torch.randn(2, 4)
    program = captured(m, (x,), {})
    run = Executor(compile_program(program, ShardingSpec(), 0).local, m)
    torch.testing.assert_close(run([x])[0], m(x))
    old = weakref.ref(m[0].weight)
    m[0] = nn.Linear(4, 4).eval().requires_grad_(False)
    assert captured(m, (x,), {}) is program
    torch.testing.assert_close(run([x])[0], m(x))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("other", [lambda w: w.T, lambda w: w[:3], lambda w: w.double(), lambda w: w[None]])
def test_parameters_that_look_otherwise_are_noticed(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Though they are the same objects."""
    m = model()
    watch = describe(m).watch
    assert watch.holds()
    m[0].weight.data = m[0].weight.data.clone()
    assert watch.holds(), "other values, which look the same"
    m[0].weight.data = other(m[0].weight.data)
    assert not watch.holds()


@pytest.mark.parametrize("depth", [1, DEPTH // 2, DEPTH - 3])
def test_what_lies_deep_is_followed(depth: int) -> None:
    m, inner = model(), {"gain": 1.0}
    held = inner
    for _ in range(depth):
        held = {"held": held}
    m.held = held
    before = describe(m).value
    assert describe(m).value == before
    inner["gain"] = 2.0
    assert describe(m).value != before


@pytest.mark.parametrize(("one", "other"), [
    (re.compile("a"), re.compile("b")), (re.match("a", "ab"), re.match("b", "ba")), (range(3), range(4)),
    (slice(1), slice(2)), (datetime.timedelta(1), datetime.timedelta(2)), (Decimal("1.0"), Decimal("1.00")),
    (Fraction(1, 2), Fraction(1, 3)), (operator.itemgetter(0), operator.itemgetter(1)), (super(bool, True), None),
    (bytearray(b"a"), bytearray(b"b")), (np.dtype("f4"), np.dtype("f8")), (np.float32(1), np.float64(1))])
def test_what_is_written_in_c_counts_by_what_it_holds(one: object, other: object) -> None:
    m = model()
    m.held = one
    before = describe(m).value
    assert describe(m).value == before
    m.held = other
    assert describe(m).value != before


def test_a_tensor_made_of_others_can_be_swapped_while_it_is_watched() -> None:
    def made() -> nn.Parameter:
        return nn.Parameter(TwoTensor(torch.ones(4, 4), torch.zeros(4, 4)), requires_grad=False)

    m = nn.Linear(4, 4)
    m.weight = made()
    watch = describe(m).watch
    assert watch.holds()
    torch.utils.swap_tensors(m.weight, made())


class Thing:
    """Any object."""


def watched(rng: random.Random) -> tuple[Watch, list[Callable[[], None]]]:
    """A watch of some places, and edits of what it watches, or of nothing of it."""
    things, edits = [Thing() for _ in range(rng.randint(1, 3))], list[Callable[[], None]]()
    into = LookedInto([])
    for thing in things:
        for name in "abc":
            if rng.random() < 0.8:
                setattr(thing, name, Thing())
                edits += [partial(setattr, thing, name, Thing()), partial(delattr, thing, name)]
            into.getters.append(partial(getattr, thing, name, MISSING))
            if hasattr(thing, name) and rng.random() < 0.5:
                into.getters.append(partial(getattr, thing, "__dict__"))
        thing.kept = thing.other = None
        into.states.append((operator.itemgetter("kept", "other"), vars(thing)))
        edits += [partial(setattr, thing, rng.choice(["kept", "other"]), Thing()), partial(delattr, thing, "kept")]
    for kind in (dict, OrderedDict, UserDict):
        held = kind({i: Thing() for i in range(rng.randint(0, 3))})
        into.mappings[id(held)] = held
        edits += [partial(held.update, {9: Thing()}), held.clear] if held else [partial(held.update, {9: Thing()})]
    items, space = [Thing() for _ in range(rng.randint(1, 3))], {name: Thing() for name in "xyz"}
    into.sequences[id(items)] = items
    chosen = rng.sample("xyz", rng.randint(1, 3))
    into.names[id(space)] = space, dict.fromkeys(chosen)
    array = np.zeros(rng.choice([1, 1 << 15]))
    into.memory.append(array)
    tensor, other = (torch.zeros(rng.choice([1, 1 << 15])) for _ in range(2))
    into.foreign[id(tensor)] = tensor
    edits += [items.pop, items.clear, partial(items.append, 1), partial(items.__setitem__, 0, Thing()),
              *(partial(space.__setitem__, n, Thing()) for n in chosen), partial(space.pop, chosen[0]),
              partial(array.fill, 2.0), partial(tensor.fill_, 2.0), partial(tensor.data.fill_, 2.0),
              partial(tensor.set_, other)]
    return Watch(into), edits


@pytest.mark.parametrize("seed", range(60))
def test_a_watch_tells_any_edit_and_no_other(seed: int) -> None:
    rng = random.Random(seed)
    for number in range(len(watched(random.Random(seed))[1])):
        watch, edits = watched(random.Random(seed))
        assert watch.holds() and watch.holds(fresh=rng.random() < 0.5)
        edits[number]()
        assert not watch.holds(fresh=True), edits[number]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python itself counts what is written into dictionaries")
def test_dictionaries_are_looked_at_after_a_write_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it was written into, and though others ask in between."""
    looks = list[object]()
    hold = _Dictionaries.hold
    monkeypatch.setattr(_Dictionaries, "hold", lambda self: looks.append(self) or hold(self))
    watches = [watched(random.Random(seed))[0] for seed in range(3)]
    space, counted = {"a": Thing(), "b": Thing()}, LookedInto([])
    counted.names[id(space)] = space, {"a": None}
    watches.append(Watch(counted))
    for _ in range(3):
        for _ in range(3):
            assert all(w.holds() for w in watches)
        assert len(looks) == len(watches)
        looks.clear()
        space["b"] = Thing()
