"""What forward reads of the model itself: values of buffers are guarded, numbers nobody reads do not part blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import together
from torch import Tensor, nn

from xdit_compile.errors import XditError
from xdit_compile.frontend.capture import capture
from xdit_compile.frontend.objects import constants
from xdit_compile.frontend.program_cache import captured, find
from xdit_compile.frontend.reads import Ran, Reads
from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.ir.pytree import flatten

N, D = 12, 32


def exact(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether two ranks together give what the model does."""
    arguments = args, kwargs
    with torch.no_grad():
        result = model(*arguments[0], **arguments[1])
    program = capture(model, *arguments)
    return together(model, arguments, flatten((result, arguments))[0], program, "ulysses=2").error <= 1e-5


def causal(dtype: torch.dtype = torch.float32) -> Tensor:
    """Hides later tokens."""
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    return hidden if dtype is torch.bool else torch.zeros(N, N).masked_fill(hidden, -torch.inf)


def banded() -> Tensor:
    return torch.zeros(N, N).masked_fill(torch.ones(N, N).tril(3).bool().logical_not(), -torch.inf)


class Masked(nn.Module):
    """PyTorch's own transformers, with a mask that is a buffer, of which they read whether it is causal."""

    def __init__(self, kind: str, mask: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.kind = kind
        how = {"dim_feedforward": 64, "batch_first": True, "dropout": 0.0}
        if kind == "both":
            self.inner: nn.Module = nn.Transformer(D, 4, 1, 1, **how)
        elif kind == "decoder":
            self.inner = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, norm_first=True, **how), 2)
        else:
            layer = nn.TransformerEncoderLayer(D, 4, norm_first=True, **how)
            self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        if kind == "attribute":
            self.mask = mask
        else:
            self.register_buffer("mask", mask, persistent)

    def forward(self, x: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        x = x * t[:, None, None]
        if self.kind == "both":
            return self.inner(memory, x, src_mask=self.mask, tgt_mask=self.mask)
        return self.inner(x, memory, tgt_mask=self.mask) if self.kind == "decoder" else self.inner(x, mask=self.mask)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "both", "attribute"])
@pytest.mark.parametrize("mask", [causal(), causal(torch.bool), banded()], ids=["causal", "booleans", "banded"])
def test_transformers_of_pytorch_with_a_mask(kind: str, mask: Tensor) -> None:
    torch.manual_seed(0)
    model = Masked(kind, mask).eval().requires_grad_(False)
    assert exact(model, torch.randn(2, N, D), torch.rand(2), torch.randn(2, N, D))


