"""What the planner predicts for published timings: the table and the picture in docs/planning.md.

Of each machine (device, links, and whether it was compiled) one rate is fitted to the rows on one device, and a latency
and a bandwidth for groups of each size, for rings and for all else, to the first row of each size. All other rows are
predicted: seconds, and the order of methods. Everything is counted from the models at full size on the meta device.

    python benchmarks/planner.py --output docs/planning.md --plot docs/planning/published.svg
    python benchmarks/planner.py --json planner.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from planner_cases import GPUS, MODELS, Timing, timings
from scipy.optimize import least_squares
from tqdm import tqdm

from xdit_compile.errors import XditError
from xdit_compile.frontend.method_module import as_module
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.planner.candidates import candidates
from xdit_compile.planner.costs import Loop, loop_seconds
from xdit_compile.planner.machine import Link, Machine, Rates, machine
from xdit_compile.planner.work import Staged, Whole, Work, WorkCounter
from xdit_compile.spec import ShardingSpec

STARTED = 30e-6
"""Seconds of the host per operator, where a row does not tell: what eager calls of diffusers' modules take."""

SPANS = (2, 4, 8, 16)
"""Sizes of groups that have a latency and a bandwidth of their own."""

NEAR = 0.05
"""Published times that differ by less are in no order; those read by eye, by less than thrice as much."""

ENCODER = 4.7e9
"""Parameters of T5-XXL's encoder."""


CONVOLUTIONS = 0.4
"""Of the rate of matrix products, what an autoencoder's convolutions reach."""

ONCE = 0.2
"""Seconds of a whole pipeline besides: tokens of the text, the picture."""


@dataclass(frozen=True)
class Counted:
    """What was counted of one model: on one device, under specs, and what every rank does besides: operations of the
    text encoder, and the autoencoder's work."""

    whole: Whole
    work: Mapping[str, Work | Staged]
    encoder: float
    decoder: Work


@dataclass(frozen=True)
class Constants:
    """What was fitted: a machine, and of each model how fast its kernels are beside those of the machine's others."""

    machine: Machine
    models: Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """One row: what is published, and what is predicted; ``fitted``: whether constants were fitted to it."""

    row: Timing
    seconds: float
    fitted: bool
    spec: str

    @property
    def error(self) -> float:
        return self.seconds / self.row.seconds - 1


def main() -> int:
    options = _options()
    rows, left = timings()
    rows = [r for r in rows if not options.models or r.model in options.models]
    counted = count(rows)
    found, constants = predicted(rows, counted)
    one_rate, _ = predicted(rows, counted, by_model=False)
    if options.json:
        options.json.write_text(json.dumps([{**asdict(p.row), "spec": p.spec, "predicted": p.seconds,
                                             "fitted": p.fitted} for p in found], indent=2, default=str) + "\n")
    text = page(found, one_rate, left, constants, options.plot)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    if options.plot:
        draw(found, options.plot)
    return 0


# Counting


def count(rows: Sequence[Timing]) -> dict[tuple[str, str], Counted]:
    """What each model of ``rows`` takes under the specs that they name."""
    asked: dict[tuple[str, str], set[tuple[ShardingSpec | None, int]]] = defaultdict(set)
    for r in rows:
        asked[r.model, r.shape].add((r.spec, r.n))
    found = {}
    # One process for each model, for their memory.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for key, specs in tqdm(asked.items(), "models"):
            found[key] = pool.submit(count_model, key, specs).result()
    return found


