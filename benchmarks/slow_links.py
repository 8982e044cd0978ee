"""What displaced sequences and low-bit wires gain on slow links: seconds of a step, and bytes, against plain ulysses.

Two network namespaces, joined by a link of a chosen rate, are machines of one thread each; torchrun runs a random DiT
on them over gloo, in fp32. All specs take turns in one run at each rate. Needs root, ip and tc.

    python benchmarks/slow_links.py                           # four rates: about seven minutes on quiet cores
    python benchmarks/slow_links.py --rates 50mbit 100mbit
    python benchmarks/slow_links.py --width 128 --layers 2 --rates 20mbit     # half a minute
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from links import Scale, build
from shaped_network import Network
from tqdm import tqdm

import xdit_compile
from xdit_compile.report.traffic import collectives

RATES = ("20mbit", "50mbit", "100mbit", "200mbit")
EXACT = "ulysses=2"
SPECS = (EXACT, "ulysses=2,displaced=yes", "ulysses=2,wire=fp8", "ulysses=2,wire=int8")


@dataclass(frozen=True)
class Found:
    """One spec at one rate: seconds of each step after the first, and bytes that a rank sends in one."""

    rate: str
    spec: str
    steps: tuple[float, ...]
    sent: int

    @property
    def seconds(self) -> float:
        return median(self.steps)


def worker(job: Path) -> None:
    """What one machine does: runs each spec."""
    warnings.simplefilter("ignore")
    asked = json.loads(job.read_text())
    scale = Scale(**asked["scale"])
    xdit_compile.init_from_env()
    torch.set_num_threads(1)
    model, given = build(scale)
    models = {spec: xdit_compile.parallelize(model, spec) for spec in asked["specs"]}
    for parallel in models.values():
        steps(parallel, given, 2)  # captures, plans, connects
    taken: dict[str, list[float]] = {spec: [] for spec in models}
    for _ in range(scale.loops):
        for spec, parallel in models.items():
            taken[spec] += steps(parallel, given, scale.steps)
    if dist.get_rank() == 0:
        sent = {}
        for spec, parallel in models.items():
            (ready,) = parallel.runners["forward"].programs.values()
            sent[spec] = sum(c.sent for c in collectives(ready.compiled.body))
        job.with_suffix(".found").write_text(json.dumps({"taken": taken, "sent": sent}))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def steps(model: Any, given: dict[str, Any], count: int) -> list[float]:
    """A loop of so many steps: seconds of each but the first, of which all caches are empty."""
    x, taken = given["hidden_states"], []
    for step in range(count):
        start = time.perf_counter()
        out = model(**given | {"hidden_states": x, "timestep": torch.tensor([900 - 100 * step])}, return_dict=False)[0]
        x = x - 0.1 * out[:, :4]
        taken.append(time.perf_counter() - start)
    dist.barrier()
    return taken[1:]


def run(rates: Sequence[str], specs: Sequence[str], scale: Scale, patience: float = 600.0) -> list[Found]:
    """All specs at all rates.

    Raises:
        Unavailable: namespaces cannot be made here.
    """
    found = []
    with Network(2) as net, tempfile.TemporaryDirectory() as folder:
        for rate in tqdm(rates, "rates", disable=not sys.stderr.isatty()):
            net.shape(rate)
            job = Path(folder) / "job.json"
            job.write_text(json.dumps({"scale": asdict(scale), "specs": list(specs)}))
            net.torchrun([sys.executable, __file__, "--worker", str(job)], patience)
            answer = json.loads(job.with_suffix(".found").read_text())
            found += [Found(rate, s, tuple(answer["taken"][s]), answer["sent"][s]) for s in specs]
    return found


def page(found: Sequence[Found]) -> str:
    """A table: of each rate, how many times as fast a step is as with the first spec."""
    lines = ["| link | spec | MB a rank sends | of the first | s a step | times as fast |",
             "|---:|---|---:|---:|---:|---:|"]
    for f in found:
        first = next(g for g in found if g.rate == f.rate)
        lines.append(f"| {f.rate} | `{f.spec}` | {f.sent / 1e6:.2f} | {f.sent / first.sent:.2f} | {f.seconds:.2f} | "
                     f"{first.seconds / f.seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/slow_links.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", metavar="RATE", default=RATES, help="in tc's words, or unlimited")
    parser.add_argument("--specs", nargs="+", metavar="SPEC", default=SPECS, help="others are compared with the first")
    parser.add_argument("--width", type=int, default=1152, help="features of a token, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="of the sample, in latents, of which two make a token")
    parser.add_argument("--steps", type=int, default=5, help="of a loop")
    parser.add_argument("--loops", type=int, default=1, help="of each spec, in turns")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
    else:
        scale = Scale(asked.width, asked.layers, asked.side, asked.steps, asked.loops)
        print(page(run(asked.rates, asked.specs, scale)))


if __name__ == "__main__":
    main()
