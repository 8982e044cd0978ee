"""What the workers of the pool run for the tests of artifacts."""

from __future__ import annotations

from typing import Any

import cases
import emulation
import shard_runs
import torch
import zoo

import xdit_compile
from xdit_compile.artifact import weight_files
from xdit_compile.ir.pytree import flatten
from xdit_compile.runtime.deferred.deferred_tensor import materialize


def refused(path: str, ranks: int) -> str:
    """What is said when so many ranks load an artifact for another number."""
    try:
        xdit_compile.load(path, ranks=range(ranks), timeout=60)
    except xdit_compile.ArtifactError as error:
        return str(error)
    return ""


def called(path: str, inputs: dict[str, Any]) -> torch.Tensor:
    """The first tensor that a call of a loaded artifact gives."""
    with torch.no_grad():
        (found, *_), _ = flatten(xdit_compile.load(path, ranks=range(2), timeout=120)(**inputs))
    return materialize(found)


def counted_reads() -> tuple[list[int], Any]:
    """Bytes of each read that artifacts do of files of weights, and what undoes the counting."""
    found: list[int] = []
    library = weight_files._library()
    opened = library.safe_open

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __getitem__(self, at: Any) -> torch.Tensor:
            found.append((piece := self.inner[at]).nbytes)
            return piece

    class File(Slice):
        def __enter__(self) -> File:
            self.inner.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.inner.__exit__(*args)

        def get_tensor(self, name: str) -> torch.Tensor:
            found.append((tensor := self.inner.get_tensor(name)).nbytes)
            return tensor

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inner.get_slice(name))

    library.safe_open = lambda *args, **kwargs: File(opened(*args, **kwargs))
    return found, lambda: setattr(library, "safe_open", opened)


@torch.no_grad()
def shared(path: str, weights: str | None, name: str, spec: str, plain: str) -> dict[str, Any]:
    """Calls of a loaded artifact whose ranks have shares of its parameters, each twice: the largest difference from the
    model on one device, and whether they are the bits of ``plain``, the spec without shares; bytes that were read of
    weights, are held as shares, and of the whole model."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    read, undo = counted_reads()
    try:
        loaded = xdit_compile.load(path, weights, ranks=ranks, timeout=100)
    finally:
        undo()
    model = cases.made(zoo.CASES[name])
    whole = xdit_compile.parallelize(cases.made(zoo.CASES[name]), plain, ranks=ranks, timeout=100)
    errors, same = [], []
    for call in shard_runs.CALLS:
        expected, bits = (shard_runs.results(m, name, *call) for m in (model, whole))
        for _ in range(2):
            found = shard_runs.results(loaded, name, *call)
            errors += map(emulation.difference, found, expected)
            same += map(torch.equal, found, bits)
    store = loaded.runners["forward"].store
    said = ""
    try:
        loaded.state_dict()
    except xdit_compile.XditError as error:
        said = str(error)
    return {"error": max(errors), "same": all(same), "read": sum(read), "held": sum(t.nbytes for t in store.values()),
            "all": sum(p.nbytes for p in model.parameters()), "state": said, "look": (str(loaded.device),
                                                                                     str(loaded.dtype))}
