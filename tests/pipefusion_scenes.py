"""Scenes with stages on real ranks: what loops, users and mishaps do. Expected is what the emulation gives."""

from __future__ import annotations

import copy
import inspect
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import calls
import cases
import displaced
import pipelines
import torch
import torch.distributed as dist
from emulation import difference
from pipefusion_runs import emulation_of, flow_of
from torch import Tensor, nn

import xdit_compile
from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor, materialize

TWO = "pipefusion=2,patches=3"


def parallel_of(model: nn.Module, spec: str = TWO, timeout: float = 60, **options: Any) -> Any:
    """A copy of ``model``, which gives up what other stages have."""
    ranks = range(xdit_compile.ShardingSpec.parse(spec).world_size)
    return xdit_compile.parallelize(copy.deepcopy(model), spec, ranks=ranks, timeout=timeout, **options)


def setup(name: str, spec: str = TWO, batch: int = 1, odd: bool = False, layers: int = 0) -> tuple[Any, ...]:
    """The entry, its model, another one made parallel, and inputs."""
    entry = displaced.MODELS[name]
    entry = entry.deep(layers) if layers else entry
    model = cases.made(entry.case)
    return entry, model, parallel_of(model, spec), entry.case.inputs(batch, odd)


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return displaced.result(model, inputs)


def walk(model: Callable[..., Any], entry: displaced.Displaced, inputs: dict[str, Any], times: Sequence[Tensor],
         sample: Tensor | None = None) -> Tensor:
    """The sample after a step at each of these times."""
    sample = inputs[entry.layout.sample] if sample is None else sample
    for i, time_ in enumerate(times):
        sample = displaced.euler(sample, output(model, inputs | {entry.layout.sample: sample, "timestep": time_}), i)
    return sample


def other(inputs: dict[str, Any], what: str) -> dict[str, Any]:
    """With other noise (or class), or another prompt."""
    name = "hidden_states" if what == "noise" else "encoder_hidden_states"
    if name not in inputs:
        return inputs | {"class_labels": inputs["class_labels"] + 11}
    return inputs | {name: inputs[name].flip(1) * 0.9}


# --------------------------------------------------------------------------------------------------
# Schedulers


def scheduler(chosen: str) -> Any:
    import diffusers

    options: dict[str, Any] = {"thresholding": True, "sample_max_value": 1.5} if chosen == "thresholding" else {}
    name = "DPMSolverMultistepScheduler" if chosen == "thresholding" else chosen
    return getattr(diffusers, name)(**options)


def scheduled(name: str, chosen: str, batch: int = 1, steps: int = 8, spec: str = TWO, **step: Any) -> dict[str, Any]:
    """A loop by hand with a scheduler of diffusers."""
    entry, model, parallel, inputs = setup(name, spec, batch)

    def run(call: Callable[..., Any]) -> Tensor:
        made = scheduler(chosen)
        made.set_timesteps(steps)
        sample, generator = inputs["hidden_states"], torch.Generator().manual_seed(3)
        takes = inspect.signature(made.step).parameters
        options = step | ({"generator": generator} if "generator" in takes else {})
        for t in made.timesteps:
            given = made.scale_model_input(sample, t) if hasattr(made, "scale_model_input") else sample
            out = output(call, inputs | {"hidden_states": given, "timestep": t.expand(batch)})
            out = out if out.shape == sample.shape else out.chunk(2, dim=1)[0]
            sample = made.step(out, t, sample, **options, return_dict=False)[0]
        return sample

    late = run(parallel)
    waited = isinstance(late, DeferredTensor) and late.promise.values is None
    actual = materialize(late)
    emulated = run(emulation_of(parallel, model, entry, actual))
    return {"error": difference(actual, emulated), "exact": difference(actual, run(model)), "waited": waited,
            "drained": flow_of(parallel).drained}


# --------------------------------------------------------------------------------------------------
# Loops that follow each other


