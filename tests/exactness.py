"""What the workers of the pool run: a case on one process and on several, compared."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zoo
from cases import made
from emulation import Found, difference
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import xdit_compile
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.pytree import flatten

_built: dict[str, nn.Module] = {}


def built(name: str) -> nn.Module:
    """The model of a case; the last one is kept, and with it what was captured of it."""
    if name not in _built:
        _built.clear()
        _built[name] = made(zoo.CASES[name])
    return _built[name]


def relative_errors(name: str, batch: int, odd: bool, specs: Sequence[str], backend: str = "eager") -> dict[str, Any]:
    """By spec: the largest difference between plain PyTorch and the parallel model over the largest value, of results
    and of what is left in the arguments; what the compiler noted; and the CPU seconds of the capture, next to none
    where this call was captured before. Specs of fewer processes than take part are run by the first ranks."""
    model = built(name)
    arguments = call_arguments(model, zoo.CASES[name].inputs(batch, odd))

    def called(model: Any) -> tuple[Any, list[Tensor]]:
        args, kwargs = copy.deepcopy(arguments)
        with torch.no_grad():
            out = model(*args, **kwargs)
        return out, flatten((out, (args, kwargs)))[0]

    result, expected = called(model)
    start = time.process_time()
    xdit_compile.capture(model, zoo.CASES[name].inputs(batch, odd))
    seconds = time.process_time() - start
    found: dict[str, Any] = {}
    for spec in specs:
        parsed = xdit_compile.ShardingSpec.parse(spec)
        if torch.distributed.get_rank() >= parsed.world_size:
            continue
        parallel = xdit_compile.parallelize(model, f"{spec},backend={backend}", ranks=range(parsed.world_size),
                                            timeout=100)
        out, actual = called(parallel)
        assert type(out) is type(result) and len(actual) == len(expected)
        (ready,) = parallel.runners["forward"].programs.values()
        compiled = ready.compiled
        notes = compiled.local.notes
        error = max(map(difference, actual, expected))
        found[spec] = {"error": error, "notes": [str(n) for n in notes], "seeds": list(compiled.seeds),
                       "methods": sorted(Found(error, notes).methods), "capture_seconds": seconds}
    return found


class NotOnOneDevice(Exception):
    """Plain PyTorch does not run the model this way either."""


@torch.no_grad()
def differences_in_bfloat16(name: str, specs: Sequence[str]) -> dict[str, float]:
    """Root mean square differences over the root mean square of the results in float32, all others in bfloat16:
    ``rounding`` between bfloat16 and float32 on one device, ``kernels`` on one device between the flash and the math
    kernel of attention (where the model runs with each of them), and by spec between one device and several.

    Raises:
        NotOnOneDevice: the model does not run in bfloat16.
    """
    case = zoo.CASES[name]
    tensors, structure = flatten(case.inputs(1, True))

    def called(model: Callable[..., Any], convert: Callable[[Tensor], Tensor]) -> Tensor:
        out = flatten(model(**copy.deepcopy(structure.build([convert(t) for t in tensors]))))[0]
        return torch.cat([t.float().flatten() for t in out if t.is_floating_point()])

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a - b).square().mean().sqrt() / exact.square().mean().sqrt()).item()

    model = made(case)
    exact = called(model, lambda t: t)
    model = model.bfloat16()
    # As diffusers loads it.
    exempt = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, parameter in model.named_parameters():
        if exempt & set(path.split(".")):
            parameter.data = parameter.data.float()
    # Some embed steps in the dtype that these come in, others want them exact.
    for convert in (_halved, _all_halved):
        try:
            single = called(model, convert)
            break
        except Exception as error:  # whatever a model says that was written for float32 alone
            problem = error
    else:
        raise NotOnOneDevice(f"the model itself does not run in bfloat16: {problem}") from problem
    found = {"rounding": distance(single, exact)}
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = called(model, convert)
    except RuntimeError:  # not for all masks and sizes of heads is there such a kernel
        pass
    else:
        with sdpa_kernel(SDPBackend.MATH):
            found["kernels"] = distance(flash, called(model, convert))
    for spec in specs:
        parallel = xdit_compile.parallelize(model, spec, ranks=range(2), timeout=100)
        found[spec] = distance(called(parallel, convert), single)
    return found


def _all_halved(x: Tensor) -> Tensor:
    return x.bfloat16() if x.is_floating_point() else x


def _halved(x: Tensor) -> Tensor:
    """Steps and sizes, of one dimension, stay as they are."""
    return x.bfloat16() if x.is_floating_point() and x.ndim > 1 else x
