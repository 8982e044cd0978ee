"""Spoils artifacts in random ways, with hashes made good again, and sees what becomes of those who open them.

Each is loaded and, if it loads, called once, in a process with limits: 2 GB more than a good one needs, and 60 s.
Fine is: an error of this package; or, where the program is what it was, the same numbers; or, where a spoiled program
computes something else, results of the types and shapes that the artifact says. Weights stay what they were, always.
All else is a failure and printed: a crash, another exception, another shape, more memory or time.

    python tests/campaigns/artifacts.py --count 20000 --seed 0
    python tests/campaigns/artifacts.py --only 4711 --seed 0 --keep /tmp/spoiled     # one of them, again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import xdit_compile
from xdit_compile.errors import XditError
from xdit_compile.ir.pytree import flatten

sys.path.append(str(Path(__file__).parent))
from spoiling import Spoiled, spoil

MEMORY = 2 * 2**30
SECONDS = 60
BASES = {"alone": "ulysses=1", "exchanging": "cfg=2,ulysses=2", "stages": "pipefusion=2,patches=2",
         "waiting": "offload=block", "sharing": "tensor=2,ulysses=2,shard=2"}
"""What is spoiled. Those for several processes are read whole, for every rank, and not called."""
SHARES = {"alone": 0.5, "exchanging": 0.1, "stages": 0.1, "waiting": 0.2, "sharing": 0.1}
CALLED = ("alone", "waiting")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.modulation = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(c)[:, None].chunk(2, -1)
        both = torch.cat([text, self.norm(x) * (1 + scale) + shift], 1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(both).chunk(3, -1))
        made = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(made[:, text.shape[1]:])


class Model(nn.Module):
    """Small, with all that trusts indices: labels of a call, a table of positions, an order of tokens; and a
    convolution, text, and values made of numbers alone."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, width, 2, stride=2), nn.Linear(width, 16)
        self.labels, self.positions = nn.Embedding(10, width), nn.Embedding(16, width)
        self.time, self.text = nn.Linear(8, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.register_buffer("order", torch.randperm(16, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor,
                text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.enter(hidden_states).flatten(2).transpose(1, 2)
        x = x + self.positions(torch.tensor([0, 5, 3, 2, 1, 4, 7, 6, 8, 9, 15, 14, 13, 10, 11, 12]))
        x = x[:, self.order]
        angles = timestep[:, None] * torch.arange(1, 9)
        c = self.time(angles.sin()) + self.labels(labels)
        for block in self.blocks:
            x = block(x, c, self.text(text))
        return (self.leave(x).unflatten(1, (4, 4)),)


def inputs() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {"hidden_states": torch.randn(2, 4, 8, 8, generator=made), "timestep": torch.tensor([0.5, 0.5]),
            "labels": torch.tensor([3, 9]), "text": torch.randn(2, 3, 8, generator=made)}


def exported(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    model = Model().eval()
    return {name: xdit_compile.export(model, spec, inputs(), folder / name, weights="included")
            for name, spec in BASES.items()}


def held(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Its weights, and shares of them."""
    shares = (model.runners["forward"].store or {}).items()
    return [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers(), *shares) if not t.is_meta]


class Trial:
    """Opens what was spoiled, in a process that may end by it."""

    def __init__(self, good: dict[str, Path], scratch: Path, seed: int, keep: Path | None) -> None:
        self.good, self.scratch, self.seed, self.keep = good, scratch, seed, keep
        with torch.no_grad():
            self.expected = {name: flatten(xdit_compile.load(good[name])(**inputs()))[0] for name in CALLED}

    def prepare(self, number: int) -> str:
        """Spoil an artifact; returns what was done to it."""
        chance = random.Random(f"{self.seed} {number}")
        (self.base,) = chance.choices(list(SHARES), list(SHARES.values()))
        self.path = self.scratch / "spoiled.xdit"
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.good[self.base], self.path)
        self.what = spoil(self.path, chance)
        if self.keep:
            shutil.rmtree(self.keep, ignore_errors=True)
            shutil.copytree(self.path, self.keep, symlinks=True)
        return f"{self.base}: {self.what.said}"

    def run(self) -> str:
        """The verdict on it."""
        try:
            return self._opened(self.path, self.what) if self.base in CALLED else self._read(self.path)
        except XditError:
            return "refused"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"FAILED {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"

    def _read(self, path: Path) -> str:
        xdit_compile.inspect(path, check_all=True)
        return "read"

    def _opened(self, path: Path, what: Spoiled) -> str:
        model = xdit_compile.load(path)
        before = {name: t.clone() for name, t in held(model)}
        try:
            with torch.no_grad():
                results = flatten(model(**inputs()))[0]
        except TypeError as error:
            if "argument" in str(error):  # another signature: the caller's own call does not fit
                return "refused"
            raise
        finally:
            for name, tensor in held(model):
                if not torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)):
                    raise AssertionError(f"{name} was written into")
        if what.neutral:
            if not all(map(torch.equal, results, self.expected[self.base])):
                raise AssertionError("other numbers, though the program is what it was")
            return "exact"
        call = json.loads((path / "manifest.json").read_text())["calls"]
        looks = [[(tuple(r["shape"]), getattr(torch, r["dtype"])) for r in c["results"]] for c in call]
        if [(tuple(r.shape), r.dtype) for r in results] not in looks:
            raise AssertionError(f"results are {[list(r.shape) for r in results]}")
        return "ran"


class Sandbox:
    """A process that opens one spoiled artifact after the other, and is replaced when it ends."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.pid = 0

    def run(self, number: int) -> tuple[str, str]:
        if not self.pid:
            self._start()
        os.write(self.orders, f"{number}\n".encode())
        text, end = b"", time.monotonic() + SECONDS
        while text.count(b"\n") < 2:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            piece = os.read(self.answers, 2**16) if ready else b""
            if not piece:
                return self._ended(bool(ready)), text.decode()
            text += piece
        said, verdict = map(json.loads, text.splitlines())
        return verdict, said

    def _start(self) -> None:
        order_in, self.orders = os.pipe()
        self.answers, answer_out = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(order_in)
            os.close(answer_out)
            return
        os.close(self.orders)
        os.close(self.answers)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        try:
            with open(order_in) as orders:
                for line in orders:
                    os.write(answer_out, (json.dumps(self.trial.prepare(int(line))) + "\n").encode())
                    os.write(answer_out, (json.dumps(self.trial.run()) + "\n").encode())
        finally:
            os._exit(1)  # what the parent would clean up is not this process's

    def _ended(self, itself: bool) -> str:
        """Why the process did not answer."""
        if not itself:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.close()
        if not itself:
            return f"FAILED: no end within {SECONDS} s"
        return f"FAILED: the process ended ({signal.strsignal(status & 127) if status & 127 else status >> 8})"

    def close(self) -> None:
        if self.pid:
            os.close(self.orders)
            os.close(self.answers)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0


@contextlib.contextmanager
def campaign(seed: int, keep: Path | None = None) -> Iterator[Callable[[int], tuple[str, str]]]:
    """What tries one spoiled artifact, by its number."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        sandbox = Sandbox(Trial(exported(Path(name)), Path(name), seed, keep))
        try:
            yield sandbox.run
        finally:
            sandbox.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--start", type=int, default=0, help="the number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this one alone")
    parser.add_argument("--keep", type=Path, help="leave what was spoiled there")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(options.start, options.start + options.count) if options.only is None else [options.only]
    counts: Counter[str] = Counter()
    failures: list[Any] = []
    slowest, begun = 0.0, time.monotonic()
    with campaign(options.seed, options.keep) as run:
        for number in tqdm(numbers, unit="artifact", mininterval=5):
            start = time.monotonic()
            verdict, said = run(number)
            slowest = max(slowest, time.monotonic() - start)
            counts[verdict.split()[0].rstrip(":")] += 1
            if verdict.startswith("FAILED") or options.only is not None:
                failures.append([number, verdict, said])
                print(f"{number}: {verdict} [{said[:300]}]", flush=True)
    figures = {**counts, "seconds": round(time.monotonic() - begun, 1), "slowest": round(slowest, 2)}
    print(json.dumps(figures) if options.json else ", ".join(f"{n} {k}" for k, n in figures.items()))
    sys.exit(counts["FAILED"] > 0)


if __name__ == "__main__":
    main()
