"""What runs on every rank of the forward benchmark: build the contestants, check them, time them in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import flux
import torch
import torch.distributed as dist
from contestants import CONTESTANTS, Absent, Builder, Contestant, Forward, held
from timing import time_undisturbed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode, sdpa_flop_count
from tqdm import tqdm, trange
from traffic import counting, of_dtensors

FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: (
        sdpa_flop_count(q, k, v)
    )
}
"""What torch 2.13's flop counter does not know: attention on CPU."""


class LocalFlops(_FlopCounterMode):
    """FLOPs of this rank: PyTorch's counter takes those of a whole DTensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented if of_dtensors(types) else super().__torch_dispatch__(func, types, args, kwargs)


@dataclass
class Result:
    """One contestant on one rank; ``problem`` says why there are no figures.

    ``taken`` is the same on all ranks: what each round took.
    """

    problem: str = ""
    taken: list[dict[str, float]] = field(default_factory=list)
    first_call: float = 0.0
    error: float = 0.0
    flops: int = 0
    parameters: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    control_bytes: int = 0


def run(
    size: flux.Size, names: Sequence[str], rounds: int, warmup: int, patience: int
) -> dict[str, dict[str, Any]]:
    """The results by contestant; runs on every rank of an initialised group."""
    model, inputs = flux.model(size), flux.inputs(size)
    chosen = [CONTESTANTS[name] for name in names]
    builder = Builder(model, dist.get_world_size())
    results = {name: Result() for name in names}
    quiet = dist.get_rank() != 0
    with torch.no_grad():
        (reference,) = model(**inputs)
        forwards: dict[str, Forward] = {}
        for contestant in tqdm(chosen, "building", disable=quiet):
            forward = _build(builder, contestant, inputs, reference, results[contestant.name])
            if forward is not None:
                forwards[contestant.name] = forward
            elif contestant.build is None:
                raise RuntimeError(f"the plain model fails: {results[contestant.name].problem}")
        order = [*forwards]
        for number in trange(warmup + rounds, desc="rounds", disable=quiet):
            order.append(order.pop(0))  # so that none always begins
            for name in order:
                idle = CONTESTANTS[name].build is None and dist.get_rank() != 0
                work = None if idle else partial(forwards[name], **inputs)
                taken = time_undisturbed(work, patience if number >= warmup else 0)
                if number >= warmup:
                    results[name].taken.append(taken._asdict())
    return {name: asdict(result) for name, result in results.items()}


def _build(
    builder: Builder, contestant: Contestant, inputs: dict[str, Any], reference: Tensor, result: Result
) -> Forward | None:
    """Build, call once, compare and count; None, with the reason in ``result``, if that fails on any rank."""
    forward = None
    try:
        start = time.perf_counter()
        forward, made = builder.build(contestant)
        (output,) = forward(**inputs)
        result.first_call = time.perf_counter() - start
        result.error = (output - reference).abs().max().item()
        result.parameters = held(made)
        # Compiled code cannot be looked into: what is counted is the program that was compiled.
        flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with torch.compiler.set_stance("force_eager"), counting() as traffic, LocalFlops(flops):
            forward(**inputs)
        result.flops = flops.get_total_flops()
        result.collectives, result.bytes = dict(traffic.collectives), traffic.bytes.total()
        result.control_bytes = traffic.control
    except Absent as error:
        result.problem = str(error)
    except Exception as error:  # a contestant that fails is reported, the others go on
        result.problem = f"{type(error).__name__}: {error}"
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, result.problem)
    result.problem = next(filter(None, problems), "")
    return None if result.problem else forward
