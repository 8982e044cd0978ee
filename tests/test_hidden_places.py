"""Places that a forward reaches in a roundabout way: tables there stay real, state is refused, edits are seen."""

from __future__ import annotations

import contextvars
import enum
import importlib
import logging
import os
import queue
import random
import secrets
import sys
import uuid
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import hidden_config
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

import xdit_compile
from xdit_compile import CaptureError

Act = Callable[[Any, Tensor], Tensor]
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("VARIABLE", default=None)
UNSET: contextvars.ContextVar[Any] = contextvars.ContextVar("UNSET")
LOGGER = logging.getLogger("hidden")
HIDDEN: list[Any] = []


class Kind(enum.Enum):
    """With a member that holds more than its value."""

    A = [0.0]  # noqa: RUF012


class Meta(type):
    """Whose attributes its classes have."""

    cache: dict[Any, Any] = {}  # noqa: RUF012
    gain = 1.0


class Plain:
    """Any object."""

    gain, count = 1.0, 0


class Model(nn.Module, metaclass=Meta):
    """Attention, and then ``act`` of it."""

    def __init__(self, act: Act, **held: Any) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), act
        self.__dict__.update(held)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.layer(x)
        return self.act(self, nn.functional.scaled_dot_product_attention(x, x, x) * t)


def reset() -> None:
    """All that tests write into."""
    hidden_config.SCALE, hidden_config.TABLE, Meta.gain, Plain.gain = 1.0, None, 1.0, 1.0
    for cache in (hidden_config.CACHE, Meta.cache, table_by_default.__defaults__[0],
                  table_by_keyword.__kwdefaults__["cache"]):
        cache.clear()
    vars(Kind.A).pop("table", None)
    Kind.A.value[0], counted.__defaults__[0][0], scaled.__kwdefaults__["by"] = 0.0, 0, 1.0  # type: ignore[index]
    for space, name in ((globals(), "_TABLE"), (vars(torch), "_hidden_table")):
        space.pop(name, None)
    VARIABLE.set(None)
    LOGGER.setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = False


def inputs(seed: int, length: int = 8) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(1, length, 4, generator=drawn), torch.full((), 1.0 + seed)


def made() -> Tensor:
    return torch.linspace(0, 1, 4)


