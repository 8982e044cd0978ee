"""What the planner predicts for machines with slow and fast links between them, and what they take.

Two to four network namespaces, joined by links of a chosen rate, are machines of one thread each; torchrun runs a
mid-size model on them over gloo, and compares it with one device. For each rate the machines are measured as
`xdit-compile calibrate` does, each spec is predicted from that and timed, in one run. Needs root, ip and tc.

    python benchmarks/links.py --output docs/links.md      # ten rates, two machines: a quarter of an hour
    python benchmarks/links.py --machines 4 --rates 50mbit 1gbit
    python benchmarks/links.py --quick        # a small model, two rates: a minute
    python benchmarks/links.py --rates 20mbit --json a.json
    python benchmarks/links.py --measured a.json b.json      # the page of what was measured before, predicted anew
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from shaped_network import UNLIMITED, Network, Unavailable
from torch import nn
from tqdm import tqdm

import xdit_compile
from xdit_compile.planner.calibrate import measure, written
from xdit_compile.planner.costs import Loop
from xdit_compile.planner.machine import read
from xdit_compile.planner.plan import Planner, Question
from xdit_compile.spec import ShardingSpec

RATES = ("20mbit", "50mbit", "100mbit", "200mbit", "400mbit", "800mbit", "1600mbit", "3gbit", "6gbit", UNLIMITED)

SPECS = {
    2: ("ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2", "pipefusion=2,patches=4"),
    3: ("ulysses=3", "ring=3", "pipefusion=3,patches=3"),
    4: ("ulysses=4", "ring=4", "ulysses=2,ring=2", "cfg=2,ulysses=2", "cfg=2,ring=2", "pipefusion=4,patches=4",
        "cfg=2,pipefusion=2,patches=2", "pipefusion=2,ulysses=2,patches=2"),
}

CALLS = 2
"""Of the model in each step: with a condition and without."""

SAME = 1e-4
"""How much of a sample may differ from that of one device, but where patches are read as they were a step before."""

NEAR, CLOSE = 1.05, 0.20
"""How much slower than the fastest a pick may be, and by how much a prediction may be wrong."""


@dataclass(frozen=True)
class Scale:
    """Sizes of what is run: of the model, and how long."""

    width: int = 384
    layers: int = 8
    side: int = 48
    steps: int = 4
    loops: int = 3


__all__ = ["QUICK", "Unavailable", "page", "run"]

QUICK = Scale(width=128, layers=4, side=24, steps=3, loops=2)


@dataclass(frozen=True)
class Found:
    """One spec at one rate: seconds of a loop, predicted and measured (of each repetition), and the machine's file
    that the prediction is made from."""

    rate: str
    spec: str
    predicted: float
    measured: tuple[float, ...]
    machine: str = ""

    @property
    def seconds(self) -> float:
        return median(self.measured)

    @property
    def error(self) -> float:
        return self.predicted / self.seconds - 1


def build(scale: Scale) -> tuple[nn.Module, dict[str, Any]]:
    """The model, the same on every machine, and the arguments of one call."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=scale.width // 64, attention_head_dim=64, in_channels=4,
                                  num_layers=scale.layers, sample_size=scale.side, num_embeds_ada_norm=10)
    given = {"hidden_states": torch.randn(1, 4, scale.side, scale.side), "timestep": torch.tensor([900]),
             "class_labels": torch.tensor([1])}
    return model.eval().requires_grad_(False), given


def loop(model: Any, given: dict[str, Any], scale: Scale) -> torch.Tensor:
    """Denoising with guidance in two calls, as a pipeline does it."""
    x = given["hidden_states"]
    labels = torch.tensor([1]), torch.tensor([10])
    for step in range(scale.steps):
        when = torch.tensor([900 - 100 * step])
        one, other = (model(hidden_states=x, timestep=when, class_labels=c, return_dict=False)[0][:, :4]
                      for c in labels)
        x = x - 0.1 * (other + 3.0 * (one - other))
    return x + 0


def worker(job: Path) -> None:
    """What one machine does: is measured, and runs each spec."""
    warnings.simplefilter("ignore")
    asked = json.loads(job.read_text())
    scale = Scale(**asked["scale"])
    xdit_compile.init_from_env()
    torch.set_num_threads(1)
    toml = written(measure())
    taken: dict[str, list[float]] = {spec: [] for spec in asked["specs"]}
    model, given = build(scale)
    with torch.no_grad():
        expected = loop(model, given, scale)
        parallel = {spec: xdit_compile.parallelize(build(scale)[0], spec) for spec in taken}
        for spec, one in parallel.items():
            error = (loop(one, given, scale) - expected).abs().max().item()  # captures, plans, connects
            if error > SAME and ShardingSpec.parse(spec).pipefusion_degree == 1:
                raise RuntimeError(f"{spec} differs by {error:.1e} from one device")
        for _ in range(scale.loops):  # specs take turns: cores are not always equally fast
            for spec, one in parallel.items():
                dist.barrier()
                start = time.perf_counter()
                loop(one, given, scale)
                dist.barrier()
                taken[spec].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        job.with_suffix(".found").write_text(json.dumps({"toml": toml, "taken": taken}))
    dist.barrier()
    dist.destroy_process_group()


