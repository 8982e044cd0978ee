"""What sequence and tensor parallelism of the published models cost: the tables in docs/published.md.

For every model of examples/published.py and every number of ranks: captured at full size on the meta device
and explained; nothing is computed, no weights and no processes are needed. Ulysses as far as the attention
heads go and are shared evenly, a ring of such groups beyond; and tensor ranks.

    python benchmarks/published.py --output docs/published.md
    python benchmarks/published.py --models flux_dev sd3_medium --degrees 2 4
    python benchmarks/published.py --json published.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from xdit_compile.diagnostics.explain import explain
from xdit_compile.diagnostics.explanation import Explanation
from xdit_compile.driver.compile_call import compile_call
from xdit_compile.errors import SpecError
from xdit_compile.report.operations import program_flops
from xdit_compile.report.traffic import collectives
from xdit_compile.report.units import size, work
from xdit_compile.spec import ShardingSpec

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]

EVEN = 1.05
"""Where a rank's operations are at most this many times its share, heads count as evenly shared."""


@dataclass(frozen=True)
class Shape:
    """What the traffic formula needs to know of a model: tokens that attend to each other in every layer, of
    images and of text (0 where text is only attended to), width, layers, and bytes of an element."""

    image: int
    text: int
    hidden: int
    layers: int
    sums: int
    """Halves of blocks (attention, cross attention, feed-forward; one where they run side by side), and long skips."""
    itemsize: int = 2

    def formula(self, ranks: int, sharded_text: bool) -> float:
        """Bytes one rank sends in one forward: in every layer, of queries, keys, values and results, it gives
        away (N-1)/N of the 1/N that it holds (DeepSpeed-Ulysses, arXiv 2309.14509)."""
        tokens = self.image + (self.text if sharded_text else 0)
        return 4 * (ranks - 1) / ranks**2 * tokens * self.hidden * self.layers * self.itemsize


    def sums_formula(self, ranks: int) -> float:
        """Bytes that one of so many tensor ranks sends in one forward: a sum of all features of all tokens, per half of
        a block, goes around a ring twice (arXiv 1909.08053)."""
        return 2 * (ranks - 1) / ranks * (self.image + self.text) * self.hidden * self.sums * self.itemsize


SHAPES = {
    "flux_dev": Shape(4096, 512, 3072, 57, 76),
    "sd3_medium": Shape(4096, 333, 1536, 24, 48),
    "pixart_sigma_1024": Shape(4096, 0, 1152, 28, 84),
    "hunyuan_dit_1024": Shape(4096, 0, 1408, 40, 139),
    "cogvideox_5b": Shape(17550, 226, 3072, 42, 84),
    "mochi_480p": Shape(44520, 256, 3072, 48, 96),
    "wan21_14b_720p": Shape(75600, 0, 5120, 40, 120),
    "hunyuan_video_720p": Shape(118800, 256, 3072, 60, 80),
    "qwen_image_1328": Shape(6889, 512, 3072, 60, 120),
    "ltx_video": Shape(6930, 0, 2048, 28, 84),
}


@dataclass(frozen=True)
class Row:
    """One model on one number of ranks; ``problem`` says why there are no figures."""

    model: str
    ranks: int
    spec: str = ""
    problem: str = ""
    work_ratio: float = 0.0
    sent: int = 0
    formula: float = 0.0
    sharded_text: bool = False
    collectives: int = 0
    in_blocks: int = 0
    gathers_in_blocks: int = 0
    replicated: str = ""
    replicated_flops: int = 0
    replicated_share: float = 0.0


@dataclass(frozen=True)
class TensorRow:
    """One model on so many tensor ranks; ``held``: a rank's parameters, times the ranks, over all."""

    model: str
    ranks: int
    problem: str = ""
    work_ratio: float = 0.0
    held: float = 0.0
    sent: int = 0
    formula: float = 0.0
    collectives: int = 0