def interrupted(name: str) -> list[float]:
    """Three steps of eight, then another prompt, then the first prompt with other noise, then all of the first."""
    entry, model, parallel, inputs = setup(name)
    times = displaced.times(inputs, 8)
    runs = [(inputs, times[:3]), (other(inputs, "prompt"), times), (other(inputs, "noise"), times), (inputs, times)]
    found = []
    for given, schedule in runs:
        actual = materialize(walk(parallel, entry, given, schedule))
        wanted = walk(emulation_of(parallel, model, entry, actual), entry, given, schedule)
        found.append(difference(actual, wanted))
    return found


def left_alone(name: str) -> list[float]:
    """Loops that end without anybody using their result, each followed by another."""
    entry, model, parallel, inputs = setup(name)
    times = displaced.times(inputs, 6)
    found = []
    for steps in (1, 2, 3, 6):
        walk(parallel, entry, other(inputs, "noise"), times[:steps])
        actual = materialize(walk(parallel, entry, inputs, times))
        # A second call at one time may be of another sample in the same loop: the next step is exact too.
        emulated = emulation_of(parallel, model, entry, actual, warmup=2 if steps == 1 else 1)
        found.append(difference(actual, walk(emulated, entry, inputs, times)))
    return found


def in_turns(name: str) -> list[float]:
    """Two samples with one prompt, a step of each by turns: nobody knows whose keys and values are there."""
    entry, model, parallel, inputs = setup(name)
    times, second = displaced.times(inputs, 5), other(inputs, "noise")
    samples = [given[entry.layout.sample] for given in (inputs, second)]
    expected = [walk(model, entry, given, times) for given in (inputs, second)]
    for i, time_ in enumerate(times):
        samples = [displaced.euler(s, output(parallel, inputs | {entry.layout.sample: s, "timestep": time_}), i)
                   for s in samples]
    return [difference(materialize(a), b) for a, b in zip(samples, expected, strict=True)]


def one_step_then_another(name: str) -> float:
    """A loop of which one step was made, then one with another prompt that begins at the same time."""
    entry, model, parallel, inputs = setup(name)
    times = displaced.times(inputs, 6)
    walk(parallel, entry, other(inputs, "prompt"), times[:1])
    actual = materialize(walk(parallel, entry, inputs, times))
    return difference(actual, walk(emulation_of(parallel, model, entry, actual), entry, inputs, times))


def another_size(name: str, what: str, spec: str = TWO) -> list[float]:
    """Three steps, three of another resolution or batch, and three of the first: each begins anew."""
    entry, model, parallel, inputs = setup(name, spec, 1 if what == "batch" else 2)
    second = entry.case.inputs(2, what == "size")
    times, found, flows = displaced.times(inputs, 9), [], []
    sample = inputs[entry.layout.sample]
    for given, begin in ((inputs, 0), (second, 3), (inputs, 6)):
        steps = [t[:1].expand(len(given[entry.layout.sample])) for t in times[begin : begin + 3]]
        start = sample if given is inputs else given[entry.layout.sample]
        late = walk(parallel, entry, given, steps, start)
        actual = materialize(late)
        flows = [r.executor for r in parallel.runners["forward"].programs.values()]
        (cut,) = flows[given is second].stage.samples.values()
        emulated = displaced.Emulation(model, entry.layout, offsets=cut.borders, dim=actual.ndim + cut.dim)
        found.append(difference(actual, walk(emulated, entry, given, steps, materialize(start))))
        sample = actual if given is inputs else sample
    assert len(flows) == 2
    return found


def guided(name: str, spec: str, steps: int = 6) -> dict[str, Any]:
    """Calls with the condition and without it in turn."""
    entry, model, parallel, inputs = setup(name, spec)
    without = other(inputs, "prompt")

    def run(one: Callable[..., Any], two: Callable[..., Any]) -> Tensor:
        sample = inputs[entry.layout.sample]
        for i, t in enumerate(displaced.times(inputs, steps)):
            now = {entry.layout.sample: sample, "timestep": t}
            yes, no = output(one, inputs | now), output(two, without | now)
            sample = displaced.euler(sample, no + 2.5 * (yes - no), i)
        return sample

    actual = materialize(run(parallel, parallel))
    emulated = run(*(emulation_of(parallel, model, entry, actual) for _ in range(2)))
    return {"error": difference(actual, emulated), "exact": difference(actual, run(model, model)),
            "drained": flow_of(parallel).drained}


