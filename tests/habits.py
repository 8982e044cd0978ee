"""Scenes with a parallel pipeline, played by all ranks. Most return the difference to one process."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import torch
from emulation import difference
from safetensors.torch import save_file

import xdit_compile
from xdit_compile.ir.pytree import flatten
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor

SCHEDULERS = ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
              "EulerAncestralDiscreteScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "thresholding"]


def both(name: str, root: str, spec: str = "cfg=2", **options: Any) -> tuple[Any, Any, Any]:
    """The case, its pipeline, and another one made parallel."""
    path = pipelines.folder(name, Path(root))
    case, alone, other = pipelines.PIPELINES[name], pipelines.load(path), pipelines.load(path)
    return case, alone, xdit_compile.parallelize(other, spec, ranks=range(2), timeout=60, **options)


def rank() -> int:
    return torch.distributed.get_rank()


def apart(case: Any, pipe: Any, alone: Any, **call: Any) -> float:
    return difference(pipelines.run(pipe, case, **call), pipelines.run(alone, case, **call))


def called_back(name: str, root: str) -> list[float]:
    case, alone, pipe = both(name, root)

    def seen(which: Any) -> list[torch.Tensor]:
        found = []

        def keep(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            assert not isinstance(given["latents"], DeferredTensor)
            found.append(given["latents"].clone())
            return given

        pipelines.run(which, case, callback_on_step_end=keep)
        return found

    return [difference(a, b) for a, b in zip(seen(pipe), seen(alone), strict=True)]


def looked_at_on_one_rank(name: str, root: str) -> list[float]:
    case, _, pipe = both(name, root)
    found = []

    def look(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if rank() == 0:
            found.append(given["latents"].mean().item())
        return given

    pipelines.run(pipe, case, callback_on_step_end=look)
    return found


def guidance_switched_off(name: str, root: str) -> float:
    """Half-way, as pipelines with a batch of both conditions are told to."""
    case, alone, pipe = both(name, root)

    def off(which: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            which._guidance_scale = 0.0
            for key in ("prompt_embeds", "pooled_prompt_embeds"):
                given[key] = given[key][-1:]
            given["latents"] = given["latents"] * 1.01
        return given

    wanted = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    return apart(case, pipe, alone, callback_on_step_end=off, callback_on_step_end_tensor_inputs=wanted)


def generators(name: str, root: str) -> float:
    case, alone, pipe = both(name, root, "data=2")
    call = case.call() | {"num_images_per_prompt": 3, "return_dict": False}

    def run(which: Any) -> torch.Tensor:
        return which(**call, generator=[torch.Generator().manual_seed(i) for i in (5, 6, 7)])[0]

    return difference(run(pipe), run(alone))


def output(name: str, root: str, output_type: str) -> float:
    case, alone, pipe = both(name, root)

    def run(which: Any) -> torch.Tensor:
        result = which(**case.call() | {"output_type": output_type}, generator=torch.Generator().manual_seed(0))
        images = result.images
        if output_type == "pil":
            return torch.stack([torch.from_numpy(np.asarray(i).astype(np.float32)) for i in images]) / 255
        return torch.as_tensor(images)

    a, b = run(pipe), run(alone)
    # Pictures are rounded to 256 steps.
    return max(difference(a, b) - (1.01 / 255 if output_type == "pil" else 0.0), 0.0)


def scheduler(name: str, root: str, chosen: str) -> float:
    import diffusers

    case, alone, pipe = both(name, root)
    for which in (alone, pipe):
        options: dict[str, Any] = {}
        cls = chosen
        if chosen == "thresholding":
            cls, options = "DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}
        if name == "wan":
            options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        which.scheduler = getattr(diffusers, cls).from_config(which.scheduler.config, **options)
    return apart(case, pipe, alone)


def called_again(name: str, root: str) -> list[float]:
    case, alone, pipe = both(name, root)
    calls: list[dict[str, Any]] = [
        {}, {"prompt": "something else, and longer"}, {"height": 112, "width": 144}, {"num_inference_steps": 3},
        {"true_cfg_scale": 1.0}, {}]
    return [apart(case, pipe, alone, **call) for call in calls]


def interrupted(name: str, root: str, ranks: tuple[int, ...]) -> int:
    """How many steps ended on this rank, of six; these ranks ask to stop after the third."""
    case, _, pipe = both(name, root)
    ended = []

    def stop(which: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        ended.append(step)
        if step == 2 and rank() in ranks:
            which._interrupt = True
        return given

    pipelines.run(pipe, case, callback_on_step_end=stop)
    assert rank() not in ranks or pipe.interrupt
    return len(ended)


def told_apart(name: str, root: str, what: str) -> tuple[str, int, float]:
    """Rank 1 calls with something else. The error, how many models had run, and how a proper call does afterwards."""
    case, alone, pipe = both(name, root)
    call = case.call()
    generator: torch.Generator | None = torch.Generator().manual_seed(rank() if what == "generator" else 0)
    if what == "prompt" and rank() == 1:
        call["prompt"] = "something else"
    if what == "seed":
        torch.manual_seed(rank())
        generator = None
    try:
        pipe(**call, generator=generator)
        text = ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return text, pipe.parallel_group.counts["calls"], apart(case, pipe, alone)


def refused(name: str, root: str) -> tuple[str, float]:
    case, alone, pipe = both(name, root)
    try:
        pipelines.run(pipe, case, height=13)
        text = ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return text, apart(case, pipe, alone)


def failing(name: str, root: str) -> str:
    """Rank 1's callback fails in the second step."""
    case, _, pipe = both(name, root)

    def fail(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and rank() == 1:
            raise LookupError("out of ideas")
        return given

    try:
        pipelines.run(pipe, case, callback_on_step_end=fail)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def bars(name: str, root: str) -> str:
    case, _, pipe = both(name, root)
    pipe.set_progress_bar_config(desc="steps")
    with redirect_stderr(io.StringIO()) as said:
        pipelines.run(pipe, case)
    return said.getvalue()


def offloaded(name: str, root: str) -> float:
    """To the CPU from the CPU, which is all that can be had everywhere: the hooks are the same."""
    case, alone, pipe = both(name, root, "cfg=2,vae=2")
    pipe.enable_model_cpu_offload(device="cpu")
    return apart(case, pipe, alone, output_type="pt")


def half(name: str, root: str) -> tuple[float, float]:
    """The difference to one process, and what rounding to bfloat16 makes."""
    from diffusers import DiffusionPipeline

    path = pipelines.folder(name, Path(root))
    case = pipelines.PIPELINES[name]

    def load() -> Any:
        return DiffusionPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)

    whole = pipelines.run(pipelines.load(path), case)
    alone = pipelines.run(load(), case)
    mine = pipelines.run(xdit_compile.parallelize(load(), "cfg=2", ranks=range(2), timeout=60), case)
    assert mine.dtype == alone.dtype
    return difference(mine.float(), alone.float()), difference(alone.float(), whole)


