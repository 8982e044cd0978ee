"""What the coverage page is made of: one test case compared on real processes, one size planned on paper."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import diffusers
import emulation
import exactness
import published
import published_images
import published_videos
import stagewise
import torch
import zoo
from pool import Pool, RemoteError
from torch import nn

import xdit_compile
from benchmarks.published import explained, in_block
from xdit_compile.diagnostics.explanation import Explanation
from xdit_compile.driver.compile_call import compile_call
from xdit_compile.errors import CaptureError, SpecError
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.passes import NOTHING

PUBLISHED = published.PUBLISHED | published_images.PUBLISHED | published_videos.PUBLISHED

SPECS = ("ulysses=2", "ring=3")
TENSOR = ("tensor=2", "tensor=3", "tensor=2,ulysses=2", "tensor=2,ring=2")
"""Of tensor parallelism, in lock-step in one process."""
STAGES = "tensor=2,pipefusion=2,warmup=all"
"""The same with stages, one after the other."""
SHARD = {"data=2,shard=2": "data=2", "ulysses=2,shard=2": "ulysses=2"}
"""Of shares of parameters, in the same way, with the spec whose bits they must give."""
DEGREES = (2, 4, 8)
PATIENCE = 400.0
"""Seconds that one message to the workers may take."""

Record = dict[str, Any]
"""What was measured of one case or size, as JSON says it; ``problem`` says why there is nothing."""


# --------------------------------------------------------------------------------------------------
# On real processes


def compared(pool: Pool, name: str) -> Record:
    """How far a case on several processes is from one; the worst of all ranks."""
    record: Record = {"class": "", "tolerance": zoo.CASES[name].tolerance, "specs": {}}
    try:
        (record["class"],) = pool.run(class_of, name, ranks=[0], timeout=PATIENCE)
        ranks = pool.run(compare, name, timeout=PATIENCE)
    except RemoteError as error:
        return record | {"problem": told(error)}
    for spec in SPECS:
        found = [rank[spec] for rank in ranks if spec in rank]
        worst = max(found, key=lambda f: f.get("error", 0.0))
        record["specs"][spec] = {k: v for k, v in worst.items() if k != "capture_seconds"}
        if "capture_seconds" not in record and "error" in worst:
            record["capture_seconds"] = found[0]["capture_seconds"]
    return record


def compare(name: str) -> Record:
    """Runs on each worker, whether its rank has a part in all specs or not."""
    quiet()
    specs: Record = {}
    for spec in SPECS:
        try:
            for found in exactness.relative_errors(name, 2, True, [spec]).values():
                texts = [n.partition(": ")[2] for n in found["notes"]]
                specs[spec] = {k: found[k] for k in ("error", "methods", "capture_seconds")}
                specs[spec]["reason"] = NOTHING if not found["seeds"] and NOTHING in texts else ""
        except SpecError as error:  # on all ranks alike
            if torch.distributed.get_rank() < xdit_compile.ShardingSpec.parse(spec).world_size:
                specs[spec] = {"misfit": str(error).splitlines()[0]}
    return specs


def class_of(name: str) -> str:
    quiet()
    return type(exactness.built(name)).__name__


def shared(pool: Pool, name: str) -> Record:
    """How far a case whose ranks share out its weights is from plain PyTorch, and whether shares change a bit."""
    try:
        return pool.run(share, name, ranks=[0], timeout=PATIENCE)[0]
    except RemoteError as error:
        return {"problem": told(error)}


def share(name: str) -> Record:
    """Runs on one worker, all ranks by turns."""
    quiet()
    case = zoo.CASES[name]
    model, arguments, expected, program = emulation._captured(case, 2, True)
    record: Record = {"class": type(model).__name__, "tolerance": case.tolerance, "tensor": {}, "shard": {}}
    for spec in TENSOR:
        try:
            error = emulation.together(model, arguments, expected, program, spec).error
            record["tensor"][spec] = {"error": error}
        except SpecError as misfit:
            record["tensor"][spec] = {"misfit": str(misfit).splitlines()[0]}
    try:
        record["tensor"][STAGES] = {"error": stagewise.emulate(case, 2, True, STAGES).exact}
    except SpecError as misfit:
        record["tensor"][STAGES] = {"misfit": str(misfit).splitlines()[0]}
    for spec, plain in SHARD.items():
        try:
            (_, whole), (_, mine) = (emulation.on_ranks(model, arguments, program, s) for s in (plain, spec))
            pairs = [pair for ranks in zip(whole, mine, strict=True) for pair in zip(*ranks, strict=True)]
            same = all(equal(a, b) for a, b in pairs)
            record["shard"][spec] = {"same": same}
        except SpecError as misfit:
            record["shard"][spec] = {"misfit": str(misfit).splitlines()[0]}
    return record


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit, but that numbers which are none are alike."""
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


