"""How long does it take to start a model from an artifact, against reading its weights?

A random Flux of about the size asked for, exported on the meta device, with its weights in safetensors files beside it.
Then, in new processes and with files dropped from the page cache before each: reading all files of weights, and loading
the artifact. What a process holds of its own, against what it maps from files, is read from the kernel.

    python benchmarks/artifact.py
    python benchmarks/artifact.py --gigabytes 2 --folder weights --keep --json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

LOADING = """
import json, sys, time
import torch
held = lambda: {k: int(v) * 1024 for k, v in (l.split()[:2] for l in open("/proc/self/smaps_rollup").read().replace(
    ":", "").splitlines()[1:]) if k in ("Rss", "Anonymous")}
import xdit_compile
before, start = held(), time.perf_counter()
model = xdit_compile.load(sys.argv[1], sys.argv[2])
seconds, after = time.perf_counter() - start, held()
tensors = [t for t in model.state_dict().values()]
print(json.dumps({"seconds": seconds, "own": after["Anonymous"] - before["Anonymous"],
                  "nbytes": sum(t.nbytes for t in tensors), "modules": "diffusers" in sys.modules}))
"""

READING = """
import json, sys, time
start = time.perf_counter()
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def made(folder: Path, gigabytes: float) -> None:
    """The artifact and its weights, as diffusers writes those of large models: in several files with an index."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    import xdit_compile

    blocks = max(1, round((gigabytes * 1e9 / 4 - 0.35e9) / 0.1416e9))
    with init_empty_weights():
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=blocks).eval()
    inputs = {"hidden_states": torch.zeros(1, 64, 64), "encoder_hidden_states": torch.zeros(1, 16, 4096),
              "pooled_projections": torch.zeros(1, 768), "timestep": torch.ones(1), "img_ids": torch.zeros(64, 3),
              "txt_ids": torch.zeros(16, 3)}
    xdit_compile.export(model, "ulysses=1", inputs, folder / "model.xdit")
    weights = folder / "weights"
    weights.mkdir()
    where, batch, size = {}, {}, 0
    entries = list(model.state_dict().items())
    for i, (name, like) in enumerate(tqdm(entries, desc="random weights")):
        batch[name] = torch.empty(like.shape, dtype=like.dtype).uniform_(-0.02, 0.02)
        size += batch[name].nbytes
        if size > 1e9 or i == len(entries) - 1:
            file = f"part-{len(set(where.values())):03}.safetensors"
            save_file(batch, weights / file)
            where |= dict.fromkeys(batch, file)
            batch, size = {}, 0
    (weights / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def cold(files: list[Path]) -> None:
    """Have the kernel forget what it holds of these files."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    files = sorted((folder / "weights").glob("*.safetensors"))
    loads, reads = [], []
    for _ in range(rounds):
        for code, arguments, found in ((READING, files, reads), (
                LOADING, [folder / "model.xdit", folder / "weights"], loads)):
            cold(files)
            done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                                  check=True)
            found.append(json.loads(done.stdout))
    best = min(loads, key=lambda f: f["seconds"])
    return {"gigabytes": sum(f.stat().st_size for f in files) / 1e9, "tensors": best["nbytes"] / 1e9,
            "load_seconds": best["seconds"], "read_seconds": min(r["seconds"] for r in reads),
            "ratio": best["seconds"] / min(r["seconds"] for r in reads), "own_megabytes": best["own"] / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of weights (default 10)")
    parser.add_argument("--folder", type=Path, help="where to write them (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="of reading and loading; the best counts (default 3)")
    parser.add_argument("--keep", action="store_true", help="leave the files there, and use them if they are")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "weights" / "model.safetensors.index.json").exists():
            started = time.perf_counter()
            made(folder, options.gigabytes)
            print(f"made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        found = measured(folder, options.rounds)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    table = Table("weights", "loading", "reading", "ratio", "memory of its own")
    table.add_row(f"{found['gigabytes']:.2f} GB", f"{found['load_seconds']:.2f} s", f"{found['read_seconds']:.2f} s",
                  f"{found['ratio']:.3f}", f"{found['own_megabytes']:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