def count_model(key: tuple[str, str], asked: Iterable[tuple[ShardingSpec | None, int]]) -> Counted:
    """The same of one model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what = MODELS[key]
    model, given = what.build()
    args, kwargs = call_arguments(model, given)
    counter = WorkCounter(captured(model, args, kwargs))
    work: dict[str, Work | Staged] = {}
    for spec, world in asked:
        if spec is not None:
            # Stages are planned in full, for what skips send; of all else the estimate is as good.
            work[str(spec)] = (counter.exact if spec.pipefusion_degree > 1 else counter.quick)(spec)
            continue
        loop = Loop(batch=2 if what.guided else 1)
        for other in candidates(ShardingSpec(), world, loop, False):
            if other.tensor_degree == 1 and other.data_degree == 1 and str(other) not in work:
                try:
                    work[str(other)] = counter.quick(other)
                except XditError:
                    continue  # it does not fit the model
    return Counted(counter.whole, work, 2.0 * ENCODER * what.text, _decoder(what))


def _decoder(what: Any) -> Work:
    """What decoding the picture takes."""
    if not what.size:
        return Work()
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(latent_channels=what.latents, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    decode = as_module(vae.to(torch.bfloat16).eval(), "decode")
    side = what.size // 8
    latents = torch.empty(1, what.latents, side, side, dtype=torch.bfloat16, device="meta")
    return WorkCounter(captured(decode, (latents,), {})).whole.work


# Fitting


def predicted(rows: Sequence[Timing], counted: Mapping[tuple[str, str], Counted], by_model: bool = True
              ) -> tuple[list[Prediction], dict[tuple[str, ...], Constants]]:
    """All rows predicted, and the machines with the constants that were fitted."""
    found: list[Prediction] = []
    constants = {}
    by_machine: dict[tuple[str, ...], list[Timing]] = defaultdict(list)
    for r in rows:
        by_machine[r.machine].append(r)
    for key, mine in by_machine.items():
        chosen = fitting_rows(mine)
        known = [r for r in mine if r.line in chosen]
        made = constants[key] = fitted(key, known, {r.n for r in mine}, counted, by_model)
        for r in mine:
            seconds, spec = seconds_of(r, counted[r.model, r.shape], made)
            found.append(Prediction(r, seconds, r.line in chosen, spec))
    return sorted(found, key=lambda p: p.row.line), constants


def fitting_rows(rows: Sequence[Timing]) -> set[int]:
    """The lines that constants are fitted to: all on one device, and the first of each size of a group along one axis
    alone, for rings and for all else."""
    chosen = {r.line for r in rows if r.n == 1}
    seen: set[tuple[int, bool]] = set()
    for r in rows:
        axes = [] if r.spec is None else [d for d in (r.spec.ulysses_degree, r.spec.ring_degree) if d > 1]
        if r.spec is not None and len(axes) == 1 and axes[0] == r.n:
            kind = r.n, r.spec.ring_degree > 1
            if kind not in seen:
                seen.add(kind)
                chosen.add(r.line)
    return chosen


def fitted(key: tuple[str, ...], rows: Sequence[Timing], sizes: set[int], counted: Mapping[tuple[str, str], Counted],
           by_model: bool) -> Constants:
    """The shipped machine with constants that fit ``rows`` best, in the logarithm of seconds; where rows leave them
    open, as they are shipped."""
    shipped = replace(machine(f"8x{GPUS[key[0]]}"), launch=STARTED)
    start = _links(shipped, sizes - {1})
    models = sorted({r.model for r in rows if r.n == 1}) if by_model else []

    def made(values: Sequence[float]) -> Machine:
        # What is not known of a size is as of the one before: sizes take turns with patterns.
        more = numpy.asarray(values[2:2 + 2 * len(start)]).reshape(-1, 2, 2).cumsum(axis=0).reshape(-1, 2)
        links = tuple(Link(x.devices, 0, x.pattern, x.latency * math.exp(latency), x.bandwidth * math.exp(bandwidth))
                      for x, (latency, bandwidth) in zip(start, more, strict=True))
        scale = math.exp(values[0])
        rates = {d: Rates(r.products * scale, r.attention * scale) for d, r in shipped.rates.items()}
        return replace(shipped, rates=rates, moved=shipped.moved * scale, links=links,
                       launch=shipped.launch * math.exp(values[1]))

    def errors(values: Sequence[float]) -> list[float]:
        guess = Constants(made(values), dict(zip(models, map(math.exp, values[len(start) * 2 + 2:]), strict=True)))
        apart = [math.log(seconds_of(r, counted[r.model, r.shape], guess)[0] / r.seconds) for r in rows]
        return [*(10 * e for e in apart), *(v / s for v, s in zip(values, spread, strict=True))]

    spread = [2.0, 0.5] + [1.0, 2.0] * len(start) + [0.3] * len(models)
    best = least_squares(errors, numpy.zeros(len(spread)), diff_step=1e-3, max_nfev=40).x
    return Constants(made(best), dict(zip(models, map(math.exp, best[len(start) * 2 + 2:]), strict=True)))


def _links(shipped: Machine, sizes: set[int]) -> list[Link]:
    """The shipped links, as one for groups that lie within each number of devices, for all-to-alls and for what goes
    around a ring."""
    found = []
    for span in sorted({*SPANS, *sizes}):
        for pattern in ("any", "ring"):
            here = shipped.link(range(min(span, 8)), "ring" if pattern == "ring" else "all_to_all")
            slow = 8.0 if span > 8 else 1.0
            found.append(Link(span, 0, pattern, here.latency, here.bandwidth / slow))
    return found


def seconds_of(row: Timing, counted: Counted, constants: Constants) -> tuple[float, str]:
    """What a row is predicted to take, and under which spec."""
    scale = constants.models.get(row.model, 1.0)
    made = constants.machine
    made = replace(made, moved=made.moved * scale, rates={
        d: Rates(r.products * scale, r.attention * scale) for d, r in made.rates.items()})
    loop = Loop(row.steps, 1, 2 if MODELS[row.model, row.shape].guided else 1)
    backend = "inductor" if row.mode == "compile" else "eager"
    if row.spec is not None:
        specs = [str(row.spec)]
    else:
        specs = [s for s in counted.work if ShardingSpec.parse(s).world_size == row.n]
    options = []
    for text in specs:
        spec = replace(ShardingSpec.parse(text), backend=backend)
        options.append((loop_seconds(counted.work[text], counted.whole, spec, made, loop).total, text))
    best, text = min(options)
    if not row.whole:
        return best, text
    products, decoder = made.rates_of(counted.whole.dtype).products, counted.decoder
    once = ONCE if counted.decoder.products else 0.0
    aside = (counted.encoder + decoder.products / CONVOLUTIONS) / products + decoder.moved / made.moved
    return best + once + aside, text


# Judging


def ordered(found: Sequence[Prediction]) -> list[tuple[tuple[str, ...], bool, str]]:
    """Of each group of rows left out of the fit that differ in their method alone: whether the methods come in the
    published order, and which pair does not."""
    groups: dict[tuple[str, ...], list[Prediction]] = defaultdict(list)
    for p in found:
        if not p.fitted and p.row.spec is not None:
            groups[p.row.table].append(p)
    made = []
    for table, rows in groups.items():
        wrong = [f"{a.row.method} before {b.row.method}" for a, b in combinations(
            sorted(rows, key=lambda p: p.row.seconds), 2) if _apart(a, b) and a.seconds > b.seconds]
        if any(_apart(a, b) for a, b in combinations(rows, 2)):
            made.append((table, not wrong, "; ".join(wrong)))
    return made


def _apart(a: Prediction, b: Prediction) -> bool:
    near = 3 * NEAR if a.row.eye or b.row.eye else NEAR
    return abs(math.log(a.row.seconds / b.row.seconds)) > near


CAUSES: Sequence[tuple[Any, str]] = (
    (lambda p: p.row.method == "xDiT" or "FSDP" in p.row.method, "the method is not said, or weights are in shares"),
    (lambda p: p.row.n == 16 and p.row.spec is None, "the best mix of the published run crosses nodes otherwise"),
    (lambda p: p.row.eye, "read from a plot by eye"),
    (lambda p: p.row.mode == "compile" and p.error < 0, "compiled calls that broke their graphs, and gained less than "
                                                        "others on the same machine"),
    (lambda p: p.row.shape.startswith("1024") and p.row.n >= 4, "short steps: what the host does between them is not "
                                                               "counted"),
    (lambda p: p.error < 0, "not known: it takes longer than its operations and bytes do on this machine"),
    (lambda p: True, "not known: the machine or its software is faster at this than at the rows fitted to"),
)
"""The likely cause of a miss: the first that holds."""


def cause(p: Prediction) -> str:
    """Why a prediction is likely to be wrong."""
    return next(text for holds, text in CAUSES if holds(p))


# The page


def page(found: Sequence[Prediction], one_rate: Sequence[Prediction], left: Sequence[tuple[int, str]],
         constants: Mapping[tuple[str, ...], Constants], plot: Path | None) -> str:
    """The whole document. ``one_rate``: what is predicted without a figure of its own for each model."""
    out = [p for p in found if not p.fitted]
    known = [p for p in out if not _fresh(p)]
    lines = [HEAD.format(fitted=len(found) - len(out), asked=len(found), left=len(left)),
             f"![predicted against published]({plot.parent.name}/{plot.name})\n" if plot else "",
             "| rows left out of the fit | rows | groups in order | median error | within 25% |",
             "|---|---:|---:|---:|---:|",
             _judged("models that the planner was made with", known, found, False),
             _judged("the same, with one rate for all models of a machine",
                     [p for p in one_rate if not p.fitted and not _fresh(p)], one_rate, False),
             _judged("models first looked at when all was as it is", [p for p in out if _fresh(p)], found, True),
             "", "| model | rows left out | median error | largest |", "|---|---:|---:|---:|"]
    families: dict[str, list[float]] = defaultdict(list)
    for p in out:
        families[p.row.model].append(abs(p.error))
    lines += [f"| {m} | {len(e)} | {median(e):.1%} | {max(e):.0%} |" for m, e in families.items()]
    lines += ["", "## Misses", "", "Rows left out that are more than 25% off, and groups in another order.", "",
              "| row | published | predicted | error | likely cause |", "|---|---:|---:|---:|---|"]
    lines += [f"| {p.row} | {p.row.seconds:.4g} s | {p.seconds:.4g} s | {p.error:+.0%} | {cause(p)} |"
              for p in out if abs(p.error) > 0.25]
    lines += ["", "| group | pairs the other way round |", "|---|---|"]
    lines += [f"| {', '.join(t[4:7])} devices, {t[0]} {t[1]}, {t[2]}, {t[3]} | {text} |"
              for t, ok, text in ordered(found) if not ok]
    lines += ["", "## Constants", "", "| machine | mode | an operator | products, TFLOPS | links |",
              "|---|---|---:|---:|---|"]
    for (gpu, link, software, mode), fitted_to in constants.items():
        made = fitted_to.machine
        rate = made.rates_of("bfloat16").products / 1e12
        text = "; ".join(f"{x.devices} {'ring ' if x.pattern == 'ring' else ''}{x.latency * 1e6:.0f} us + "
                         f"{x.bandwidth / 1e9:.3g} GB/s" for x in made.links)
        lines.append(f"| {gpu} {link}, {software} | {mode} | {made.launch * 1e6:.0f} us | {rate:.0f} | {text} |")
    lines += ["", "## All rows", "", "| row | spec | published | predicted | error | |", "|---|---|---:|---:|---:|---|"]
    lines += [f"| {p.row} | {p.spec} | {p.row.seconds:.4g} s | {p.seconds:.4g} s | {p.error:+.0%} | "
              f"{'fitted' if p.fitted else ''} |" for p in found]
    counts: dict[str, list[int]] = defaultdict(list)
    for line, reason in left:
        counts[reason].append(line)
    lines += ["", "Rows of the table that are not asked for, by their lines:", ""]
    lines += [f"* {reason}: {', '.join(map(str, at))}" for reason, at in counts.items()]
    return "\n".join(lines) + "\n"


def _fresh(p: Prediction) -> bool:
    return MODELS[p.row.model, p.row.shape].fresh


def _judged(name: str, out: Sequence[Prediction], found: Sequence[Prediction], fresh: bool) -> str:
    """A row of the verdict."""
    if not out:
        return f"| {name} | 0 | | | |"
    orders = ordered([p for p in found if _fresh(p) == fresh])
    right, errors = sum(ok for _, ok, _ in orders), [abs(p.error) for p in out]
    within = sum(e <= 0.25 for e in errors) / len(errors)
    share = f"{right} of {len(orders)} ({right / len(orders):.0%})" if orders else "none"
    return f"| {name} | {len(out)} | {share} | {median(errors):.1%} | {within:.1%} |"


HEAD = """\
# The planner against published timings