def halved(pool: Pool, name: str) -> Record:
    """How far apart bfloat16 puts a case on two processes and on one, and what to hold that against."""
    try:
        first, *_ = ranks = pool.run(halve, name, ranks=range(2), timeout=PATIENCE)
    except RemoteError as error:
        return {"problem": told(error)}
    return first | {key: max(rank[key] for rank in ranks) for key in first if key in SPECS}


def halve(name: str) -> Record:
    """Runs on each of two workers."""
    quiet()
    try:
        return dict(exactness.differences_in_bfloat16(name, SPECS[:1]))
    except (exactness.NotOnOneDevice, SpecError) as error:
        return {"misfit": str(error).splitlines()[0]}


# --------------------------------------------------------------------------------------------------
# On paper


def planned_published(name: str) -> Record:
    """A published size, in a process of its own for its memory."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(plan_published, name).result()
    except Exception as error:  # reported, and the others are done
        return {"problem": brief(error)}


def planned_test(pool: Pool, name: str) -> Record:
    """A test case by the same measures, on a worker that has captured it just before."""
    try:
        return pool.run(plan_test, name, ranks=[0], timeout=PATIENCE)[0]
    except RemoteError as error:
        return {"problem": told(error)}


def plan_published(name: str) -> Record:
    torch.set_num_threads(1)
    return planned(*PUBLISHED[name]())


def plan_test(name: str) -> Record:
    return planned(exactness.built(name), zoo.CASES[name].inputs(2, True))


def planned(model: nn.Module, kwargs: dict[str, Any]) -> Record:
    """What a model costs on each number of ranks, and the CPU seconds to capture it and to plan for the most."""
    quiet()
    capture_seconds = timed(lambda: xdit_compile.capture(model, kwargs))
    record: Record = {"class": type(model).__name__, "capture_seconds": capture_seconds, "rows": []}
    for ranks in DEGREES:
        try:
            found = explained(model, kwargs, ranks)
        except SpecError as error:
            record["rows"].append({"ranks": ranks, "misfit": str(error).splitlines()[0]})
        else:
            record["rows"].append(figures(found))
    if "spec" in record["rows"][-1]:
        record["plan_seconds"] = timed(
            lambda: compile_call(model, found.spec, *call_arguments(model, kwargs))
        )
    return record


def figures(found: Explanation) -> Record:
    """Of one explanation, what the page says."""
    inside = [c for c in found.local.collectives if c.function != "main" or in_block(c.module)]
    ranks, flops = found.spec.world_size, max(found.whole.flops, 1)
    return {
        "ranks": ranks,
        "spec": str(found.spec),
        "ratio": found.work_ratio,
        "sent": found.local.sent,
        "collectives": found.local.collective_count,
        "inside": sum(c.times for c in inside),
        "gathers": sum(c.times for c in inside if c.kind == "all_gather"),
        "replicated": [asdict(row) | {"share": row.flops / flops} for row in found.replicated[:1]],
        # One rank's share of it would be there anyway.
        "repeated": found.replicated_flops * (ranks - 1) / flops,
    }


# --------------------------------------------------------------------------------------------------
# Both


def timed(step: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    step()
    return time.process_time() - start


def quiet() -> None:
    """What models and compiler warn of is on the page."""
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()


def told(error: RemoteError) -> str:
    """Of what went wrong on a worker, what to put into a table."""
    return brief(error.__cause__) if error.__cause__ else str(error).splitlines()[-1]


def brief(error: BaseException) -> str:
    """The first line of an error; of a capture's, the second says what was in the way."""
    lines = str(error).splitlines()[: 2 if isinstance(error, CaptureError) else 1]
    return ": ".join([type(error).__name__, *(line.strip() for line in lines)])
