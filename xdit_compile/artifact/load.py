"""Starting a model from an artifact: without its code, without pickles, with nothing captured or planned anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.files import LARGEST_TEXT, ArtifactFolder
from xdit_compile.artifact.graph_reader import Setting, Watch
from xdit_compile.artifact.json_values import look_of, look_text, nbytes_of, structure_of
from xdit_compile.artifact.loaded_model import model_class
from xdit_compile.artifact.memory import Memory, memory_of
from xdit_compile.artifact.native_reader import check_target
from xdit_compile.artifact.parameter_shares import groups_of, share_look
from xdit_compile.artifact.program_reader import Reader, Values, kept_values, results_of
from xdit_compile.artifact.running import Running, needed
from xdit_compile.artifact.stage_reader import read_stage
from xdit_compile.artifact.surroundings import surroundings
from xdit_compile.artifact.weight_files import WeightFiles, placed, tensors_in
from xdit_compile.driver.checkpoint import Checkpoint
from xdit_compile.driver.model_runner import ModelRunner
from xdit_compile.driver.parallel_model import parallel_model
from xdit_compile.errors import ArtifactError, CaptureError, SpecError, XditError
from xdit_compile.ir.layout import BATCH, SEQUENCE, TENSOR
from xdit_compile.ir.mesh import RING, SHARD, STAGE, ULYSSES, axis_sizes, group_name, members, position_of
from xdit_compile.ir.output_spec import OutputSpec
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import Structure, flatten, sharing
from xdit_compile.passes import pass_digests
from xdit_compile.progress import progress
from xdit_compile.runtime.compilation.regional import compiler_for
from xdit_compile.runtime.control.replicas import Replicas
from xdit_compile.runtime.control.tensor_digest import digest
from xdit_compile.runtime.execution.parameter_store import ParameterStore
from xdit_compile.runtime.launch import init_from_env
from xdit_compile.runtime.parallel_group import CheckInputs, ParallelGroup
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram, parameters_of, shares_of
from xdit_compile.spec import ShardingSpec


def load(path: str | Path, weights: str | Path | None = None, *, ranks: Sequence[int] | None = None,
         timeout: float = 600.0, check_inputs: CheckInputs = "behind", backend: str = "eager", mode: str = "default",
         compile_options: str | Mapping[str, Any] = "", onediff_backend: str = "", attention_kernel: str = "auto",
         native: bool = False, device: str | torch.device | None = None, max_memory: int | None = None) -> Any:
    """The model that `export` wrote, on the processes that call this: a module that is called as the original was.

    Every process gets the programs of its rank and maps those weights that they use. The code of the model is not
    needed; where the class of its results is not loaded, they are named fields of the same names.

    Args:
        path: the folder.
        weights: a safetensors file, or a folder of them, if the artifact does not include its weights.
        ranks: the global ranks that take part; all of them by default.
        timeout, check_inputs: as for `parallelize`.
        backend, mode, compile_options, onediff_backend, attention_kernel: how programs are run, as the words of a spec.
            Files have no say in it.
        native: run the functions that were compiled ahead. They are machine code, which is run as it is: ask for it
            only where you trust the artifact.
        device: cpu or cuda; the kind that the artifact was made on by default.
        max_memory: the most bytes that a rank may take, weights included; `inspect` shows what the artifact says.

    Raises:
        ArtifactError: files are damaged, ask for more than they say, or do not fit this machine, these ranks or these
            weights; says which. SpecError: the words for how it is run do not go together.
    """
    if native and (backend, mode, compile_options, onediff_backend, attention_kernel) != (
            "eager", "default", "", "", "auto"):
        raise ArtifactError("native=True runs what was compiled ahead, as it was compiled then; give either it or "
                            "other words for how programs are run")
    folder = ArtifactFolder.at(path)
    running = Running(backend, mode, onediff_backend, compile_options, attention_kernel)
    with progress(f"loading {folder.path}"):
        loading = ArtifactLoader(folder, running, device, native, max_memory=max_memory)
        return loading.model(weights, ranks, timeout, check_inputs)


def spec_and_class(path: str | Path) -> tuple[ShardingSpec, str]:
    """What an artifact was exported for, and the class of its model.

    Raises:
        ArtifactError: there is none.
    """
    manifest = ArtifactFolder.at(path).manifest
    return needed(manifest["spec"]), manifest["model"]["class"].text()


class ArtifactLoader:
    """What a manifest says, and where it shall run.

    Args:
        declared: what a rank takes at most; None to believe the manifest.
    """

    def __init__(self, folder: ArtifactFolder, running: Running, device: str | torch.device | None,
                 native: bool = False, *, declared: Memory | None = None, max_memory: int | None = None) -> None:
        self.folder, manifest = folder, folder.manifest
        self.running, self.native = running, native
        self.spec = running.on(needed(manifest["spec"]))
        if self.spec.backend != "eager":
            compiler_for(self.spec)
        _check_version(folder)
        _check_passes(folder)
        self.device = _device(manifest["device"].text() if device is None else str(device), folder)
        if manifest["world_size"].value != self.spec.world_size:
            raise ArtifactError(f"{folder.path} was made for {manifest['world_size'].value!r:.40} ranks, but its spec "
                                f"{self.spec} asks for {self.spec.world_size}")
        self.declared = Memory.of_json(manifest["memory"]) if declared is None else declared
        self.declared.check_limit(max_memory, str(folder.path))
        self.tensors = {name: look_of(entry) for name, entry in manifest["tensors"].items()}
        shares = manifest["shares"].parts(self.spec.tensor_degree) if self.spec.parts else []
        self.groups = [groups_of(entry, self.tensors) for entry in shares]
        constants = self._constants(manifest["constants"])
        self.constants = sum(t.nbytes for t in constants.values())
        if native and not manifest["native"]:
            raise ArtifactError(f"{folder.path} holds no compiled functions; export it with native=True (--native)")
        if native:
            made_for = {name: entry.text() for name, entry in manifest["native"].items()}
            check_target(made_for, self.device, folder.path)
        self.watch = Watch()
        setting = Setting(self.device, running.attention_kernel, {}, self.declared.values, watch=self.watch)
        self._readers: dict[ShardingSpec, Reader] = {}
        self._make_reader = lambda groups: Reader(folder.read, constants, replace(setting, groups=groups),
                                                  folder.path, folder.file if native else None)
        self.calls = [_Call(folder, number, entry, self) for number, entry in enumerate(manifest["calls"].parts())]
        if not self.calls:
            raise ArtifactError(f"{manifest['calls'].where} is empty")

    def _constants(self, name: Entry) -> dict[str, torch.Tensor]:
        """Constants, of which no more is read than was declared."""
        if not name:
            return {}
        data = self.folder.read(name, self.declared.constants + LARGEST_TEXT)
        return tensors_in(data, self.folder.path / name.text(), self.device)

    def reader(self, spec: ShardingSpec) -> Reader:
        """For programs under ``spec``, each file of which is read once."""
        if spec not in self._readers:
            sizes = axis_sizes(spec)
            self._readers[spec] = self._make_reader({group_name(axis, sizes): sizes[axis] for axis in (
                BATCH, SEQUENCE, TENSOR, ULYSSES, RING, SHARD) if sizes[axis] > 1})
        return self._readers[spec]

    def memory(self, rank: int) -> Memory:
        """What a rank takes at most, whichever call comes."""
        if self.native:
            # Machine code does not say; the graphs that it was made of do.
            return ArtifactLoader(self.folder, self.running, self.device, declared=self.declared).memory(rank)
        made = Memory()
        for call in self.calls:
            program = call.at(rank)
            weights = sum(nbytes_of(self.tensors[name]) for name in program.parameters) + sum(
                nbytes_of(share_look(self.groups_of(rank)[name], self.spec)) for name in program.shares)
            made = made.most(memory_of(program.body, program.invariant, program.stage, weights, self.constants))
        self._check_apart(rank)
        # Operators that are made of others may make more on the way than what comes of it.
        return made.most(Memory(workspace=max(0, self.watch.most - made.values)))

    def groups_of(self, rank: int) -> Mapping[str, ParameterGroup]:
        """What ``rank`` has of parameters that come block by block."""
        return self.groups[position_of(rank, self.spec)[TENSOR]] if self.groups else {}

    def parameters(self, rank: int) -> set[str]:
        """The names of those that ``rank`` takes whole, whichever call comes."""
        return set().union(*(call.at(rank).parameters for call in self.calls))

    def shares(self, rank: int) -> dict[str, ParameterGroup]:
        """The groups that ``rank`` takes a share of, whichever call comes."""
        used = set().union(*(call.at(rank).shares for call in self.calls))
        return {name: group for name, group in self.groups_of(rank).items() if name in used}

    def _check_apart(self, rank: int) -> None:
        """Raise ArtifactError if a parameter is taken whole and as a share, of which there is but one."""
        shared = {m.name for group in self.shares(rank).values() for m in group.members}
        if both := sorted(shared & self.parameters(rank)):
            raise ArtifactError(f"{self.folder.path}: rank {rank} takes the parameter {both[0]!r:.100} whole, and as a "
                                "share of a group")

    def _store(self, model: nn.Module, rank: int, stored: WeightFiles) -> ParameterStore | None:
        """This rank's shares, read from files; ``model`` has stand-ins for them."""
        if not self.spec.parts:
            return None
        store = ParameterStore(tuple(self.groups_of(rank).values()), position_of(rank, self.spec)[SHARD],
                               self.spec.shard_degree, self.spec.offload != "none")
        store.take(model, self.shares(rank), stored.spans, self.device)
        return store

    def model(self, weights: str | Path | None, ranks: Sequence[int] | None, timeout: float, check: CheckInputs) -> Any:
        if self.spec.world_size > 1 and not dist.is_initialized():
            init_from_env(timeout=timeout)
        chosen = list(ranks) if ranks is not None else list(
            range(dist.get_world_size() if dist.is_initialized() else 1))
        try:
            self.spec.check_world(len(chosen))
        except SpecError as error:
            raise ArtifactError(f"{self.folder.path} runs on {self.spec.world_size} processes and no other number; "
                                f"{len(chosen)} are there. Start as many, or export the model for these") from error
        group = ParallelGroup(self.spec, chosen, timeout)
        group.control.agree("load", {"artifact": self.folder.digest, "spec": str(self.spec)})
        manifest = self.folder.manifest
        # What is wrong with an artifact may be wrong on one rank alone, which the others have to be told.
        try:
            self.memory(group.rank).check(self.declared, str(self.folder.path))
            stored = WeightFiles.of(manifest, self.folder, weights)
            tensors = stored.load(self.parameters(group.rank), self.device)
            shared = [m.name for g in self.shares(group.rank).values() for m in g.members]
            given = tensors | stored.meta(shared, self.device)
            model = placed(model_class(manifest), given, stored.buffers - set(shared))
            store = self._store(model, group.rank, stored)
        except XditError as error:
            group.control.agree("the artifact", {"error": str(error)})
            raise
        group.control.agree("the artifact", {"error": "none"})
        if store is not None and weights is not None:
            group.control.agree("the files of weights", {"files": Checkpoint.at(weights).digest()})
        runner = _Runner(model, group, check, _Calls(self.folder, self.calls))
        runner.store = store
        made: Any = parallel_model(model, {"forward": runner})
        return made


