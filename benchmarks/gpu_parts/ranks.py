"""Two processes that share one GPU, over gloo: exact numbers, where there is no second device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import xdit_compile
from gpu_parts.checks import ENOUGH, small
from gpu_parts.run import Figures, Run, difference, failure
from xdit_compile.runtime.deferred.deferred_tensor import materialize

SPECS = ("ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2,warmup=all")
COMPILED = "ulysses=2,backend=inductor"
EXPORTED = "ulysses=2"
TIMEOUT = 60.0


class _Arriving:
    """A message that comes by way of host memory."""

    def __init__(self, work: Any, host: torch.Tensor, target: torch.Tensor) -> None:
        self._work, self._host, self._target = work, host, target

    def wait(self) -> None:
        self._work.wait()
        self._target.copy_(self._host)


@contextmanager
def through_host_memory() -> Iterator[None]:
    """Within: messages between two ranks go through host memory, as gloo sends from nowhere else. Its collectives know
    tensors on GPUs."""
    send, receive = dist.isend, dist.irecv

    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return send(tensor.to("cpu", copy=True), *args, **kwargs)

    def irecv(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        host = torch.empty_like(tensor, device="cpu")
        return _Arriving(receive(host, *args, **kwargs), host, tensor)

    dist.isend, dist.irecv = isend, irecv
    try:
        yield
    finally:
        dist.isend, dist.irecv = send, receive


def sharded(device: str, spec: str, path: str) -> Figures:
    """Three steps under ``spec`` against the model as it is."""
    batch = 2 if spec.startswith("cfg") else 1
    model, inputs = small(device, batch)
    calls = [{**inputs, "timestep": inputs["timestep"] * f} for f in (1.0, 0.6, 0.2)]
    expected = [model(**call)[0] for call in calls]
    parallel = xdit_compile.parallelize(small(device, batch)[0], spec, timeout=TIMEOUT)
    with through_host_memory():
        errors = [difference(materialize(parallel(**call)[0]), e) for call, e in zip(calls, expected, strict=True)]
    assert max(errors) <= ENOUGH[torch.float32], errors
    return {"difference": max(errors)}


def loaded(device: str, spec: str, path: str) -> Figures:
    """An artifact for two ranks."""
    model, inputs = small(device)
    parallel = xdit_compile.load(path, device=device, timeout=TIMEOUT)
    error = difference(materialize(parallel(**inputs)[0]), model(**inputs)[0])
    assert error <= ENOUGH[torch.float32], error
    return {"difference": error}


def viewed(device: str, spec: str, path: str) -> Figures:
    """The result of a collective is looked at as another type before it is waited for."""
    c10d, group = torch.ops._c10d_functional, dist.group.WORLD.group_name
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = (torch.arange(4 * ranks, device=device) + 100 * rank).to(torch.bfloat16)
    each = [4] * ranks
    result = c10d.all_to_all_single(mine, each, each, group).view(torch.int16)
    result = c10d.wait_tensor(result).view(torch.bfloat16)
    expected = torch.cat([torch.arange(4) + 4 * rank + 100 * r for r in range(ranks)]).to(torch.bfloat16)
    assert torch.equal(result.cpu(), expected), (result, expected)
    return {"difference": 0.0}


def empty(device: str, spec: str, path: str) -> Figures:
    """An all-to-all in which a rank sends nothing to one and gets nothing from one, or takes no part at all."""
    c10d, group = torch.ops._c10d_functional, dist.group.WORLD.group_name
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for length in (3, 0):
        # Only to the next.
        give, take = [0] * ranks, [0] * ranks
        give[(rank + 1) % ranks] = take[(rank - 1) % ranks] = length
        mine = torch.full((length,), float(rank), device=device)
        result = c10d.wait_tensor(c10d.all_to_all_single(mine, take, give, group))
        assert result.tolist() == [float((rank - 1) % ranks)] * length, result
    return {"difference": 0.0}


def placed(device: str, spec: str, path: str) -> Figures:
    """LOCAL_RANK chooses the device; one that this machine does not have is an error, not another device."""
    if device != "cuda":
        return {"skipped": "LOCAL_RANK chooses among GPUs"}
    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    try:
        chosen = xdit_compile.init_from_env("cuda")
    except Exception as error:
        assert rank >= count, error
        return {"refused": f"LOCAL_RANK {rank} of {count}: {type(error).__name__}: {error}"[:300]}
    finally:
        torch.cuda.set_device(0)
    assert chosen == torch.device("cuda", rank) and rank < count, chosen
    return {"devices": count}


Task = tuple[Callable[[str, str, str], Figures], str]


def tasks(run: Run) -> dict[str, Task]:
    """By name, what both ranks do."""
    specs = SPECS if run.tiny else (*SPECS, COMPILED)
    return {"view before wait": (viewed, ""), "empty shares": (empty, ""), "LOCAL_RANK": (placed, ""),
            "artifact": (loaded, EXPORTED), **{spec: (sharded, spec) for spec in specs}}


@torch.no_grad()
def work(device: str, chosen: dict[str, Task], path: str) -> dict[str, Figures]:
    """What one rank has to say of each task."""
    if device == "cuda":
        torch.cuda.set_device(0)
    found: dict[str, Figures] = {}
    for name, (task, spec) in chosen.items():
        try:
            found[name] = task(device, spec, path)
        except Exception as error:
            found[name] = failure(error)
    return found


def ranks(run: Run) -> Figures:
    """Two ranks on one device: all ways to share out a small model, an artifact, a collective's result unwaited for."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.xdit")
        model, inputs = small(run.device)
        run.attempt("export", lambda: bool(xdit_compile.export(model, EXPORTED, inputs, path, weights="included")))
        chosen = tasks(run)
        run.begin(", ".join(chosen))
        try:
            both = started(run, chosen, path)
        except xdit_compile.LaunchError as error:
            run.put("together", failure(error))
            for name in chosen:  # what one of them did to the others is not their fault
                run.attempt(name, lambda name=name: merged(  # type: ignore[misc]
                    [r[name] for r in started(run, {name: chosen[name]}, path)]), 15)
        else:
            for name in chosen:
                run.put(name, merged([r[name] for r in both]))
    return run.figures


def started(run: Run, chosen: dict[str, Task], path: str) -> list[dict[str, Figures]]:
    """What each of two new processes has to say."""
    # Its groups are gloo's, whatever the device of tensors is.
    return xdit_compile.launch(work, run.device, chosen, path, world_size=2, device="cpu",
                               timeout=min(max(run.left, 1.0), 3 * TIMEOUT))


def merged(found: list[Figures]) -> Figures:
    """Of both ranks as one: the first error, or the larger difference and all else that was said."""
    for one in found:
        if "error" in one:
            return one
    together: Figures = {}
    for one in found:
        together |= one
    if "difference" in together:
        together["difference"] = max(one["difference"] for one in found)
    return together