def alone_in_turns(name: str, spec: str) -> float:
    """One condition, though groups take turns: all of its steps are of one loop."""
    entry, model, parallel, inputs = setup(name, spec)
    times = displaced.times(inputs, 5)
    actual = materialize(walk(parallel, entry, inputs, times))
    exact = walk(model, entry, inputs, times)
    return difference(actual, exact)


def two_kinds(name: str, layers: int, second: dict[str, Any] | None) -> list[float]:
    """A call, one of another kind (these arguments, or another size), and the first again; all exact."""
    entry, model, parallel, inputs = setup(name, "pipefusion=2,warmup=all", layers=layers)
    other_kind = entry.case.inputs(1, True) if second is None else inputs | second
    return [difference(materialize(output(parallel, given)), output(model, given))
            for given in (inputs, other_kind, inputs)]


def placed(name: str) -> list[Any]:
    """Where a parallel model says that it is, and of what dtype, before a call and after it."""
    _, model, parallel, inputs = setup(name)
    seen = []
    for _ in range(2):
        seen.append((str(parallel.device), parallel.dtype == model.dtype))
        materialize(output(parallel, inputs))
    return seen


def shared_between() -> list[float]:
    """Both of a pipeline's denoisers, the second from the middle on, as Wan 2.2 has them; in one group."""
    entry, model, parallel, inputs = setup("wan")
    second = cases.made(entry.case, seed=1)
    late = parallel_of(second)
    times = displaced.times(inputs, 6)
    middle = walk(parallel, entry, inputs, times[:3])
    end = materialize(walk(late, entry, inputs, times[3:], middle))
    wanted = walk(emulation_of(parallel, model, entry, end), entry, inputs, times[:3])
    wanted = walk(emulation_of(late, second, entry, end), entry, inputs, times[3:], wanted)
    return [difference(end, wanted)]


# --------------------------------------------------------------------------------------------------
# Pipelines