def main() -> int:
    options = _options()
    rows: list[Row] = []
    tensor_rows: list[TensorRow] = []
    # One process per model, for their memory; what is captured there serves all numbers of ranks.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in tqdm(options.models, "models"):
            found, tensor = pool.submit(rows_of, name, options.degrees).result()
            rows += found
            tensor_rows += tensor
    text = page(rows, tensor_rows, _command(options))
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in (*rows, *tensor_rows)], indent=2) + "\n")
    bad = [row for row in (*rows, *tensor_rows) if row.problem or getattr(row, "gathers_in_blocks", 0)]
    for row in bad:
        reason = row.problem or "all-gathers inside blocks"
        print(f"{row.model} on {row.ranks} ranks: {reason}", file=sys.stderr)
    return 1 if bad else 0


def rows_of(name: str, degrees: Sequence[int]) -> tuple[list[Row], list[TensorRow]]:
    """All rows of one model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, kwargs = PUBLISHED[name]()
    rows, tensor_rows = [], []
    for ranks in degrees:
        try:
            rows.append(row_of(name, explained(model, kwargs, ranks)))
        except Exception as error:  # reported, and the others are done
            rows.append(Row(name, ranks, problem=f"{type(error).__name__}: {error}"))
        try:
            tensor_rows.append(tensor_row_of(name, model, kwargs, ranks))
        except Exception as error:
            tensor_rows.append(TensorRow(name, ranks, f"{type(error).__name__}: {error}"))
    return rows, tensor_rows


def tensor_row_of(name: str, model: Any, kwargs: Any, ranks: int) -> TensorRow:
    """The figures of a model on so many tensor ranks."""
    found = compile_call(model, ShardingSpec(tensor_degree=ranks), (), kwargs)
    local, sizes = found.local, {n: p.numel() for n, p in model.named_parameters()}
    mine = {m.name: m.size for group in found.groups for m in group.members}
    sent = list(collectives(local))
    return TensorRow(
        name, ranks, work_ratio=program_flops(local) * ranks / program_flops(found.whole),
        held=sum(mine.get(n, size) for n, size in sizes.items()) * ranks / sum(sizes.values()),
        sent=sum(c.sent for c in sent), formula=SHAPES[name].sums_formula(ranks),
        collectives=sum(c.times for c in sent))


def explained(model: Any, kwargs: Any, ranks: int) -> Explanation:
    """With as much of Ulysses as the attention heads allow, less of it where shares of them would be too uneven."""
    found = []
    for ulysses in (u for u in range(ranks, 0, -1) if ranks % u == 0):
        try:
            found.append(explain(model, {"ulysses": ulysses, "ring": ranks // ulysses}, kwargs))
        except SpecError:
            if ulysses == 1 and not found:
                raise
            continue
        if found[-1].work_ratio <= EVEN:
            break
    # A ring sends more: it has to be worth it.
    best = min(f.work_ratio for f in found)
    return next(f for f in found if f.work_ratio <= best + 0.02)


def row_of(name: str, found: Explanation) -> Row:
    """The figures of one explanation."""
    shape, ranks = SHAPES[name], found.spec.world_size
    inside = [c for c in found.local.collectives if c.function != "main" or in_block(c.module)]
    first = found.replicated[0] if found.replicated else None
    text = bool(shape.text) and any(re.search(rf"\b{shape.text}/", row.text) for row in found.attentions)
    return Row(
        name,
        ranks,
        str(found.spec),
        work_ratio=found.work_ratio,
        sent=found.local.sent,
        formula=shape.formula(ranks, text),
        sharded_text=text,
        collectives=found.local.collective_count,
        in_blocks=sum(c.times for c in inside),
        gathers_in_blocks=sum(c.times for c in inside if c.kind == "all_gather"),
        replicated=f"{first.module or first.node}" if first else "",
        replicated_flops=first.flops if first else 0,
        replicated_share=first.flops / found.whole.flops if first else 0.0,
    )


def in_block(module: str) -> bool:
    """Whether a module lies inside one of a list of modules, as ``transformer_blocks.0.attn`` does."""
    return re.search(r"\.\d+(\.|$)", module) is not None


def page(rows: Sequence[Row], tensor_rows: Sequence[TensorRow], command: str) -> str:
    """The whole document."""
    versions = f"torch {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}"
    columns = {
        "model": "---",
        "N": "---:",
        "spec": "---",
        "FLOPs": "---:",
        "sent": "---:",
        "formula": "---:",
        "sent / formula": "---:",
        "sharded": "---",
        "collectives": "---:",
        "in blocks": "---:",
        "gathers in blocks": "---:",
        "largest replicated": "---",
    }
    head = f"""\
