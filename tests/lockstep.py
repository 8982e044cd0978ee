"""All ranks of a small world in one process: their local graphs run side by side and meet at collectives.

An emulation written from what the collectives mean, independent of the package: each rank's graph is a generator
that stops at a collective with its input and goes on with its result.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import fx

c10d = torch.ops._c10d_functional
CARRIED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
           torch.uint8, torch.bool)
"""What gloo and NCCL both have in all collectives."""
COLLECTIVES = {c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default, c10d.all_reduce.default}


def _rank(module: fx.GraphModule, arguments: Sequence[Any]) -> Generator[tuple[fx.Node, tuple], torch.Tensor, tuple]:
    env: dict[fx.Node, Any] = {}
    given = iter(arguments)
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "output":
            return args[0]
        elif node.op == "call_module":
            env[node] = yield from _rank(getattr(module, node.target), args)
        elif node.target is c10d.wait_tensor.default:
            env[node] = args[0]
        elif node.target in COLLECTIVES:
            env[node] = yield node, args
        else:
            env[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph without an output")


def run(modules: Sequence[fx.GraphModule], arguments: Sequence[Sequence[Any]]) -> list[tuple]:
    """What each rank returns. Rank i runs ``modules[i]`` on ``arguments[i]``."""
    ranks = [_rank(m, a) for m, a in zip(modules, arguments, strict=True)]
    results: list[Any] = [None] * len(ranks)
    waiting: dict[int, tuple[fx.Node, tuple]] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(ranks)))
    while answers:
        for i, answer in answers.items():
            try:
                waiting[i] = ranks[i].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
        answers = _meet(waiting, len(ranks))
        for i in answers:
            del waiting[i]
    assert not waiting, f"ranks {sorted(waiting)} wait for others for ever"
    return results


def _meet(waiting: dict[int, tuple[fx.Node, tuple]], world: int) -> dict[int, Any]:
    answers = {}
    for i, (node, args) in waiting.items():
        peers = _peers(args[-1], i, world)
        if all(p in waiting for p in peers):
            calls = [waiting[p] for p in peers]
            assert all(n.target is node.target and a[-1] == args[-1] for n, a in calls), "different collectives meet"
            answers[i] = _result(node.target, [a for _, a in calls], peers.index(i), node)
    return answers


def _peers(name: str, rank: int, world: int) -> list[int]:
    _, axis, shape = name.split(".")
    ulysses, ring, batch, tensor = (*map(int, shape.split("x")), 1)[:4]
    assert ulysses * ring * batch * tensor == world
    # The tensor axis varies fastest, then Ulysses, the ring and the batch.
    places = {r: {"tensor": r % tensor, "ulysses": r // tensor % ulysses, "ring": r // (tensor * ulysses) % ring,
                  "batch": r // (tensor * ulysses * ring)} for r in range(world)}
    if axis.startswith("shard-"):  # so many neighbours that hold the same features
        many, alike = int(axis.removeprefix("shard-")), [r for r in range(world) if r % tensor == rank % tensor]
        first = alike.index(rank) // many * many
        return alike[first : first + many]
    free = ("ulysses", "ring") if axis == "sequence" else (axis,)
    return [r for r in range(world) if all(n in free or i == places[rank][n] for n, i in places[r].items())]


def _result(target: Any, calls: list[tuple], me: int, node: fx.Node) -> torch.Tensor:
    inputs = [a[0] for a in calls]
    assert all(x.dtype in CARRIED for x in inputs), "no backend carries that"
    if target is c10d.all_reduce.default:
        return torch.stack(inputs).sum(0)
    if target is c10d.all_gather_into_tensor.default:
        assert len({x.shape for x in inputs}) == 1 and all(x.is_contiguous() for x in inputs)
        return torch.cat(inputs)
    parts = [x.split(list(a[2]))[me] for x, a in zip(inputs, calls, strict=True)]
    sizes = [len(p) for p in parts]
    assert sizes == list(calls[me][1]), f"{node.format_node()} is sent {sizes}, expects {calls[me][1]}"
    return torch.cat(parts)
