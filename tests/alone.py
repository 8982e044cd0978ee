"""Runs artifacts in processes that have no diffusers: ``python alone.py FOLDER``. Only torch and the package itself.

Each folder in FOLDER holds an artifact, perhaps weights, and the arguments and results of a call; what is printed is
by the folder's name the largest relative difference of any rank's results, and the kind of what was returned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BARRED = ("diffusers", "transformers", "accelerate", "peft")


def run(folder: str, world: int) -> dict[str, Any]:
    """On each of ``world`` ranks: all artifacts, those for fewer ranks on the first of them."""
    assert not any(name in sys.modules for name in BARRED)
    for name in BARRED:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    import torch
    import torch.distributed as dist

    import xdit_compile
    from xdit_compile.ir.pytree import flatten
    from xdit_compile.runtime.deferred.deferred_tensor import materialize

    torch.set_num_threads(1)
    found = {}
    for path in sorted(Path(folder).iterdir()):
        call = torch.load(path / "call.pt")
        need = json.loads((path / "model.xdit" / "manifest.json").read_text())["world_size"]
        if need > 1 and (dist.get_rank() if world > 1 else 0) >= need:
            continue
        weights = path / "weights" if (path / "weights").exists() else None
        model = xdit_compile.load(path / "model.xdit", weights, ranks=range(need) if world > 1 and need > 1 else None
                                  if need > 1 else [dist.get_rank()] if world > 1 else None, **call["options"])
        errors = []
        for step in range(2):
            with torch.no_grad():
                answer = model(**call["inputs"])
            results = [materialize(t) for t in flatten(answer)[0]]
            errors += [((a - b).abs().max() / b.abs().max()).item()
                       for a, b in zip(results, call["results"], strict=True)]
            if step == 0 and model.runners["forward"].group.spec.patches > 1:
                model.runners["forward"].loops.hold()  # patches that read what an equal step has left are exact
        found[path.name] = {"error": max(errors), "returned": type(answer).__name__, "class": type(model).__name__}
    return found


def main(folder: str, world: int) -> None:
    from xdit_compile.runtime.launch import launch

    ranks = launch(run, folder, world, world_size=world, device="cpu") if world > 1 else [run(folder, 1)]
    merged = {name: {**seen, "error": max(r[name]["error"] for r in ranks if name in r)}
              for found in ranks for name, seen in found.items()}
    print(json.dumps(merged))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