# The published models

Made by `{command}` ({versions}): every model captured at its full size, batch 1, on the meta device, and
planned for N ranks. Nothing was run.

- *FLOPs*: those of one rank times N, over those of one device. 1.000 is ideal; the rest is what every rank
  computes whole.
- *sent*: bytes one rank gives to others in one forward.
- *formula*: `4 (N-1)/N² x tokens x hidden x layers x element size`, what Ulysses has to send for the tokens
  that are *sharded*. More is the final all-gather, and exchanges of another kind.
- *collectives*: per forward, and those of them inside blocks; *gathers in blocks*: all-gathers inside blocks,
  of which there should be none.
- *largest replicated*: the operator that costs most of those that every rank computes whole, and its share of
  the model's operations.

| {" | ".join(columns)} |
|{"|".join(columns.values())}|
"""
    return head + "\n".join(map(_line, rows)) + "\n" + TENSOR_HEAD + "\n".join(map(_tensor_line, tensor_rows)) + "\n"


TENSOR_HEAD = """
## Tensor parallelism

`tensor=N`: how weights are shared out was found by trying.

- *parameters*: those of one rank times N, over all. Buffers, which every rank has whole, are not counted.
- *formula*: `2 (N-1)/N x tokens x hidden x sums x element size`; sums are the halves of blocks (attention, cross
  attention, feed-forward; one where they run side by side) and long skips. More are modulations and embeddings.

| model | N | FLOPs | parameters | sent | formula | sent / formula | collectives |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def _tensor_line(row: TensorRow) -> str:
    if row.problem:
        first = row.problem.splitlines()[0].replace("|", "\\|")
        return f"| {row.model} | {row.ranks} | {first} | | | | | |"
    cells = (row.model, row.ranks, f"{row.work_ratio:.3f}", f"{row.held:.3f}", size(row.sent), size(int(row.formula)),
             f"{row.sent / row.formula:.3f}", row.collectives)
    return "| " + " | ".join(map(str, cells)) + " |"


def _line(row: Row) -> str:
    if row.problem:
        first = row.problem.splitlines()[0].replace("|", "\\|")
        return f"| {row.model} | {row.ranks} | {first} | | | | | | | | | |"
    replicated = f"`{row.replicated}`, {work(row.replicated_flops)}, {row.replicated_share:.2%}"
    cells = (
        row.model,
        row.ranks,
        row.spec,
        f"{row.work_ratio:.3f}",
        size(row.sent),
        size(row.formula),
        f"{row.sent / row.formula:.3f}" if row.formula else "",
        "image + text" if row.sharded_text else "image",
        row.collectives,
        row.in_blocks,
        row.gathers_in_blocks,
        replicated if row.replicated else "nothing",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _command(options: argparse.Namespace) -> str:
    """How to make this page again."""
    words = ["python", "benchmarks/published.py"]
    if options.models != [*PUBLISHED]:
        words += ["--models", *options.models]
    if options.degrees != [2, 4, 8]:
        words += ["--degrees", *map(str, options.degrees)]
    if options.output:
        words += ["--output", os.path.relpath(options.output, ROOT)]
    return shlex.join(words)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/published.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=PUBLISHED,
        default=[*PUBLISHED],
        metavar="NAME",
        help=f"which of {', '.join(PUBLISHED)} (all)",
    )
    parser.add_argument(
        "--degrees", nargs="+", type=int, default=[2, 4, 8], metavar="N", help="numbers of ranks (2 4 8)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="write the page there instead of printing it"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