class Counted(nn.Module):
    """Decides by a buffer's value, wherever that is kept, how often a layer runs."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.first, self.place = nn.Linear(D, D), place
        self.blocks = nn.ModuleList(Reading() if place == "blocks" else nn.Sequential(nn.Linear(D, D), nn.SiLU())
                                    for _ in range(3))
        self.register_buffer("times", torch.tensor([2, 1]))
        self.kept = torch.tensor(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        times = {"buffer": lambda: int(self.times.sum()) - 1, "attribute": self.kept.item, "blocks": lambda: 1}
        for _ in range(times[self.place]()):
            for block in self.blocks:
                x = block(x)
        return x


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, D))
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) if self.on else x


def turn_off(model: Counted) -> None:
    model.blocks[1].on.fill_(False)


@pytest.mark.parametrize(("place", "change"), [
    ("buffer", lambda m: m.times.add_(1)), ("buffer", lambda m: m.times.data.mul_(2)),
    ("attribute", lambda m: m.kept.fill_(1)), ("blocks", turn_off),
    ("blocks", lambda m: m.blocks[2].on.data.zero_())])
def test_another_value_is_another_program(place: str, change: Callable[[Counted], Any]) -> None:
    torch.manual_seed(0)
    model, x = Counted(place).eval().requires_grad_(False), torch.randn(1, N, D)
    assert exact(model, x)
    first = captured(model, (x,), {})
    assert find(model, (x,), {}) is first
    with torch.no_grad():
        change(model)
    assert find(model, (x,), {}) is None
    assert exact(model, x)


def test_an_artifact_of_what_depends_on_a_buffer_is_refused(tmp_path: Any) -> None:
    from xdit_compile import export

    with pytest.raises(XditError, match="reads the values of times"):
        export(Counted("buffer").eval().requires_grad_(False), "ulysses=2", (torch.randn(1, N, D),), tmp_path / "x")


# Blocks that hold their own number.


class Numbered(nn.Module):
    """A block with its place among the others, and what it does with it."""

    default = 3

    def __init__(self, i: int, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.i, self.name, self.use = nn.Linear(D, 3 * D), i, f"block {i}", use
        self.held = Holder(i)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.use(self, x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Holder:
    def __init__(self, i: int) -> None:
        self.i, self.limit = i, 5

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.i


class Stack(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Numbered(i, use) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def unused(block: Any, x: Tensor) -> Tensor:
    return x * block.default * block.held.limit


def alternating(block: Any, x: Tensor) -> Tensor:
    return x * 2 if getattr(block, "i", 0) % 2 else x


def through_dict(block: Any, x: Tensor) -> Tensor:
    return x * (1 + vars(block)["i"])


def by_name(block: Any, x: Tensor) -> Tensor:
    return -x if block.name.endswith("2") else x


def counted_up(block: Any, x: Tensor) -> Tensor:
    block.held.i += 0
    return x * block.held.i


@pytest.mark.parametrize("use", [
    unused, alternating, through_dict, by_name, counted_up, lambda block, x: block.held.scaled(x),
    lambda block, x: x * (1 + block.i)])
def test_numbers_part_blocks_that_read_them_only(use: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Stack(use).eval().requires_grad_(False), torch.randn(1, N, D)
    before = [dict(vars(b)) for b in model.blocks]
    names = [name for name, _ in capture(model, (x,)).functions()]
    assert (names == ["main", "blocks"]) is (use is unused)
    assert exact(model, x)
    assert [dict(vars(b)) for b in model.blocks] == before and "i" not in vars(Numbered) and Numbered.default == 3


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Any]] = {
    "get_float32_matmul_precision": (lambda: torch.get_float32_matmul_precision() == "high",
                                     torch.set_float32_matmul_precision, "high"),
    "are_deterministic_algorithms_enabled": (lambda: torch.are_deterministic_algorithms_enabled(),
                                             torch.use_deterministic_algorithms, True),
    "is_deterministic_algorithms_warn_only_enabled": (
        lambda: torch.is_deterministic_algorithms_warn_only_enabled(),
        lambda on: torch.use_deterministic_algorithms(on, warn_only=bool(on)), True),
    "flash_sdp_enabled": (lambda: not torch.backends.cuda.flash_sdp_enabled(),
                          lambda off: torch.backends.cuda.enable_flash_sdp(off != True), True),  # noqa: E712
    "get_deterministic_debug_mode": (lambda: torch.get_deterministic_debug_mode() > 0,
                                     torch.set_deterministic_debug_mode, 1),
}
BEFORE: dict[str, Any] = {"get_float32_matmul_precision": "highest", "get_deterministic_debug_mode": 0}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_pytorch_that_forward_asks_for(name: str) -> None:
    asked, put, value = SETTINGS[name]

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if asked() else x

    model, x = Asks(), torch.ones(2)
    program = captured(model, (x,), {})
    assert find(model, (x,), {}) is program
    put(value)
    try:
        assert find(model, (x,), {}) is None
        assert captured(model, (x,), {}) is not program
    finally:
        put(BEFORE.get(name, False))
    assert find(model, (x,), {}) is program


def test_code_that_is_gone_hides_none_that_comes_to_lie_where_it_was() -> None:
    """What PyTorch and the like make for a moment, and models too."""
    def ran(name: str, i: int) -> Any:
        space: dict[str, Any] = {"__name__": name}
        exec(f"def made(): return {i}", space)
        space["made"]()
        return space.pop("made").__code__

    reads = Reads()
    with reads.recording():
        theirs = [(ran("torch.made", i), ran("model", i))[1] for i in range(100)]
    assert {id(code) for code in theirs} <= reads.codes.keys()


@pytest.mark.parametrize("name", ["torch", "torch.nn.modules.linear", "torchvision", "transformers", "zoo", "a",
                                  "model", "tor", None])
def test_layers_are_those_of_pytorch(name: str | None) -> None:
    code = (lambda: 0).__code__
    assert Ran(code, {"__name__": name}).is_layer is (name is not None and name.partition(".")[0] == "torch")


@pytest.mark.parametrize("cls", CONSTANTS)
def test_what_is_of_a_class_of_its_own_is_no_constant(cls: type) -> None:
    """It may hold more than its value, and that may change."""
    given = {torch.dtype: torch.float32, torch.device: "cpu", torch.layout: torch.strided}.get(cls)
    try:
        value = cls() if given is None else given if isinstance(given, cls) else cls(given)
    except TypeError:  # such that have fixed instances
        return
    assert constants(value)
    try:
        own = type("Own", (cls,), {})
    except TypeError:  # such that have no heirs
        return
    assert not constants(own())


def test_a_module_that_forward_imports_is_watched_but_not_what_its_import_does(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_forward.py").write_text(
        "import secrets\n\nNAME = secrets.randbelow(10)\nFACTOR = 2.0\n\n\ndef scaled(x):\n    return x * FACTOR\n\n\n"
        "def drawn():\n    return secrets.randbelow(10)\n\n\nTABLE = scaled(FACTOR)\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Importing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            import imported_by_forward

            return imported_by_forward.scaled(x) + imported_by_forward.TABLE

    model, x = Importing(), torch.ones(3)
    program = captured(model, (x,), {})
    assert find(model, (x,), {}) is program
    module = sys.modules["imported_by_forward"]
    for name in ("FACTOR", "TABLE"):
        monkeypatch.setattr(module, name, 3.0)
        assert find(model, (x,), {}) is None
        captured(model, (x,), {})
    # What only the import ran, and forward does now, is read now.
    monkeypatch.setattr(Importing, "forward", lambda self, x: x * module.drawn())
    with pytest.raises(XditError, match="randbelow"):
        capture(model, (x,))