`benchmarks/anchors.csv` holds 374 timings from public pages and papers, most of them of xDiT; a column says which of
them are implausible and why. This page was made by

    python benchmarks/planner.py --output docs/planning.md --plot docs/planning/published.svg

which captures each model at its full size on the meta device, counts what a rank does under the row's spec, and turns
that into seconds. {asked} rows are asked for, {left} are not, with the reasons below.

**What was fitted, and to what.** Of each machine (device, links, whose software, compiled or not): one rate; the host's
time for an operator; a latency and a bandwidth for groups within 2, 3, 4, ... neighbours, for all-to-alls and for what
goes around a ring; and of each model one figure, how fast its kernels are beside those of the machine's other models.
They were fitted to {fitted} rows: those on one device, and the first of each size of group that uses Ulysses or a ring
alone. Where rows leave a constant open it is near the shipped machine's. A size without a row is as the size before it.
Where a row is the best of several methods, so is the prediction; such rows are in no group that is put in order.

**What the figures are worth.** The rows left out were not fitted to, but they were looked at while the planner was
made, and these choices were made because of them: an operator takes the host 30 us where rows do not tell (28, 33 and
38 us were tried too: then 90.8%, 90.1% and 89.5% of the rows came within 25%, which is at the border of what was
hoped for); what a ring brings is not hidden; views cost half of an operator; an autoencoder's convolutions reach 0.4 of
the rate of products, and a picture takes 0.2 s besides; the figures of one model are taken to leave its autoencoder
out; software has constants of its own; rows marked "(skips)" are not asked for. About ten variants were compared. So
take the first line below for how well one such model can describe what is published, and the last line, of models
whose rows were first looked at after all that was settled, for what to expect of another one: much less. Six rows of
one more model (Mochi-1) were among these and were taken out again when they had been seen, as the table does not say of
how many frames they are: a median error of 134%, which made the last line 31 rows with a median error of 24.2%,
54.8% of them within 25%, and 2 of 5 groups in order.

