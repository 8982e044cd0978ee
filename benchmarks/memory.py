"""Does a rank take the memory that `explain` says? A real model on two processes, whose weights no process ever holds.

    python benchmarks/memory.py
    python benchmarks/memory.py --spec ulysses=2,shard=2,offload=block --hidden 1536

A random Flux is written as safetensors by a process of its own. Two others make it on the meta device, read their
shares and call it. "Measured" is the peak of a process's resident memory (VmHWM) over what it was before the model was
made, when PyTorch and gloo had been used once already. On the CPU the host's memory is the device's, and gloo (not
NCCL) has a copy of its own of what it is gathering: the largest block is added to what `explain` says.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import flux
import torch
from rich.console import Console
from rich.table import Table

from xdit_compile import ShardingSpec, explain, launch, parallelize
from xdit_compile.ir.parameter_groups import parameter_groups


def write(size: flux.Size, folder: Path) -> None:
    """The weights of a random model."""
    flux.model(size).save_pretrained(folder, max_shard_size="200MB")


def resident(field: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at most."""
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def run(size: flux.Size, folder: str, spec: str) -> dict[str, int]:
    """What one rank took, and what it was said to take."""
    small = flux.Size(64, 16, 128, 1, 1)
    with torch.no_grad():
        parallelize(flux.model(small), spec)(**flux.inputs(small))
    with torch.device("meta"):
        empty = flux.model(size)
    said = explain(empty, spec, flux.inputs(size)).memory
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = resident("VmRSS")
    given = flux.inputs(size)
    model: Any = parallelize(empty, spec, weights=folder)
    with torch.no_grad():
        model(**given)
        loaded = resident("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")
        model(**given)
    largest = max(g.length * g.dtype.itemsize for g in parameter_groups(empty))
    copies = largest if ShardingSpec.parse(spec).shard_degree > 1 else 0
    return {"said": said.device + said.host + copies, "copies of gloo": copies, "first call": loaded,
            "second call": resident("VmHWM") - before,
            "weights": said.weights + said.host, "gathered": said.gathered, "activations": said.activations,
            "exchanged": said.exchanged, "model": sum(p.nbytes for p in empty.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", nargs="+", default=["ulysses=2", "ulysses=2,shard=2", "offload=block"])
    for name, default in (("hidden", 1024), ("double", 6), ("single", 16), ("tokens", 512), ("text", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = flux.Size(options.tokens, options.text, options.hidden, options.double, options.single)
    if options.write:
        write(size, options.write)
        return
    made = Table("spec", "rank", "model", "said", "first call", "second call", "measured / said")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *sys.argv, "--write", folder], check=True)
        for spec in options.spec:
            ranks = launch(run, size, folder, spec, world_size=ShardingSpec.parse(spec).world_size, device="cpu")
            found[spec] = ranks
            for i, r in enumerate(ranks):
                made.add_row(spec, str(i), *(f"{r[k] / 1e6:,.0f} MB" for k in (
                    "model", "said", "first call", "second call")),
                    f"{max(r['first call'], r['second call']) / r['said']:.3f}")
            print(spec, ranks, flush=True)
    Console().print(made)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
