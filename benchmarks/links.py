"""What do links cost? A denoising loop on several machines that are joined by links of ten speeds, for each spec.

The machines are network namespaces of this one (`shaped_network.py`; Linux, as root), one thread each, under torchrun
on gloo. The model is a random Flux; each step is a batch of two, as guidance makes it; the same loop for every spec.

    python benchmarks/links.py
    python benchmarks/links.py --rates 50mbit 1gbit --specs ulysses=2 cfg=2 --json links.json
    python benchmarks/links.py --machines 4 --specs ulysses=4 cfg=2,ulysses=2 cfg=2,pipefusion=2

Seconds are those of a step of the loop, its first one (PipeFusion's warm-up) included, the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flux
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from shaped_network import UNLIMITED, Network
from timing import time_once
from torch import Tensor

from xdit_compile import parallelize
from xdit_compile.runtime.deferred.deferred_tensor import materialize

RATES = ("20mbit", "50mbit", "100mbit", "200mbit", "400mbit", "800mbit", "1600mbit", "3gbit", "6gbit", UNLIMITED)
SPECS = ("ulysses=2", "ring=2", "cfg=2", "tensor=2", "pipefusion=2,patches=4")
WAIT = 900.0


def batch_of_two(size: flux.Size) -> dict[str, Any]:
    """Inputs of one forward with guidance: two texts, one sample."""
    made = flux.inputs(size)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"):
        if isinstance(made.get(name), Tensor):
            made[name] = made[name].repeat(2, *[1] * (made[name].dim() - 1))
    made["encoder_hidden_states"][1].mul_(0.5)
    return made


@torch.no_grad()
def loop(model: Any, inputs: dict[str, Any], steps: int) -> Tensor:
    """The sample after so many steps of guidance at 2."""
    sample = inputs["hidden_states"]
    for i in range(steps):
        times = torch.full((2,), 1.0 - i / steps)
        (out,) = model(**inputs | {"hidden_states": sample, "timestep": times})
        plain, guided = out.chunk(2)
        sample = sample - (guided + 2.0 * (plain - guided)).repeat(2, 1, 1) / steps
    return materialize(sample)


def work(folder: Path) -> None:
    """What each machine runs, under torchrun: for each speed of the links, once it is set, every spec in turn."""
    asked = json.loads((folder / "asked.json").read_text())
    dist.init_process_group("gloo")
    size = flux.Size(*asked["size"])
    inputs, steps = batch_of_two(size), asked["steps"]
    expected = loop(flux.model(size), inputs, steps)
    models, taken = {}, []
    for spec in asked["specs"]:
        models[spec] = parallelize(flux.model(size), spec)
        error = (loop(models[spec], inputs, steps) - expected).abs().max().item()
        if "pipefusion" not in spec and error > 1e-4:
            raise RuntimeError(f"{spec} differs by {error:.1e} from one device")
    for number, rate in enumerate(asked["rates"]):
        (folder / f"wanted-{number}-{dist.get_rank()}").touch()
        _wait_for(folder / f"set-{number}")
        for turn in range(asked["rounds"]):
            for spec, model in models.items():
                made = time_once(lambda model=model: loop(model, inputs, steps))
                taken.append({"rate": rate, "spec": spec, "round": turn, "step": made.seconds / steps,
                              "others": made.others})
    if dist.get_rank() == 0:
        (folder / "taken.json").write_text(json.dumps(taken))
    dist.destroy_process_group()


def _wait_for(path: Path) -> None:
    for _ in range(int(WAIT * 20)):
        if path.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(f"{path.name} did not come in {WAIT:.0f} s")


def measure(asked: dict[str, Any], machines: int) -> list[dict[str, Any]]:
    """Start the machines, set the speeds they ask for, one after the other, and take their figures."""
    from threading import Event, Thread

    over = Event()
    with TemporaryDirectory() as name, Network(machines) as network:
        folder = Path(name)
        (folder / "asked.json").write_text(json.dumps(asked))

        def shape() -> None:
            for number, rate in enumerate(asked["rates"]):
                while not all((folder / f"wanted-{number}-{rank}").exists() for rank in range(machines)):
                    if over.wait(0.05):
                        return
                network.shape(rate)
                (folder / f"set-{number}").touch()
                print(f"links: {rate}", file=sys.stderr)

        setting = Thread(target=shape, daemon=True)
        setting.start()
        try:
            network.torchrun([sys.executable, __file__, "--folder", name], patience=asked["patience"])
        finally:
            over.set()
            setting.join()
        return json.loads((folder / "taken.json").read_text())


def table(taken: list[dict[str, Any]], specs: list[str], rates: list[str]) -> Table:
    made = Table("links", *specs, title="milliseconds a step; the fastest in bold")
    for rate in rates:
        medians = [statistics.median(t["step"] for t in taken if (t["rate"], t["spec"]) == (rate, spec))
                   for spec in specs]
        made.add_row(rate, *(f"[bold]{m * 1e3:.0f}[/]" if m == min(medians) else f"{m * 1e3:.0f}" for m in medians))
    made.caption = f"others' share of the machine: {statistics.mean(t['others'] for t in taken):.0%}"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="in tc's words (default: %(default)s)")
    parser.add_argument("--specs", nargs="+", default=list(SPECS), help="default: %(default)s")
    for name, default in (("tokens", 768), ("text", 128), ("hidden", 384), ("double", 1), ("single", 3),
                          ("steps", 4), ("rounds", 3), ("patience", 3600)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.folder:
        return work(options.folder)
    asked = {"size": [options.tokens, options.text, options.hidden, options.double, options.single],
             **{name: getattr(options, name) for name in ("rates", "specs", "steps", "rounds", "patience")}}
    taken = measure(asked, options.machines)
    Console().print(table(taken, options.specs, options.rates))
    if options.json:
        options.json.write_text(json.dumps(taken, indent=1))
    return None


if __name__ == "__main__":
    main()