def decorated(name: str, root: str) -> dict[str, Any]:
    case, alone, _ = both(name, root)
    pipe = pipelines.load(pipelines.folder(name, Path(root)))
    options: dict[str, Any] = {"ranks": range(2), "timeout": 60}
    seen = []

    @xdit_compile.parallel("cfg=2", **options)
    def generate(given: Any, seed: int) -> torch.Tensor:
        seen.append(given)
        return pipelines.run(given, case, seed)

    class Own(type(pipe)):  # type: ignore[misc]
        @torch.no_grad()
        @xdit_compile.parallel("cfg=2", **options)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    expected = pipelines.run(alone, case, 3)
    function = max(difference(generate(pipe, 3), expected) for _ in range(2))
    assert seen[0] is seen[1] and seen[0] is not pipe
    method = difference(pipelines.run(Own(**pipe.components), case, 3), expected)
    return {"function": function, "method": method, "captures": len(seen[0].transformer.runners["forward"].programs)}


def exchanged(name: str, root: str) -> tuple[float, bool]:
    case, alone, pipe = both(name, root)
    other = pipelines.load(pipelines.folder(name, Path(root))).transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    alone.transformer = other
    pipe.transformer = other
    return apart(case, pipe, alone), hasattr(pipe.transformer, "runners")


def unchanged(name: str, root: str) -> bool:
    pipe = pipelines.load(pipelines.folder(name, Path(root)))
    before = dict(vars(pipe)), type(pipe)
    made = xdit_compile.parallelize(pipe, "cfg=2", ranks=range(2), timeout=60)
    same = before == (dict(vars(pipe)), type(pipe)) and isinstance(made, type(pipe))
    return same and made.config == pipe.config and list(made.components) == list(pipe.components)


def decoded(name: str, root: str, spec: str) -> float:
    case, alone, pipe = both(name, root, spec)
    return apart(case, pipe, alone, output_type="pt")


def spread(name: str, root: str) -> tuple[float, tuple[int, int]]:
    """The difference to one process; bytes of encoders' weights here, and as they were."""
    case, alone, pipe = both(name, root, "cfg=2,encoders=spread")

    def held(which: Any) -> int:
        modules = [c for c in which.components.values() if isinstance(c, torch.nn.Module)]
        encoders = [m for m in modules if role_of(m) is Role.ENCODER]
        return sum(p.nbytes for c in encoders for p in c.parameters() if not p.is_meta)

    pipe.to("cpu")
    return apart(case, pipe, alone), (held(pipe), held(alone))


def unfit(name: str, root: str) -> tuple[str, str, str]:
    pipe = pipelines.load(pipelines.folder(name, Path(root)))

    def said(thing: Any, spec: str) -> str:
        try:
            xdit_compile.parallelize(thing, spec, ranks=range(2), timeout=60)
        except xdit_compile.SpecError as error:
            return str(error)
        return ""

    return said(pipe, "cfg=2,encoders=spread"), said(pipe.transformer, "cfg=2,vae=2"), said(pipe, "cfg=2,vae=3")


