"""What the workers of the pool run for the tests of parameters that are cut over ranks or wait on the host."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import cases
import emulation
import torch
import zoo
from torch import Tensor, nn

import xdit_compile
from xdit_compile.driver import checkpoint
from xdit_compile.frontend.program_cache import _captures_of
from xdit_compile.ir.pytree import flatten
from xdit_compile.runtime.deferred.deferred_tensor import materialize

CALLS = ((2, True), (1, False))
"""Of two shapes, so that the second finds parameters given up."""


@torch.no_grad()
def results(model: Any, name: str, batch: int, odd: bool) -> list[Tensor]:
    given = zoo.CASES[name].inputs(batch, odd)
    return [materialize(t) for t in flatten(model(**copy.deepcopy(given)))[0]]


def plain(spec: str) -> str:
    """The same spec with all parameters on every rank."""
    words = [w for w in spec.split(",") if w.partition("=")[0] not in ("shard", "offload")]
    return ",".join(words) or "ulysses=1"


def like_plain(name: str, spec: str) -> dict[str, Any]:
    """Whether two calls of each shape give the bits of the spec without shares; bytes held and of the whole model; how
    often each was captured."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    model = cases.made(zoo.CASES[name])
    shared = xdit_compile.parallelize(model, spec, ranks=ranks, timeout=60)
    whole = xdit_compile.parallelize(cases.made(zoo.CASES[name]), plain(spec), ranks=ranks, timeout=60)
    same = [all(map(torch.equal, results(shared, name, *call), results(whole, name, *call)))
            for call in CALLS for _ in range(2)]
    store = shared.runners["forward"].store
    return {"same": same, "held": sum(t.nbytes for t in store.values()),
            "left": sum(p.nbytes for p in model.parameters() if not p.is_meta),
            "all": sum(p.nbytes for p in whole.parameters()),
            "functions": [sorted(ready.compiled.captured.calls().values())
                          for ready in shared.runners["forward"].programs.values()],
            "captures": [len(known) for known in _captures_of(model).programs.values()]}


def refused(name: str, spec: str) -> dict[str, str]:
    """What is said of edits after the first call."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    said = {}

    def attempt(how: str, edit: Any) -> None:
        model = cases.made(zoo.CASES[name])
        state = {n: t.clone() for n, t in model.state_dict().items()}
        parallel = xdit_compile.parallelize(model, spec, ranks=ranks, timeout=60)
        results(parallel, name, *CALLS[0])
        try:
            edit(model, state)
            results(parallel, name, *CALLS[0])
        except xdit_compile.XditError as error:
            said[how] = str(error)

    def replace(model: nn.Module, _: Any) -> None:
        path, _, leaf = next(n for n, p in model.named_parameters() if p.ndim == 2).rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, nn.Parameter(torch.zeros(getattr(module, leaf).shape)))

    def put(model: nn.Module, _: Any) -> None:
        parameter = next(model.parameters())
        parameter.data = torch.ones(parameter.shape)

    def wrapped(model: nn.Module, _: Any) -> None:
        path = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(model.get_submodule(path)))

    def child(model: nn.Module, state: dict[str, Tensor]) -> None:
        path = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        inside = {n.removeprefix(f"{path}."): t for n, t in state.items() if n.startswith(f"{path}.")}
        model.get_submodule(path).load_state_dict(inside)

    with torch.no_grad():
        attempt("state_dict", lambda model, _: model.state_dict())
        attempt("load_state_dict", lambda model, state: model.load_state_dict(state))
        attempt("of a child", child)
        attempt("assigned", lambda model, state: model.load_state_dict(state, assign=True))
        attempt("written into", lambda model, _: next(model.parameters()).mul_(2))
        attempt("written through .data", lambda model, _: next(model.parameters()).data.mul_(2))
        attempt("put into .data", put)
        attempt("pickled", lambda model, _: pickle.dumps(list(model.parameters())))
        attempt("replaced", replace)
        attempt("wrapped", wrapped)
        attempt("a part moved", lambda model, _: model.transformer_blocks[0].to("cpu"))
        attempt("cast", lambda model, _: model.to(torch.bfloat16))
    return said


def from_files(name: str, folder: str, spec: str) -> dict[str, Any]:
    """Whether a model on the meta device gives, with its weights in files, what it gives in memory; bytes that were
    read of its parameters, and all there are."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    empty, model = on_meta(name), cases.made(zoo.CASES[name])
    read = counting_reads()
    parallel = xdit_compile.parallelize(empty, spec, ranks=ranks, timeout=60, weights=folder)
    whole = xdit_compile.parallelize(model, plain(spec), ranks=ranks, timeout=60)
    same = [all(map(torch.equal, results(parallel, name, *call), results(whole, name, *call))) for call in CALLS]
    return {"same": same, "read": sum(read), "all": sum(p.nbytes for p in model.parameters())}


def on_meta(name: str) -> nn.Module:
    """The model of a case without its parameters."""
    with torch.device("meta"):
        empty = zoo.CASES[name].build().eval().requires_grad_(False)
    for n, buffer in cases.made(zoo.CASES[name]).named_buffers():  # those that no file holds
        path, _, leaf = n.rpartition(".")
        empty.get_submodule(path)._buffers[leaf] = buffer.clone()
    return empty


def counting_reads() -> list[int]:
    """Bytes of each piece of a file of weights that is read from now on."""
    found: list[int] = []
    opened = checkpoint._open

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __getitem__(self, at: Any) -> Tensor:
            found.append((piece := self.inner[at]).nbytes)
            return piece

    class File:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def keys(self) -> Sequence[str]:
            return self.inner.keys()

        def get_tensor(self, name: str) -> Tensor:
            found.append((tensor := self.inner.get_tensor(name)).nbytes)
            return tensor

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inner.get_slice(name))

    checkpoint._open = lambda *args: File(opened(*args))  # type: ignore[assignment]
    return found




def like_one_device(name: str, spec: str) -> dict[str, Any]:
    """The largest differences from plain PyTorch over the largest value, of two calls of each shape; bytes held, left
    in the model, and of the whole model."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    model, plainly = cases.made(zoo.CASES[name]), cases.made(zoo.CASES[name])
    parallel = xdit_compile.parallelize(model, spec, ranks=ranks, timeout=100)
    errors = [emulation.difference(a, b) for call in CALLS for _ in range(2) for a, b in zip(
        results(parallel, name, *call), results(plainly, name, *call), strict=True)]
    store = parallel.runners["forward"].store
    return {"errors": errors, "held": sum(t.nbytes for t in store.values()),
            "left": sum(p.nbytes for p in model.parameters() if not p.is_meta),
            "all": sum(p.nbytes for p in plainly.parameters())}


def parts_from_files(name: str, folder: str, spec: str) -> dict[str, Any]:
    """As ``from_files``, of parts among tensor ranks, against plain PyTorch."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    empty, model = on_meta(name), cases.made(zoo.CASES[name])
    read = counting_reads()
    parallel = xdit_compile.parallelize(empty, spec, ranks=ranks, timeout=60, weights=folder)
    errors = [emulation.difference(a, b) for call in CALLS for a, b in zip(
        results(parallel, name, *call), results(model, name, *call), strict=True)]
    return {"errors": errors, "read": sum(read), "all": sum(p.nbytes for p in model.parameters())}
