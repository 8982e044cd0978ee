"""Measures what a device does by itself. Ranks measure at the same time, and what counts is how long the slowest of
them takes, as in a run, where they wait for each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from statistics import mean

import torch
import torch.distributed as dist

from xdit_compile.planner.work import VIEW

SPENT, LONG = 0.25, 1.0
"""Seconds that each measurement goes on for at least; and one of a difference, which needs more."""

LEAST, MOST = 8, 256
"""Times that a thing is measured."""

KEPT = 24 << 20
"""Bytes that are taken and given back first: after that glibc keeps what is freed, as in a process that has worked for
a while, and does not have the kernel clear pages for each result."""

CACHE = 4 << 20
"""Bytes that are gone through between operators, whose code and data are then no longer in a CPU's own cache."""


class DeviceRates:
    """Rates of one device of this process. With several ranks all come to each method together."""

    def __init__(self, place: torch.device) -> None:
        self.place, self._cuda = place, place.type == "cuda"
        self._width = 4096 if self._cuda else 512
        torch.empty(KEPT, dtype=torch.uint8)

    def dtypes(self) -> list[torch.dtype]:
        """Those that models are run in here."""
        if not self._cuda:
            return [torch.float32]
        half = [torch.bfloat16] if torch.cuda.is_bf16_supported(including_emulation=False) else []
        return [torch.float32, torch.float16, *half]

    def products(self, dtype: torch.dtype) -> tuple[float, float]:
        """Operations per second of products, and bytes per second of weights that are packed for them. Those of many
        layers take turns, as in a model: they come from memory."""
        weights = [self._random(self._width, self._width).to(dtype) for _ in range(4 if self._cuda else 32)]
        bias = self._random(self._width).to(dtype)

        def product(rows: int) -> float:
            x = self._random(rows, self._width).to(dtype)

            def run() -> None:
                for w in weights:
                    torch.nn.functional.linear(x, w, bias)

            return self.seconds(run)

        much, flops = product(self._width), 2.0 * self._width**2 * len(weights)
        if self._cuda:
            return flops * self._width / much, math.inf
        few = self._width // 8
        little = product(few)
        rate = flops * (self._width - few) / max(much - little, 0.1 * much)
        return rate, 4.0 * self._width**2 * len(weights) / max(little - flops * few / rate, 1e-3 * little)

    def attention(self, dtype: torch.dtype) -> float:
        """Operations per second of attention."""
        q, k, v = (self._random(1, 8, self._width, 64).to(dtype) for _ in range(3))
        attend = torch.nn.functional.scaled_dot_product_attention
        return 4.0 * 8 * self._width**2 * 64 / self.seconds(lambda: attend(q, k, v))

    def moved(self) -> float:
        """Bytes per second of what stands between products: a norm, a modulation and a gate, each operator reading and
        writing its own."""
        x, scale = self._random(1, self._width, self._width), self._random(1, 1, self._width)

        def between() -> None:
            h = torch.nn.functional.layer_norm(x, x.shape[-1:]) * scale + scale
            x + scale * h

        return 11.0 * 4 * x.numel() / self.seconds(between)

    def functions(self, moved: float) -> float:
        """Values per second of GELU, besides that they are moved."""
        x = self._random(1, self._width, 4 * self._width)
        spent = self.seconds(lambda: torch.nn.functional.gelu(x, approximate="tanh"))
        return x.numel() / max(spent - 8.0 * x.numel() / moved, 1e-3 * spent)

    def launch(self) -> float:
        """Seconds of the host for an operator: what a block does, on next to no values. A view counts as in
        ``Work.launches``. Where the host is the device, data go through its cache between operators, as in a model."""
        x, w, b = (torch.zeros(*shape, device=self.place) for shape in ((1, 2, 16), (16, 16), (16,)))
        large = torch.zeros(0 if self._cuda else CACHE // 4)
        f = torch.nn.functional

        def then(result: torch.Tensor) -> torch.Tensor:
            if large.numel():
                large.mul_(1.0)
            return result

        def project(h: torch.Tensor) -> torch.Tensor:
            return then(f.linear(h, w, b))

        def modulate(h: torch.Tensor) -> torch.Tensor:
            return then(then(then(f.layer_norm(h, (16,))) * 1.5) + x)

        def block() -> None:
            h = modulate(x)
            q, k, v = (project(h).reshape(1, 2, 2, 8).transpose(1, 2) for _ in range(3))
            attended = then(f.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(1, 2, 16)
            h = then(x + then(project(attended) * 0.5))
            then(h + then(project(then(f.gelu(project(modulate(h))))) * 0.5))

        started, views = 18, 8

        def nothing() -> None:
            for _ in range(started):
                then(x)

        alone = self.seconds(nothing, LONG) if large.numel() else 0.0
        return max(self.seconds(block, LONG) - alone, 0.0) / (started + VIEW * views)

    def host_copy(self) -> float:
        """Bytes per second from the host's memory."""
        if not self._cuda:
            return 1e12
        x = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
        return x.numel() / self.seconds(lambda: x.to(self.place, non_blocking=True))

    def seconds(self, run: Callable[[], object], spent: float = SPENT) -> float:
        """What ``run`` takes in the mean, each time on the slowest rank."""
        found: list[float] = []
        with torch.no_grad():
            self._once(run)
            self._once(run)
            while len(found) < MOST and sum(found) < spent:  # as often on all ranks
                found += self.slowest([self._once(run) for _ in range(LEAST)])
        return mean(found)

    def seconds_after_work(self, run: Callable[[], object]) -> float:
        """What ``run`` takes where it follows a product, as an exchange does in a model: ranks come to it at times that
        differ, and not with all in their caches."""
        work, alone = self._work

        def both() -> None:
            work()
            run()

        together = self.seconds(both, LONG)
        return max(together - alone, 0.02 * together)

    @cached_property
    def _work(self) -> tuple[Callable[[], object], float]:
        """A product, and what it takes."""
        x, w = self._random(2 * self._width, self._width), self._random(self._width, self._width)

        def work() -> object:
            return torch.nn.functional.linear(x, w)

        return work, self.seconds(work, LONG)

    def slowest(self, seconds: list[float]) -> list[float]:
        """Of each, the largest of all ranks."""
        if not dist.is_initialized():
            return seconds
        found = torch.tensor(seconds, dtype=torch.float64, device=self.place)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def _once(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if self._cuda:
            torch.cuda.synchronize(self.place)
        return time.perf_counter() - start

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.place)