class _Runner(ModelRunner):
    """Calls of a loaded model. What an operator refuses is the fault of the artifact, or of values that it was not made
    for, and is told so; memory that is not there is nobody's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replicas = Replicas(parts=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except (XditError, torch.OutOfMemoryError):
            raise
        except (KeyError, AttributeError) as error:
            assert isinstance(self.source, _Calls)
            raise ArtifactError(f"{self.source.folder.path}: a module or a parameter is gone that its programs read "
                                f"({error}); they are those of the model that was exported") from error
        except (RuntimeError, IndexError, ValueError) as error:
            assert isinstance(self.source, _Calls)
            raise ArtifactError(f"{self.source.folder.path}: an operator of its program failed in this call: "
                                f"{type(error).__name__}: {error}") from error


def _check_version(folder: ArtifactFolder) -> None:
    made, here = folder.manifest["made_with"]["torch"], torch.__version__
    found = _SERIES.match(made.text())
    if found is None:
        raise made.wrong("version of PyTorch")
    if tuple(map(int, found.groups())) > tuple(map(int, here.split("+")[0].split(".")[:2])):
        raise ArtifactError(f"{folder.path} was made with PyTorch {made.value}, this is {here}; use that version or a "
                            "later one, or export the model anew")


def _check_passes(folder: ArtifactFolder) -> None:
    """What older or newer passes have made is never run: they may have been mended since."""
    here = pass_digests()
    made = {name: digest.text() for name, digest in folder.manifest["passes"].items()}
    if others := sorted(name for name in made.keys() | here.keys() if made.get(name) != here.get(name)):
        raise ArtifactError(f"{folder.path} was made by other passes of xdit_compile than this version has "
                            f"({', '.join(others)[:200]}); export the model anew, or use the version that wrote it, "
                            f"{folder.manifest['made_with']['xdit_compile'].text()}")


_SERIES = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?![0-9])")


def _device(asked: str, folder: ArtifactFolder) -> torch.device:
    if asked.partition(":")[0] not in ("cpu", "cuda"):
        raise ArtifactError(f"{folder.path} asks for the device {asked!r:.100}; there are cpu and cuda")
    device = torch.device(asked.partition(":")[0])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{folder.path} was made for cuda, which is not there; give device='cpu' to run it here")
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@dataclass(frozen=True)
class StoredProgram:
    """What one rank runs for one kind of call, as it was written."""

    name: str
    body: Program
    invariant: Program | None
    output_spec: OutputSpec
    unsharded: bool
    stage: StageProgram | None = None
    step: None = None
    lost: str = ""

    @property
    def parameters(self) -> set[str]:
        return self.stage.parameters if self.stage else parameters_of(self.body, self.invariant)

    @property
    def shares(self) -> set[str]:
        return self.stage.shares if self.stage else shares_of(self.body, self.invariant)

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        return ()  # shares are there before the first call

    def digest(self) -> dict[str, str]:
        return {"artifact and call": self.name}


class _Call:
    """One kind of call of an artifact."""

    def __init__(self, folder: ArtifactFolder, number: int, entry: Entry, loading: ArtifactLoader) -> None:
        self.entry, self.loading = entry, loading
        self.name = f"{folder.digest[:16]}.{number}"
        self.spec = loading.running.on(needed(entry["spec"]))
        if self.spec not in (loading.spec, replace(loading.spec, cfg_degree=1)):
            raise ArtifactError(f"{entry['spec'].where} is {self.spec}, in an artifact for {loading.spec}")
        self.inputs, self.outputs = structure_of(entry["inputs"]), structure_of(entry["outputs"])
        self.looks = [look_of(e) for e in entry["looks"].parts(self.inputs.tensor_count)]
        self.results = [look_of(e) for e in entry["results"].parts(self.outputs.tensor_count)]
        _check_pairs(entry, self.inputs, self.outputs)
        self.sharing = entry["sharing"].wholes()
        self.reads = {i: e.text() for i, e in entry["reads"].numbered()}
        self.surroundings = entry["surroundings"].text()
        if len(self.sharing) != len(self.looks) or any(i >= len(self.looks) for i in self.reads):
            raise ArtifactError(f"{entry.where}: sharing or reads are not of its {len(self.looks)} tensors")
        self._made: dict[int, StoredProgram] = {}
        if len(entry["ranks"].parts()) != self.spec.world_size:
            raise ArtifactError(f"{folder.path} has programs for {len(entry['ranks'].parts())} ranks, not "
                                f"{self.spec.world_size}")
        if self.spec.pipefusion_degree > 1:
            _check_columns(entry["ranks"], self.spec)

    def differs(self, structure: Structure, tensors: Sequence[torch.Tensor]) -> str | None:
        """In what a call is not of this kind."""
        if (here := surroundings()) != self.surroundings:
            return f"it was exported under {self.surroundings}, and is called under {here}"
        if structure.key() != self.inputs.key():
            return "its arguments other than tensors, or their containers, differ"
        for i, (t, look) in enumerate(zip(tensors, self.looks, strict=True)):
            if (tuple(t.shape), t.dtype) != look:
                return f"tensor {i} is {_text(tuple(t.shape), t.dtype)}, not {_text(*look)}"
        if sharing(tensors) != self.sharing:
            return "other arguments are one and the same tensor"
        for i, text in self.reads.items():
            if digest(tensors[i].cpu()) != text:
                return f"the model reads the values of tensor {i}, which are not those it was exported with"
        return None

    def of(self, rank: int) -> StoredProgram:
        """What this rank runs."""
        if rank not in self._made:
            entry, reader = self.entry["ranks"].parts()[rank], self.loading.reader(self.spec)
            position = position_of(rank, self.spec)
            with FakeTensorMode():
                likes = tuple(torch.empty(shape, dtype=dtype, device=self.loading.device)
                              for shape, dtype in self.results)
            output_spec, unsharded = OutputSpec(self.outputs, (), likes), entry["unsharded"].flag()
            state = {("parameter", name): look for name, look in self.loading.tensors.items()}
            state |= {("argument", f"arg_{i}"): look for i, look in enumerate(self.looks)}
            state |= {("parameter_share", name): share_look(group, self.spec)
                      for name, group in self.loading.groups_of(rank).items()}
            if ("stage" in entry) != (self.spec.pipefusion_degree > 1):
                raise ArtifactError(f"{entry.where} is a stage of a pipeline, or none, where {self.spec} asks for the "
                                    "other")
            if "stage" in entry:
                stage = read_stage(reader, entry["stage"], self.spec, position, state, self.results)
                made = StoredProgram(self.name, stage.once, stage.invariant, output_spec, unsharded, stage)
            else:
                body, invariant = self._parted(entry, reader, position, state)
                made = StoredProgram(self.name, body, invariant, output_spec, unsharded)
            self._made[rank] = made
        return self._made[rank]

    def _parted(self, entry: Entry, reader: Reader, position: Mapping[str, int],
                state: Values) -> tuple[Program, Program | None]:
        """A program, and what of it is kept from step to step."""
        def program(written: Entry, values: Values, part: bool) -> Program:
            return reader.program(written, self.spec, position, lambda *what: values.get(what), part=part)

        invariant = program(entry["invariant"], state, True) if entry["invariant"] else None
        body = program(entry["body"], {**state, **kept_values(entry["body"], invariant)}, False)
        if (found := results_of(body)) != self.results:
            ours, theirs = (", ".join(map(look_text, looks))[:200] for looks in (found, self.results))
            raise ArtifactError(f"{entry.where}: its program returns {ours}, but the model {theirs}")
        return body, invariant

    def at(self, rank: int) -> StoredProgram:
        """What ``rank`` of all runs. Where groups take turns, its place is in its own."""
        return self.of(rank % self.spec.world_size)


def _check_pairs(entry: Entry, inputs: Structure, outputs: Structure) -> None:
    """Arguments are those by place and those by name; an answer is what is returned, and nothing that is left in
    arguments, as artifacts have no such calls."""
    args, kwargs = _pair(inputs, entry["inputs"])
    _, left = _pair(outputs, entry["outputs"])
    if type(args) is not tuple or type(kwargs) is not dict or left is not None:
        raise ArtifactError(f"{entry.where}: its inputs are no arguments, or its outputs are left in them")


def _pair(structure: Structure, entry: Entry) -> tuple[Any, Any]:
    made = structure.build(range(structure.tensor_count))
    if type(made) is not tuple or len(made) != 2:
        raise entry.wrong("pair")
    return made


def _check_columns(ranks: Entry, spec: ShardingSpec) -> None:
    """The stages of one pipeline agree on what they send each other."""
    entries = ranks.parts()
    for rank, entry in enumerate(entries):
        first = entries[members(STAGE, rank, spec)[0]]
        for key in ("edges", "cuts", "samples"):
            if entry["stage"][key].value != first["stage"][key].value:
                raise ArtifactError(f"{entry['stage'][key].where} is not that of the other stages")


class _Calls:
    """The kinds of calls of an artifact, as a source of programs."""

    def __init__(self, folder: ArtifactFolder, calls: Sequence[_Call]) -> None:
        self.folder, self.calls, self.changes = folder, calls, 0

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any], fresh: bool = False) -> _Call | None:
        tensors, structure = flatten((tuple(args), dict(kwargs)))
        return next((c for c in self.calls if c.differs(structure, tensors) is None), None)

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
        if (found := self.find(args, kwargs)) is not None:
            return found
        tensors, structure = flatten((tuple(args), dict(kwargs)))
        why = "; ".join(f"call {i}: {c.differs(structure, tensors)}" for i, c in enumerate(self.calls))
        given = ", ".join(_text(tuple(t.shape), t.dtype) for t in tensors)
        raise CaptureError(f"{self.folder.path} has no program for this call with tensors {given}: {why}. Export the "
                           "model with inputs like these as well")

    def compiled(self, kind: _Call, spec: ShardingSpec, rank: int, stages: Mapping[str, int],
                 groups: Sequence[ParameterGroup]) -> StoredProgram:
        if spec != kind.spec:
            raise SpecError(f"this call was exported for {kind.spec}, not {spec}")
        return kind.of(rank)


def _text(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