def run(machines: int, rates: Sequence[str], specs: Sequence[str], scale: Scale,
        patience: float = 3600.0) -> list[Found]:
    """All specs at all rates.

    Raises:
        Unavailable: namespaces cannot be made here.
    """
    found = []
    with Network(machines) as net, tempfile.TemporaryDirectory() as folder:
        for rate in tqdm(rates, "rates", disable=not sys.stderr.isatty()):
            net.shape(rate)
            job = Path(folder) / "job.json"
            job.write_text(json.dumps({"scale": asdict(scale), "specs": list(specs)}))
            net.torchrun([sys.executable, __file__, "--worker", str(job)], patience)
            answer = json.loads(job.with_suffix(".found").read_text())
            found += [Found(rate, spec, 0.0, tuple(answer["taken"][spec]), answer["toml"]) for spec in specs]
    return predicted(found, scale)


def predicted(found: Sequence[Found], scale: Scale) -> list[Found]:
    """The same with what the planner says of each."""
    planner = Planner(xdit_compile.capture(*build(scale)), model="the model")
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for one in found:
            toml = Path(folder) / "machine.toml"
            toml.write_text(one.machine)
            spec = ShardingSpec.parse(one.spec)
            question = Question(read(toml), spec.world_size, Loop(scale.steps, CALLS, 1))
            made.append(replace(one, predicted=planner.option(spec, question).seconds.total))
    return made


HEAD = """\
# The planner against machines with links of a chosen speed

    python benchmarks/links.py --output docs/links.md      # as root

Two network namespaces, each a machine of one thread, joined by a link that lets through so much in each direction. At
each rate the machines are measured as `xdit-compile calibrate` does, and a DiT (width 384, 8 layers, 576 tokens, fp32)
denoises for four steps with guidance in two calls, under each spec: seconds of the loop by the plan, and the median of
three. Every spec's samples were compared with those of one device. An error below zero: it takes longer than planned.

"""


def page(found: Sequence[Found]) -> tuple[str, bool]:
    """A table, and whether the planner's promise is kept."""
    lines = ["| links | spec | predicted | measured | error | |", "|---:|---|---:|---:|---:|---|"]
    kept = 0
    rates = list(dict.fromkeys(f.rate for f in found))
    for rate in rates:
        here = [f for f in found if f.rate == rate]
        fastest, pick = min(f.seconds for f in here), min(here, key=lambda f: f.predicted)
        good = pick.seconds <= NEAR * fastest
        kept += good
        for f in here:
            marks = [*(["picked" if good else "picked, and slower than the fastest"] if f is pick else []),
                     *(["fastest"] if f.seconds == fastest else [])]
            lines.append(f"| {rate} | {f.spec} | {f.predicted:.2f} s | {f.seconds:.2f} s | {f.error:+.0%} | "
                         f"{', '.join(marks)} |")
    close = sum(abs(f.error) <= CLOSE for f in found)
    lines += ["", f"The pick is the fastest or within {NEAR - 1:.0%} of it at {kept} of {len(rates)} rates; "
                  f"{close} of {len(found)} predictions are within {CLOSE:.0%}."]
    return "\n".join(lines), kept >= 0.9 * len(rates) and close == len(found)


def main() -> int:
    options = _options()
    if options.worker:
        worker(options.worker)
        return 0
    scale, rates = (QUICK, ("50mbit", UNLIMITED)) if options.quick else (Scale(), RATES)
    if options.measured:
        before = [Found(**one) for file in options.measured for one in json.loads(file.read_text())]
        found = predicted(before, scale)
    else:
        found = run(options.machines, options.rates or rates, options.specs or SPECS[options.machines], scale)
    text, good = page(found)
    if options.output:
        options.output.write_text(HEAD + text + "\n")
    else:
        print(text)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in found], indent=2) + "\n")
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/links.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, choices=sorted(SPECS), default=2)
    parser.add_argument("--rates", nargs="+", metavar="RATE", help="in tc's words, or unlimited (default: ten)")
    parser.add_argument("--specs", nargs="+", metavar="SPEC", help="default: one of each method, and mixes")
    parser.add_argument("--quick", action="store_true", help="a small model and two rates")
    parser.add_argument("--output", type=Path, help="the page (default: the table is printed)")
    parser.add_argument("--json", type=Path, help="all figures")
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE", help="figures of earlier runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