def alone_in_the_world(name: str, root: str) -> float:
    path = pipelines.folder(name, Path(root))
    case, alone = pipelines.PIPELINES[name], pipelines.load(path)
    return apart(case, xdit_compile.parallelize(pipelines.load(path), "encoders=spread"), alone)


def modular(name: str, root: str) -> tuple[float, dict[int, int]]:
    """The same components in a modular pipeline."""
    from diffusers.modular_pipelines import QwenImageAutoBlocks

    case, path = pipelines.PIPELINES[name], pipelines.folder(name, Path(root))
    call = {k: v for k, v in case.call().items() if k not in ("output_type", "guidance_scale", "true_cfg_scale")}

    def load() -> Any:
        pipe = QwenImageAutoBlocks().init_pipeline()
        pipe.update_components(**pipelines.load(path).components)
        return pipe

    def run(pipe: Any) -> torch.Tensor:
        with redirect_stderr(io.StringIO()):
            return pipe(**call, generator=torch.Generator().manual_seed(0), output="latents")

    pipe = xdit_compile.parallelize(load(), "cfg=2", ranks=range(2), timeout=60)
    return difference(run(pipe), run(load())), dict(pipe.parallel_group.round_robin.fetched)


def _encoders(which: Any) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in which.components.items() if isinstance(c, torch.nn.Module) and (
        role_of(c) is Role.ENCODER)}


def _shares(encoders: Mapping[str, Any]) -> int:
    return sum(t.nbytes for e in encoders.values() for t in [
        *(p for p in e.parameters() if not p.is_meta), *e.shares.store.values()])


def _embedded(which: Any, case: Any, times: int = 2) -> list[torch.Tensor]:
    """What encoders return in some calls."""
    found: list[torch.Tensor] = []
    taken = [e.register_forward_hook(lambda _, args, out: found.extend(t.clone() for t in flatten(out)[0]))
             for e in _encoders(which).values()]
    for _ in range(times):
        pipelines.run(which, case)
    for hook in taken:
        hook.remove()
    return found


def cut(name: str, root: str) -> dict[str, Any]:
    """Whether encoders give the bits of one process; bytes held here and of all; what is said of edits afterwards."""
    case, alone, pipe = both(name, root, "cfg=2,encoders=shard")
    pipe.to("cpu")
    expected, found = _embedded(alone, case), _embedded(pipe, case)
    encoders = _encoders(pipe)
    said = []
    encoder = next(iter(encoders.values()))
    held, report = _shares(encoders), [p.what for p in pipe.report().parts]
    part = next(m for m in encoder.modules() if m is not encoder and any(
        p is not None and p.is_meta for p in m._parameters.values()))
    edits: list[Callable[[], Any]] = [
        encoder.state_dict, lambda: part(torch.zeros(1, 2, dtype=torch.long)),
        lambda: [next(encoder.parameters()).mul_(2), pipelines.run(pipe, case)]]
    for edit in edits:
        try:
            with torch.no_grad():
                edit()
        except xdit_compile.XditError as error:
            said.append(str(error))
    return {"same": len(found) == len(expected) > 0 and all(map(torch.equal, found, expected)), "held": held,
            "all": sum(p.nbytes for e in _encoders(alone).values() for p in e.parameters()), "report": report,
            "said": said}


def cut_from_files(name: str, root: str) -> tuple[bool, int, int]:
    """The same with encoders on the meta device, whose weights are in files; bytes held here and of all."""
    path = pipelines.folder(name, Path(root))
    case, alone, other = pipelines.PIPELINES[name], pipelines.load(path), pipelines.load(path)
    names = list(_encoders(alone))
    for component in names:
        made: dict[int, torch.nn.Parameter] = {}  # what is one parameter stays one
        for module in getattr(other, component).modules():
            for leaf, p in module._parameters.items():
                if p is not None:
                    module._parameters[leaf] = made.setdefault(id(p), torch.nn.Parameter(p.to("meta"), False))
    folder = Path(root) / f"encoders-{rank()}"
    for component in names:
        (folder / component).mkdir(parents=True, exist_ok=True)
        state = {n: p.detach().clone() for n, p in getattr(alone, component).named_parameters()}
        save_file(state, folder / component / "model.safetensors")
    pipe = xdit_compile.parallelize(other, "cfg=2,encoders=shard", ranks=range(2), timeout=60,
                                    weights={n: folder / n for n in names})
    expected, found = _embedded(alone, case, 1), _embedded(pipe, case, 1)
    return (len(found) == len(expected) > 0 and all(map(torch.equal, found, expected)), _shares(_encoders(pipe)),
            sum(p.nbytes for e in _encoders(alone).values() for p in e.parameters()))