def pipelines_again(name: str, root: str, spec: str = "pipefusion=2,patches=2") -> dict[str, Any]:
    """Another prompt after the first: what a fresh pipeline gives. Callbacks are given tensors."""
    path = pipelines.folder(name, Path(root))
    case = pipelines.PIPELINES[name]
    world = xdit_compile.ShardingSpec.parse(spec).world_size

    def fresh() -> Any:
        return xdit_compile.parallelize(pipelines.load(path), spec, ranks=range(world), timeout=100)

    seen: list[Tensor] = []

    def look(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert type(given["latents"]) is Tensor
        seen.append(given["latents"].clone())
        return given

    again = {"class_labels": [3]} if "class_labels" in case.call() else dict(case.prompt)
    pipe = fresh()
    takes = inspect.signature(type(pipe).__call__).parameters
    watched = {"callback_on_step_end": look} if "callback_on_step_end" in takes else {}
    first = pipelines.run(pipe, case, **watched)
    second = pipelines.run(pipe, case, **again)
    flows = [r.executor for c in case.denoisers for r in getattr(pipe, c).runners["forward"].programs.values()]
    steps = len(seen)
    alone = pipelines.load(path)
    exact = pipelines.run(alone, case, **again)
    return {"again": difference(second, pipelines.run(fresh(), case, **again)),
            "first": difference(first, pipelines.run(fresh(), case)),
            "exact": difference(second, exact), "apart": difference(first, second), "steps": steps,
            "watched": bool(watched), "drained": sum(f.drained for f in flows), "type": type(first) is Tensor}


# --------------------------------------------------------------------------------------------------
# Bad input


class Writing(calls.Tiny):
    """Writes into what it is given."""

    def body(self, y: Tensor) -> Tensor:
        return super().body(y)

    def forward(self, x: Tensor, step: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        kept.add_(1)
        return self.leave(self.body(self.enter(x) * step[:, None, None])) + kept


def refused(spec: str, world: int, tokens: int = 7, writing: bool = False) -> dict[str, Any]:
    """What is raised, and how the next model does, with stages."""
    call = calls.inputs(tokens=tokens) | ({"kept": torch.zeros(1, tokens, 6)} if writing else {})
    model = calls.made(Writing if writing else calls.Tiny)
    raised, text = calls.outcome(lambda: xdit_compile.parallelize(
        model, spec, ranks=range(world), timeout=calls.TIMEOUT)(**call))
    good = parallel_of(calls.made(), "pipefusion=2", calls.TIMEOUT) if world == 2 else parallel_of(
        calls.made(), f"ring={world}")
    return {"raised": raised, "text": text, "next": tiny_error(good, calls.inputs())}


def tiny_error(parallel: Any, call: dict[str, Any], **made: Any) -> float:
    return difference(materialize(parallel(**call).sample), calls.made(**made)(**call).sample)


def refused_call(patches: int, tokens: Sequence[int]) -> list[Any]:
    """Calls of one parallel model with so many tokens: the error, or how far it is from one device."""
    parallel = parallel_of(calls.made(), f"pipefusion=2,patches={patches}", calls.TIMEOUT)
    found: list[Any] = []
    for n in tokens:
        try:
            found.append(tiny_error(parallel, calls.inputs(tokens=n)))
        except xdit_compile.SpecError as error:
            found.append(str(error))
    return found


# --------------------------------------------------------------------------------------------------
# Mishaps


def tiny_loop(parallel: Any, steps: int, before: Callable[[int], dict[str, Any]] = lambda i: {}) -> Tensor:
    """A loop of a tiny model's; ``before`` each step may change what it is called with."""
    call = calls.inputs(tokens=12)
    x = call["x"]
    for i in range(steps):
        given = {"x": x, "step": call["step"] - i / 20} | before(i)
        with torch.no_grad():
            x = x - 0.1 * parallel(**given, return_dict=False)[0]
    return materialize(x)


def mishap(how: str, rank: int, spec: str, folder: str = "", timeout: float = 12.0) -> dict[str, Any]:
    """Rank ``rank`` fails in a patched step; what the others see, and when; and what comes next if all still live."""
    parallel, mine = parallel_of(calls.made(layers=4), spec, timeout), dist.get_rank()
    tiny_loop(parallel, 4)

    def fail(*_: Any) -> Any:
        if how == "dies":
            os._exit(7)
        raise ValueError("out of ideas")

    if mine == rank and how in ("dies", "raises"):
        flow = flow_of(parallel)
        flow._units[1] = fail

    def between(i: int) -> dict[str, Any]:
        if i == 3 and mine == rank and how == "leaves":
            os._exit(7)
        return {"step": torch.tensor([0.2])} if i == 3 and mine == rank and how == "differs" else {}

    start = time.monotonic()
    raised, text = calls.outcome(lambda: tiny_loop(parallel, 8, between))
    seen = {"raised": raised, "text": text, "took": time.monotonic() - start}
    if folder:
        Path(folder, str(mine)).write_text(f"{raised}|{seen['took']:.2f}|{text}")
    else:
        seen["again"] = calls.outcome(lambda: tiny_loop(parallel, 2))
        seen["next"] = tiny_error(parallel_of(calls.made(layers=4), spec), calls.inputs(tokens=12), layers=4)
    return seen


def looked_at(spec: str) -> dict[str, Any]:
    """One rank alone prints latents between steps; that must neither stop the others nor change anything."""
    entry, model, parallel, inputs = setup("sd3", spec)
    sample, times = inputs[entry.layout.sample], displaced.times(inputs, 5)
    for i, now in enumerate(times):
        with torch.no_grad():
            out = parallel(**inputs | {entry.layout.sample: sample, "timestep": now, "return_dict": False})[0]
        sample = displaced.euler(sample, out, i)
        if dist.get_rank() == 0:
            assert "tensor" in str(sample.mean())
    cut = next(iter(flow_of(parallel).stage.samples.values()), None)
    if cut is None:
        wanted = displaced.plain(model, inputs, entry.layout, times, displaced.euler)[0]
    else:
        wanted, _ = displaced.denoise(model, inputs, entry.layout, times, displaced.euler, offsets=list(cut.borders),
                                      dim=sample.ndim + cut.dim, warmup=1)
    return {"error": difference(materialize(sample), wanted), "drained": flow_of(parallel).drained}