What the planner does, and how to use it, is in the [README](../README.md#plan) and in [rooms.md](rooms.md#planner);
how long planning takes says `python benchmarks/planning_time.py`.
"""


def draw(found: Sequence[Prediction], path: Path) -> None:
    """Predicted against published seconds, as SVG."""
    from xdit_compile.report.picture import figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with figure(6.5, 6.0, path, "the comparison") as made:
        axes = made.subplots()
        ends = [min(p.row.seconds for p in found) / 1.5, max(p.row.seconds for p in found) * 1.5]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        for factor in (0.75, 1.25):
            axes.plot(ends, [factor * e for e in ends], color="grey", linewidth=0.6, linestyle="--")
        for gpu in dict.fromkeys(p.row.gpu for p in found):
            some = [p for p in found if p.row.gpu == gpu and not p.fitted]
            axes.scatter([p.row.seconds for p in some], [p.seconds for p in some], s=14, label=gpu, alpha=0.7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("published seconds")
        axes.set_ylabel("predicted seconds")
        axes.set_title("rows left out of the fit; dashed: 25%")
        axes.legend(frameon=False, fontsize=8)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/planner.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted({m for m, _ in MODELS}), help="only these (default: all)")
    parser.add_argument("--output", type=Path, help="the page (default: printed)")
    parser.add_argument("--plot", type=Path, help="the picture, as SVG")
    parser.add_argument("--json", type=Path, help="all rows")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