def table_by_default(n: int, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return cache.setdefault(n, made()) if n not in cache else cache[n]


def table_by_keyword(n: int, *, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return cache.setdefault(n, made()) if n not in cache else cache[n]


def counted(count: list[int] = [0]) -> int:  # noqa: B006
    count[0] += 1
    return count[0]


def scaled(x: Tensor, *, by: float = 1.0) -> Tensor:
    return x * by


def once(holder: Any, name: str) -> Tensor:
    """A table that is made at the first call."""
    if getattr(holder, name, None) is None:
        setattr(holder, name, made())
    return getattr(holder, name)


def of_variable(m: Any, x: Tensor) -> Tensor:
    if VARIABLE.get() is None:
        VARIABLE.set(made())
    return x * VARIABLE.get()


def of_unset(m: Any, x: Tensor) -> Tensor:
    try:
        return x * UNSET.get()
    except LookupError:
        UNSET.set(made())
        return x * UNSET.get()


def of_import(m: Any, x: Tensor) -> Tensor:
    import hidden_config as config

    if 4 not in config.CACHE:
        config.CACHE[4] = made()
    return x * config.CACHE[4]


def of_globals(m: Any, x: Tensor) -> Tensor:
    return x * globals().setdefault("_TABLE", made()) if "_TABLE" not in globals() else x * globals()["_TABLE"]


def of_torch(m: Any, x: Tensor) -> Tensor:
    if not hasattr(torch, "_hidden_table"):
        torch._hidden_table = made()  # type: ignore[attr-defined]
    return x * torch._hidden_table  # type: ignore[attr-defined]


def of_class(m: Any, x: Tensor) -> Tensor:
    cache = type(m).cache
    if 4 not in cache:
        cache[4] = made()
    return x * cache[4]


TABLES: dict[str, Callable[[], Model]] = {
    "default argument": lambda: Model(lambda m, x: x * table_by_default(4)),
    "keyword default": lambda: Model(lambda m, x: x * table_by_keyword(4)),
    "context variable": lambda: Model(of_variable),
    "weak reference": lambda: Model(lambda m, x: x * once(m.ref(), "table"), ref=weakref.ref(HIDDEN[0])),
    "module as attribute": lambda: Model(lambda m, x: x * once(m.config, "TABLE"), config=hidden_config),
    "module imported inside": lambda: Model(of_import),
    "globals()": lambda: Model(of_globals),
    "name of torch": lambda: Model(of_torch),
    "member of an Enum": lambda: Model(lambda m, x: x * once(Kind.A, "table")),
    "metaclass": lambda: Model(of_class),
    "attribute of a tensor": lambda: Model(lambda m, x: x * once(m.held[0], "table"), held=[torch.ones(4)]),
}


def is_fake(value: Any) -> bool:
    return isinstance(value, (FakeTensor, FunctionalTensor))


def compare(make: Callable[[], Model], edit: Callable[[Any], None] = lambda m: None,
            calls: tuple[tuple[int, int], ...] = ((1, 8), (2, 8), (3, 8))) -> None:
    """Against the model as it is, which goes through the same; and the original afterwards."""
    found: list[list[Tensor]] = []
    for parallel in (False, True):
        reset()
        HIDDEN[:] = [Plain()]
        torch.manual_seed(0)
        model = make().eval()
        run = xdit_compile.parallelize(model, "ulysses=1") if parallel else model
        with torch.no_grad():
            results = [run(*inputs(*calls[0]))]
            edit(model)
            results += [run(*inputs(*call)) for call in calls[1:]]
            after = model(*inputs(9))
        assert not any(map(is_fake, [*results, after]))
        found.append([*results, after])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES.keys())
def test_tables_stay_real(make: Callable[[], Model]) -> None:
    compare(make)


def test_context_that_had_no_value_is_left_so() -> None:
    with pytest.raises(CaptureError), torch.no_grad():
        xdit_compile.parallelize(Model(of_unset).eval(), "ulysses=1")(*inputs(1))
    assert UNSET.get(None) is None


def counting(holder: Any, name: str) -> float:
    setattr(holder, name, getattr(holder, name) + 1)
    return float(getattr(holder, name))


def queued(m: Any, x: Tensor) -> Tensor:
    m.numbers.put(m.numbers.get() + 1)
    return x


def viewed(m: Any, x: Tensor) -> Tensor:
    m.view[0] += 1
    return x * m.view[0]


def seeded(m: Any, x: Tensor) -> Tensor:
    m.drawn.manual_seed(m.drawn.initial_seed() + 1)
    return x


def in_context(m: Any, x: Tensor) -> Tensor:
    VARIABLE.set((VARIABLE.get() or 0) + 1)
    return x * VARIABLE.get()


STATE: dict[str, Callable[[], Model]] = {
    "default argument": lambda: Model(lambda m, x: x * counted()),
    "default of a hook": lambda: hooked(),
    "context variable": lambda: Model(in_context),
    "weak reference": lambda: Model(lambda m, x: x * counting(m.ref(), "count"), ref=weakref.ref(HIDDEN[0])),
    "module as attribute": lambda: Model(lambda m, x: x * counting(m.config, "SCALE"), config=hidden_config),
    "queue": lambda: Model(queued, numbers=a_queue()),
    "memory": lambda: Model(viewed, view=memoryview(bytearray([1]))),
    "numpy generator": lambda: Model(lambda m, x: x * m.drawn.random(), drawn=np.random.default_rng(0)),
    "torch generator": lambda: Model(seeded, drawn=torch.Generator().manual_seed(1)),
    "numbers of the system": lambda: Model(lambda m, x: x * m.drawn.random(), drawn=random.SystemRandom()),
    "os.urandom": lambda: Model(lambda m, x: x * os.urandom(1)[0]),
    "uuid": lambda: Model(lambda m, x: x * (uuid.uuid4().int % 7)),
    "secrets": lambda: Model(lambda m, x: x * secrets.randbelow(7)),
}


def hooked() -> Model:
    model = Model(lambda m, x: x)
    model.layer.register_forward_hook(lambda module, args, out, count=[0]: out * counted(count))
    return model


def a_queue() -> Any:
    made: queue.SimpleQueue[int] = queue.SimpleQueue()
    made.put(1)
    return made


@pytest.mark.parametrize("make", STATE.values(), ids=STATE.keys())
def test_state_is_refused(make: Callable[[], Model]) -> None:
    reset()
    HIDDEN[:] = [Plain()]
    model = make().eval()
    with pytest.raises(CaptureError, match=r"keeps state|can read|can draw"), torch.no_grad():
        xdit_compile.parallelize(model, "ulysses=1")(*inputs(1))
    with torch.no_grad():
        assert not is_fake(model(*inputs(1)))
    assert vars(HIDDEN[0]).get("count", 1) == 1


def local_alias(m: Any, x: Tensor) -> Tensor:
    config = hidden_config
    return x * config.SCALE


def imported(m: Any, x: Tensor) -> Tensor:
    import hidden_config as config

    return x * config.SCALE


def told(m: Any, x: Tensor) -> Tensor:
    return x * (2.0 if LOGGER.isEnabledFor(logging.DEBUG) else 1.0)


def fast(m: Any, x: Tensor) -> Tensor:
    return x * (2.0 if torch.backends.cuda.matmul.allow_tf32 else 1.0)


def missing(m: Any, x: Tensor) -> Tensor:
    x = x * m.factors["absent"]
    m.factors.clear()
    return x


def set_scale(m: Any) -> None:
    hidden_config.SCALE = 2.0


READ: dict[str, tuple[Callable[[], Model], Callable[[Any], None]]] = {
    "module as attribute": (lambda: Model(lambda m, x: x * m.config.SCALE, config=hidden_config), set_scale),
    "getattr": (lambda: Model(lambda m, x: x * getattr(hidden_config, "SCALE")), set_scale),  # noqa: B009
    "local name": (lambda: Model(local_alias), set_scale),
    "import inside": (lambda: Model(imported), set_scale),
    "sys.modules": (lambda: Model(lambda m, x: x * sys.modules["hidden_config"].SCALE), set_scale),
    "import_module": (lambda: Model(lambda m, x: x * importlib.import_module("hidden_config").SCALE), set_scale),
    "metaclass": (lambda: Model(lambda m, x: x * type(m).gain), lambda m: setattr(Meta, "gain", 2.0)),
    "member of an Enum": (lambda: Model(lambda m, x: x * (1 + m.kind.value[0]), kind=Kind.A),
                          lambda m: Kind.A.value.__setitem__(0, 2.0)),
    "keyword default": (lambda: Model(lambda m, x: scaled(x)),
                        lambda m: setattr(scaled, "__kwdefaults__", {"by": 2.0})),
    "default factory": (lambda: Model(missing, factors=defaultdict(lambda: 1.0)),
                        lambda m: setattr(m.factors, "default_factory", lambda: 2.0)),
    "memory": (lambda: Model(lambda m, x: x * m.view[0], view=memoryview(bytearray([1]))),
               lambda m: m.view.__setitem__(0, 2)),
    "level of a logger": (lambda: Model(told), lambda m: LOGGER.setLevel(logging.DEBUG)),
    "switch of a backend": (lambda: Model(fast), lambda m: setattr(torch.backends.cuda.matmul, "allow_tf32", True)),
    "attribute of a tensor": (lambda: Model(lambda m, x: x * m.held[0].gain, held=[with_gain()]),
                              lambda m: setattr(m.held[0], "gain", 2.0)),
}


def with_gain() -> Tensor:
    made = torch.ones(4)
    made.gain = 1.0  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(("make", "edit"), READ.values(), ids=READ.keys())
def test_edits_are_seen(make: Callable[[], Model], edit: Callable[[Any], None]) -> None:
    compare(make, edit)


def longest(m: Any, x: Tensor) -> Tensor:
    m.longest = max(m.longest, x.shape[1])
    return x * m.longest


def first_length(m: Any, x: Tensor) -> Tensor:
    m.length = x.shape[1] if m.length is None else m.length
    return x * m.length


def growing(m: Any, x: Tensor) -> Tensor:
    if m.table is None or m.table.shape[0] < x.shape[1]:
        m.table = torch.linspace(0, 1, x.shape[1])
    return x * m.table[: x.shape[1], None]


def growing_buffer(m: Any, x: Tensor) -> Tensor:
    if m.table is None or m.table.shape[0] < x.shape[1]:
        m.register_buffer("table", torch.linspace(0, 1, x.shape[1]), persistent=False)
    return x * m.table[: x.shape[1], None]


def folded(m: Any, x: Tensor) -> Tensor:
    if m.product is None:
        m.product = m.layer.weight @ m.layer.weight
    return x @ m.product


def of_scale(m: Any, x: Tensor) -> Tensor:
    if m.table is None:
        m.table = torch.arange(4.0) * m.scale
    return x * m.table


def with_buffer() -> Model:
    model = Model(growing_buffer)
    model.register_buffer("table", None)
    return model


SIZES = (1, 8), (2, 12), (3, 6), (4, 12), (5, 8)
FIRST: dict[str, tuple[Callable[[], Model], Callable[[Any], None]]] = {
    "longest so far": (lambda: Model(longest, longest=0), lambda m: None),
    "first length": (lambda: Model(first_length, length=None), lambda m: None),
    "growing table": (lambda: Model(growing, table=None), lambda m: None),
    "growing buffer": (with_buffer, lambda m: None),
    "of a weight": (lambda: Model(folded, product=None), lambda m: m.layer.weight.mul_(2)),
    "of an attribute": (lambda: Model(of_scale, table=None, scale=1.0), lambda m: setattr(m, "scale", 2.0)),
}


@pytest.mark.filterwarnings("ignore:.*at its first call")
@pytest.mark.parametrize(("make", "edit"), FIRST.values(), ids=FIRST.keys())
def test_what_the_first_call_decides_stays(make: Callable[[], Model], edit: Callable[[Any], None]) -> None:
    compare(make, edit, SIZES)


def unwatched(m: Any, x: Tensor) -> Tensor:
    held = unwatched.__annotations__
    if "table" not in held:
        held["table"] = made()
    return x * held["table"]


def test_tensor_left_in_an_unknown_place_is_refused_and_taken_out() -> None:
    model = Model(unwatched).eval()
    with pytest.raises(CaptureError, match="leaves a tensor in 'table'"), torch.no_grad():
        xdit_compile.parallelize(model, "ulysses=1")(*inputs(1))
    assert "table" not in unwatched.__annotations__


def debugger(frame: Any, event: str, arg: Any) -> Any:
    return debugger


def coverage(frame: Any, event: str, arg: Any) -> Any:
    """Puts itself in the place of whoever tells it of a call, as tracers that are written in C do."""
    if event == "call":
        sys.settrace(coverage)
    return coverage


def ended(frame: Any, event: str, arg: Any) -> Any:
    sys.settrace(None)


@pytest.mark.parametrize("tracer", [debugger, coverage, ended])
def test_edits_are_seen_while_others_trace(tracer: Any) -> None:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        compare(*READ["metaclass"])
    finally:
        sys.settrace(before)


def traces(m: Any, x: Tensor) -> Tensor:
    sys.settrace(debugger)
    return x * Plain.gain


def test_forward_that_traces_itself_is_refused() -> None:
    before = sys.gettrace()
    sys.settrace(None)
    try:
        with pytest.raises(CaptureError, match=r"sys\.settrace"), torch.no_grad():
            xdit_compile.parallelize(Model(traces).eval(), "ulysses=1")(*inputs(1))
    finally:
        sys.settrace(before)
