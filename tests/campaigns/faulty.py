"""A tiny pipeline on a few ranks, one of which fails in a chosen way at a chosen moment; what each of them saw."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import xdit_compile
from xdit_compile.driver.captured_programs import CapturedPrograms
from xdit_compile.errors import RankFailure, RankMismatch
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.spec import ShardingSpec

TIMEOUT = 8.0
"""Seconds that a rank waits for another."""

SLOW = 1.5
STEPS = 3


class Cancelled(Exception):
    """What a server raises to end a request."""


@dataclass(frozen=True)
class Case:
    """Which ranks fail, how and when; ``spec`` decides how many there are."""

    spec: str
    fault: str
    moment: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.spec}: {self.fault} at {self.moment} on {','.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Seen:
    """What a rank saw: for each thing it did, "right", or the error, and after how many seconds."""

    doings: tuple[tuple[str, str, float], ...]

    def last(self) -> str:
        return self.doings[-1][1]


class Block(nn.Module):
    """Attention and nothing else, over (batch, tokens, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (6, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Denoiser(nn.Module):
    """Six blocks, so that three stages have some each."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 24), nn.Linear(24, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, sample: Tensor, timestep: Tensor, label: str = "") -> Tensor:
        y = self.enter(sample) * self.scale * timestep[:, None, None]
        for block in self.blocks:
            y = block(y)
        return self.leave(y)


class Decoder(nn.Module):
    """From (batch, 6, height, width) to a picture of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(6, 3, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.body(x), scale_factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(x)


class Pipeline:
    """Denoises with guidance in two calls, calls back, decodes."""

    def __init__(self) -> None:
        self.transformer, self.vae = Denoiser().eval(), Decoder().eval()

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "vae": self.vae}

    def __call__(self, sample: Tensor, steps: int = STEPS, callback: Callable[..., Any] | None = None) -> Tensor:
        for step in range(steps, 0, -1):
            time_now = torch.full((1,), float(step))
            one = self.transformer(sample, time_now)
            other = self.transformer(0.5 * sample, time_now)
            happen("scheduler")
            sample = sample - 0.1 * (one + 2.0 * (one - other))
            if callback is not None:
                callback(self, step, sample)
        happen("decode")
        return self.vae.decode(sample.transpose(1, 2).unflatten(-1, (4, 8)))


_happens: dict[str, Callable[[], None]] = {}


def happen(moment: str) -> None:
    """What was planned for this moment, once."""
    _happens.pop(moment, lambda: None)()


def _strike(fault: str) -> None:
    if fault in ("exception", "cancelled"):
        raise Cancelled("by the user") if fault == "cancelled" else ValueError("bad weather")
    if fault == "memory":
        raise MemoryError("no memory")
    if fault == "interrupt":
        raise KeyboardInterrupt
    if fault == "exit":
        sys.exit(3)
    if fault == "slow":
        time.sleep(SLOW)
    if fault in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def scene(case: Case) -> Seen:
    """Make the pipeline parallel, call it twice, then once more; the fault is somewhere in between."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    plain, pipe = Pipeline(), Pipeline()
    for name in ("transformer", "vae"):
        getattr(pipe, name).load_state_dict(getattr(plain, name).state_dict())
    sample = torch.randn(1, 32, 6)
    _happens.clear()
    expected = plain(sample)
    mine = dist.get_rank() in case.ranks
    doings: list[tuple[str, str, float]] = []

    def do(what: str, action: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result, said = None, "right"
        try:
            result = action()
            if isinstance(result, Tensor) and not _close(case, result, expected):
                said = f"WRONG by {(result - expected).abs().max().item():.3g}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        doings.append((what, said, time.monotonic() - start))
        return result

    if mine:
        _plan(case)
    try:
        do("joining", lambda: happen("joining"))
        parallel = None
        if doings[-1][1] == "right":
            parallel = do("parallelize", lambda: xdit_compile.parallelize(
                pipe, case.spec, timeout=TIMEOUT, ranks=range(ShardingSpec.parse(case.spec).world_size)))
        if parallel is not None:
            _calls(case, parallel, pipe, sample, mine, do)
    finally:
        ControlPlane._connect, Executor.__call__ = _CONNECT, _EXECUTE  # type: ignore[method-assign]
        CapturedPrograms.make = _MAKE  # type: ignore[method-assign]
        _happens.clear()
    return Seen(tuple(doings))


def _calls(case: Case, parallel: Any, pipe: Any, sample: Tensor, mine: bool, do: Callable[..., Any]) -> None:
    given = {"sample": sample, "steps": STEPS}
    if case.fault == "mismatch" and mine:
        given |= _OTHERWISE[case.moment](sample, pipe)
    do("first call", lambda: parallel(**given, callback=_called_back))
    if strike := _happens.pop("steady", None):
        _happens["scheduler"] = strike
    if case.fault == "mismatch":
        torch.manual_seed(0)
        pipe.transformer.scale.fill_(1.0)
    do("between", lambda: happen("between"))
    do("second call", lambda: parallel(sample, callback=_called_back))
    do("third call", lambda: parallel(sample))
    do("closing", lambda: (happen("closing"), parallel.parallel_group.control.close()))


def _called_back(*_: Any) -> None:
    happen("callback")


def _close(case: Case, a: Tensor, b: Tensor) -> bool:
    # Patches read what they had a step before: a wrong picture is told by its size.
    return a.shape == b.shape and torch.allclose(a, b, atol=0.5 if "pipefusion" in case.spec else 1e-4)


# Not in the model's own code: what that reads is its state, and it may not differ on one rank.
_CONNECT, _EXECUTE, _MAKE = ControlPlane._connect, Executor.__call__, CapturedPrograms.make


def _plan(case: Case) -> None:
    """Let the fault happen at its moment."""
    moment = {"steady call": "steady"}.get(case.moment, case.moment)
    _happens[moment] = lambda: _strike(case.fault)

    def connect(self: ControlPlane, *args: Any) -> Any:
        happen("parallelize")
        return _CONNECT(self, *args)

    def execute(self: Executor, *args: Any, **kwargs: Any) -> Any:
        happen("collective")
        return _EXECUTE(self, *args, **kwargs)

    def make(self: CapturedPrograms, *args: Any) -> Any:
        happen("capture")
        return _MAKE(self, *args)

    ControlPlane._connect, Executor.__call__ = connect, execute  # type: ignore[method-assign]
    CapturedPrograms.make = make  # type: ignore[method-assign]


_OTHERWISE: dict[str, Callable[[Tensor, Any], dict[str, Any]]] = {
    "value": lambda x, pipe: {"sample": x + 1},
    "shape": lambda x, pipe: {"sample": x[:, :16]},
    "dtype": lambda x, pipe: {"sample": x.double()},
    "steps": lambda x, pipe: {"steps": STEPS + 1},
    "seed": lambda x, pipe: [torch.manual_seed(7), {}][1],  # type: ignore[dict-item]
    "weights": lambda x, pipe: [pipe.transformer.blocks[1].qkv.weight.mul_(1.5), {}][1],  # type: ignore[dict-item]
    "buffer": lambda x, pipe: [pipe.transformer.scale.fill_(2.0), {}][1],  # type: ignore[dict-item]
}

MISMATCHES = tuple(_OTHERWISE)
ERRORS = (RankFailure.__name__, RankMismatch.__name__)
