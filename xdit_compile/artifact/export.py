"""Writing a compiled parallel model as an artifact: no processes, no devices, weights only where they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import xdit_compile  # whose version it is when it is asked for
from xdit_compile.artifact.files import ArtifactDraft, ArtifactFolder, drafted
from xdit_compile.artifact.json_values import (
    Json,
    dtype_name,
    look_json,
    signature_json,
    structure_json,
)
from xdit_compile.artifact.load import ArtifactLoader
from xdit_compile.artifact.memory import UNLIMITED, Memory
from xdit_compile.artifact.native_reader import target_of
from xdit_compile.artifact.native_writer import AheadOfTimePackages
from xdit_compile.artifact.parameter_shares import groups_json
from xdit_compile.artifact.program_writer import program_json, stage_json
from xdit_compile.artifact.running import Running
from xdit_compile.artifact.surroundings import surroundings
from xdit_compile.driver.captured_programs import CapturedPrograms
from xdit_compile.driver.compile_call import Compiled
from xdit_compile.errors import ArtifactError, SpecError, XditError
from xdit_compile.ir.call_arguments import Inputs, call_arguments
from xdit_compile.ir.guards import Guards
from xdit_compile.ir.layout import TENSOR
from xdit_compile.ir.mesh import position_of
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten, sharing
from xdit_compile.ir.released_parameters import device_of_model
from xdit_compile.passes import pass_digests
from xdit_compile.planner.auto import Auto, resolved
from xdit_compile.runtime.control.tensor_digest import digest
from xdit_compile.spec import ShardingSpec

Progress = Callable[[str], None]


def export(model: nn.Module, spec: str | dict | ShardingSpec | Auto, example_inputs: Inputs | Sequence[Inputs],
           path: str | Path, *, weights: str = "reference", native: bool = False, overwrite: bool = False,
           progress: Progress = lambda _: None) -> Path:
    """Write what every rank runs of ``model`` under ``spec`` into a folder that `load` starts from, without the model's
    code. No processes take part, and the model may be on the meta device.

    Args:
        example_inputs: the arguments of one call, or a list of several, one for each kind of call that is to be served.
        path: the folder, which is there whole or not at all.
        weights: ``reference`` leaves them in the model's own safetensors files, which `load` is told of; ``included``
            writes them into the artifact, those of each stage as one file.
        native: also compile every function ahead by AOTInductor, for the kind of device that the model is on; takes a
            while, and `load` runs it where PyTorch and the device are the same. The spec's words for inductor and its
            attention kernel are for this; without it how programs are run is for `load` to be told.
        overwrite: whether an artifact that is there is replaced.
        progress: called with what is done next.

    Returns:
        The folder.

    Raises:
        ArtifactError: the model is of a kind that artifacts cannot hold. CaptureError, SpecError: as `parallelize`.
    """
    calls: Sequence[Inputs] = example_inputs if _several(example_inputs) else [example_inputs]  # type: ignore
    spec, path = resolved(spec, model, *call_arguments(model, calls[0])), Path(path)
    if weights not in ("reference", "included"):
        raise ArtifactError(f"weights are left by 'reference' or 'included', not {weights!r}")
    if spec.keeps_steps:
        raise ArtifactError(f"{spec} lets steps use values of steps before ({spec.approximate}), which "
                            "artifacts cannot hold yet; leave cache and displaced out here, or parallelize the model "
                            "itself with them")
    if native and spec.offload != "none":
        raise ArtifactError(f"offload={spec.offload} has copies that go on while functions run, which no compiled "
                            "function can start; leave native=True (--native) out, or offload")
    if (words := Running.of(spec).words) and not (native and spec.backend in ("eager", "inductor")):
        raise ArtifactError(f"{' and '.join(words)} says how programs are run, which is not written into an artifact; "
                            "leave it out here and give it to load()" + (
                                ", or give native=True to compile ahead" if spec.backend == "inductor" else ""))
    if spec.vae_degree > 1 or spec.encoders != "everywhere":
        raise SpecError(f"{spec} speaks of a pipeline's autoencoder or encoders, but an artifact holds one model")
    with drafted(path, overwrite) as draft:
        writer = _Writer(model, spec, draft, progress, native)
        written = [writer.call(*call_arguments(model, inputs), number) for number, inputs in enumerate(calls)]
        tensors, files = writer.tensors(weights == "included")
        manifest = {
            "made_with": {"xdit_compile": xdit_compile.__version__, "torch": torch.__version__},
            "passes": pass_digests(),
            "model": {"class": type(model).__name__, "config": _config(model)},
            "spec": str(Running().on(spec)), "world_size": spec.world_size, "device": device_of_model(model).type,
            "signature": signature_json(inspect.signature(model.forward)), "calls": written,
            "constants": writer.constants_file(),
            "tensors": tensors, "weights": files, "shares": writer.shares(),
            "native": target_of(device_of_model(model)) if native else None}
        progress("reading it again")
        draft.finish({**manifest, "memory": Memory().to_json()})
        draft.finish({**manifest, "memory": _memory(draft.folder).to_json()})
    return path


def _memory(folder: Path) -> Memory:
    """What a rank takes at most of what was written, which is read as `load` does: all of it can be."""
    loading, made = ArtifactLoader(ArtifactFolder.at(folder), Running(), None, declared=UNLIMITED), Memory()
    for rank in range(loading.spec.world_size):
        made = made.most(loading.memory(rank))
    return made


class _Writer:
    """What is collected while the calls are written."""

    def __init__(self, model: nn.Module, spec: ShardingSpec, draft: ArtifactDraft, progress: Progress,
                 native: bool) -> None:
        self.model, self.spec, self.draft, self.progress = model, spec, draft, progress
        self.source, self.packages = CapturedPrograms(model), AheadOfTimePackages(draft.add) if native else None
        self.constants: dict[str, torch.Tensor] = {}
        self.known: dict[tuple[Any, ...], str] = {}
        self.stages: dict[str, int] = {}
        self.used: dict[int, set[str]] = {}
        """Names of parameters, by stage."""
        self.groups: list[dict[str, ParameterGroup]] = [{} for _ in range(spec.tensor_degree)]
        """Of parameters that come block by block, as each tensor rank has them: all calls have the same ones."""
        self.shared: list[set[str]] = [set() for _ in range(spec.tensor_degree)]
        """Which of them programs use."""

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any], number: int) -> Json:
        """One kind of call, as every rank runs it."""
        self.progress(f"call {number}: capture")
        tensors, structure = flatten((tuple(args), dict(kwargs)))
        captured = self.source.make(args, kwargs)
        if captured.output_spec.changes_arguments:
            raise ArtifactError(f"{type(self.model).__name__} changes what is in its arguments in this call, as a "
                                "cache does; artifacts hold only calls that return their results")
        spec, compiled = self._first(captured)
        ranks = [self._rank(compiled, spec, 0)]
        for rank in range(1, spec.world_size):
            self.progress(f"call {number}: rank {rank} of {spec.world_size}")
            ranks.append(self._rank(self._compiled(captured, spec, rank), spec, rank))
        return {
            "spec": str(Running().on(spec)), "inputs": structure_json(structure), "surroundings": surroundings(),
            "looks": [look_json(t) for t in tensors],
            "sharing": list(sharing(tensors)), "reads": _reads(captured.guards, tensors),
            "outputs": structure_json(captured.outputs), "results": [look_json(t) for t in captured.output_spec.likes],
            "ranks": ranks}

    def _first(self, captured: Program) -> tuple[ShardingSpec, Compiled]:
        """What the first rank runs, and under which spec: the whole one or, where groups take turns because a batch
        cannot be cut, that of one group."""
        try:
            return self.spec, self._compiled(captured, self.spec, 0)
        except SpecError:
            if self.spec.cfg_degree == 1:
                raise
        part = replace(self.spec, cfg_degree=1)
        return part, self._compiled(captured, part, 0)

    def _compiled(self, captured: Program, spec: ShardingSpec, rank: int) -> Compiled:
        tensor = position_of(rank, spec)[TENSOR]
        known = tuple(self.groups[tensor].values()) or (parameter_groups(self.model) if spec.parts else ())
        made = self.source.compiled(captured, spec, rank, self.stages, known)
        self.groups[tensor] = {group.name: group for group in made.groups}
        return made

    def _rank(self, compiled: Compiled, spec: ShardingSpec, rank: int) -> Json:
        packages = self.packages

        def write(program: Program) -> Json:
            package = None if packages is None else lambda module: packages.of(module, spec, rank)
            return program_json(program, self.draft.add, self._constant, package)

        stage = compiled.stage
        index = rank // self.spec.ranks_per_stage % self.spec.pipefusion_degree
        if stage is not None:
            self.stages |= {path: i for i, paths in enumerate(stage.blocks) for path in paths}
            programs = {"stage": stage_json(stage, write)}
        else:
            programs = {"body": write(compiled.body),
                        "invariant": write(compiled.invariant) if compiled.invariant else None}
        tensor = position_of(rank, spec)[TENSOR]
        self.shared[tensor] |= compiled.shares
        members = {m.name for name in compiled.shares for m in self.groups[tensor][name].members}
        self.used.setdefault(index, set()).update(compiled.parameters | members)
        return {"unsharded": compiled.unsharded, **programs}

    def _constant(self, tensor: torch.Tensor) -> str:
        """Its name in the file of constants, which holds each content once."""
        key = (digest(tensor.cpu()), tensor.stride())
        if key not in self.known:
            self.known[key] = f"constant_{len(self.known)}"
            self.constants[self.known[key]] = tensor.detach().cpu()
        return self.known[key]

    def constants_file(self) -> str | None:
        return _save(self.draft, "constants.safetensors", self.constants) if self.constants else None

    def shares(self) -> Json:
        """What each tensor rank has of parameters that come block by block; nothing where they do not."""
        return [groups_json(group for name, group in groups.items() if name in used)
                for groups, used in zip(self.groups, self.shared, strict=True)] if self.spec.parts else None

    def tensors(self, included: bool) -> tuple[Json, Json]:
        """What is known of each parameter and buffer that some rank uses; and the files that hold them here."""
        # Of packed tensors the parts, which no file of the model's has: they are always included.
        everything = named_parts({**dict(self.model.named_parameters(remove_duplicate=False)),
                                  **dict(self.model.named_buffers(remove_duplicate=False))})
        saved, names = self.model.state_dict().keys(), sorted(set().union(*self.used.values()))
        first: dict[int, str] = {}
        made: dict[str, Any] = {}
        for name in names:
            tensor = everything[name]
            made[name] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype),
                          "buffer": not isinstance(tensor, nn.Parameter), "saved": name in saved}
            if first.setdefault(id(tensor), name) != name:
                made[name]["same_as"] = first[id(tensor)]
            # Files of a model may hold shared tensors by any of their names.
            made[name]["also"] = [n for n, t in everything.items() if t is tensor and n != name and n in saved]
        files = {}
        own = [n for n in names if n not in saved]
        parts = {f"stage-{i}": sorted(used) for i, used in sorted(self.used.items())} if included else (
            {"buffers": own} if own else {})
        for stem, held in parts.items():
            self.progress(f"writing weights: {stem}")
            absent = [n for n in held if everything[n].is_meta]
            if absent:
                raise ArtifactError(f"{absent[0]} and {len(absent) - 1} more are on the meta device, but have to be "
                                    "written into the artifact: " + (
                                        "give weights='reference', or load the model" if included else
                                        "buffers that are not saved have to be made with the model"))
            distinct = {made[n].get("same_as", n): everything[n] for n in held}
            files[_save(self.draft, f"{stem}.safetensors", distinct)] = sorted(distinct)
        return made, files


def _save(draft: ArtifactDraft, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    try:
        library = import_module("safetensors.torch")
    except ImportError as error:
        raise ArtifactError("artifacts keep tensors as safetensors, which is not installed; pip install safetensors"
                            ) from error
    # Neither views of one memory nor what is not contiguous can be saved as it is.
    library.save_file({n: t.detach().cpu().contiguous().clone() if _shares(t) else t.detach().cpu().contiguous()
                       for n, t in tensors.items()}, str(draft.folder / name))
    return draft.adopt(name)


def _shares(tensor: torch.Tensor) -> bool:
    """Whether it is a part of a larger memory."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _several(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and len(inputs) > 0 and all(
        isinstance(one, Mapping) or (isinstance(one, (list, tuple)) and not hasattr(one, "_fields")) for one in inputs)


def _reads(guards: Guards, tensors: Sequence[torch.Tensor]) -> Json:
    """Digests of the arguments whose values the program was made for."""
    places = {step.args[0] for step in guards.steps if step.func is None}
    read = sorted(place for place in places if isinstance(place, int)) if any(
        step.answer is not None for step in guards.steps) else []
    if state := sorted(place for place in places if isinstance(place, str)):
        raise ArtifactError(f"the forward reads the values of {', '.join(state)} into Python; an artifact may be given "
                            "other weights later, for which its programs would be wrong. Pass them as arguments, or as "
                            "Python numbers")
    return {str(i): digest(tensors[i].cpu()) for i in read}


def _config(model: nn.Module) -> Json:
    """Those entries of the model's configuration that are plain values: callers read them."""
    config = getattr(model, "config", None)
    found = {}
    for name, value in dict(config).items() if isinstance(config, Mapping) else ():
        try:
            found[name] = structure_json(flatten(value)[1])
        except XditError:
            continue
    return found
