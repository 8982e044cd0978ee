"""Starting a model from an artifact: without its code, without pickles, with nothing captured or planned anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.answer import Answer
from xdit_compile.artifact.files import Folder
from xdit_compile.artifact.native_reader import check_target
from xdit_compile.artifact.program_reader import Reader
from xdit_compile.artifact.tensors import Stored, placed
from xdit_compile.artifact.values import Fields, Json, look_of, signature_of, structure_of
from xdit_compile.errors import ArtifactError, CaptureError, SpecError, XditError
from xdit_compile.launch import init_from_env
from xdit_compile.mesh import position_of
from xdit_compile.program import Program
from xdit_compile.runner import Runner
from xdit_compile.runtime.crew import Crew
from xdit_compile.runtime.digest import digest
from xdit_compile.runtime.flow import StageProgram, parameters_of
from xdit_compile.spec import ShardingSpec
from xdit_compile.standin import parallel_model
from xdit_compile.structure import Structure, flatten, sharing


def load(path: str | Path, weights: str | Path | None = None, *, ranks: Sequence[int] | None = None,
         timeout: float = 600.0, check_inputs: bool = True, backend: str | None = None, native: bool = False,
         device: str | torch.device | None = None) -> Any:
    """The model that `export` wrote, on the processes that call this: a module that is called as the original was.

    Every process gets the programs of its rank and maps those weights that they use. The code of the model is not
    needed; where the class of its results is not loaded, they are named fields of the same names.

    Args:
        path: the folder.
        weights: a safetensors file, or a folder of them, if the artifact does not include its weights.
        ranks: the global ranks that take part; all of them by default.
        timeout, check_inputs: as for `parallelize`.
        backend: how programs run, if otherwise than the spec of the artifact says.
        native: run the functions that were compiled ahead. They are machine code, which is run as it is: ask for it
            only where you trust the artifact.
        device: cpu or cuda; the kind that the artifact was made on by default.

    Raises:
        ArtifactError: files are damaged, or do not fit this machine, these ranks or these weights; says which.
    """
    folder = Folder.at(path)
    with reading(folder):
        return Loading(folder, backend, device, native).model(weights, ranks, timeout, check_inputs)


@contextmanager
def reading(folder: Folder) -> Iterator[None]:
    """Within: what a manifest lacks, or says wrongly, is told as its fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, XditError):
            raise
        raise ArtifactError(f"{folder.path}: its manifest does not say what it should ({type(error).__name__}: {error})"
                            ) from error


class Loading:
    """What a manifest says, and where it shall run."""

    def __init__(self, folder: Folder, backend: str | None, device: str | torch.device | None,
                 native: bool = False) -> None:
        self.folder, manifest = folder, folder.manifest
        if native and backend not in (None, "eager"):
            raise ArtifactError(f"native=True runs what was compiled ahead, and backend={backend!r} would compile it "
                                "anew; give one of them")
        self.backend = "eager" if native else backend
        self.spec = self.on_backend(manifest["spec"])
        _check_version(folder)
        self.device = _device(manifest["device"] if device is None else str(device), folder)
        if manifest["world_size"] != self.spec.world_size:
            raise ArtifactError(f"{folder.path} was made for {manifest['world_size']} ranks, but its spec {self.spec} "
                                f"asks for {self.spec.world_size}")
        name = manifest["constants"]
        constants = Stored.read(folder.file(name), self.device) if name else {}
        if native and manifest["native"] is None:
            raise ArtifactError(f"{folder.path} holds no compiled functions; export it with native=True (--native)")
        if native:
            check_target(manifest["native"], self.device, folder.path)
        self.reader = Reader(folder.read, constants, self.device, folder.file if native else None)
        self.calls = [_Call(folder, number, entry, self) for number, entry in enumerate(manifest["calls"])]

    def on_backend(self, spec: str) -> ShardingSpec:
        """A spec of the manifest, with the backend that was asked for."""
        parsed = ShardingSpec.parse(spec)
        if self.backend in (None, parsed.backend):
            return parsed
        assert self.backend is not None
        return replace(parsed, backend=self.backend, compile_mode="default", onediff_backend="", compile_options="")

    def model(self, weights: str | Path | None, ranks: Sequence[int] | None, timeout: float, check: bool) -> Any:
        if self.spec.world_size > 1 and not dist.is_initialized():
            init_from_env(timeout=timeout)
        chosen = list(ranks) if ranks is not None else list(
            range(dist.get_world_size() if dist.is_initialized() else 1))
        try:
            self.spec.check_world(len(chosen))
        except SpecError as error:
            raise ArtifactError(f"{self.folder.path} runs on {self.spec.world_size} processes and no other number; "
                                f"{len(chosen)} are there. Start as many, or export the model for these") from error
        crew = Crew(self.spec, chosen, timeout)
        crew.control.agree("load", {"artifact": self.folder.digest, "spec": str(self.spec)})
        manifest = self.folder.manifest
        stored = Stored.of(manifest["tensors"], manifest["weights"], self.folder, weights)
        needed = set().union(*(call.parameters(crew.rank) for call in self.calls))
        try:
            tensors = stored.load(needed, self.device)
        except XditError as error:
            crew.control.agree("the weights", {"error": str(error)})
            raise
        crew.control.agree("the weights", {"error": "none"})
        model = placed(_class(manifest), tensors, stored.buffers)
        made: Any = parallel_model(model, {"forward": Runner(model, crew, check, _Calls(self.folder, self.calls))})
        return made


def _check_version(folder: Folder) -> None:
    made, here = folder.manifest["made_with"]["torch"], torch.__version__
    if _series(made) > _series(here):
        raise ArtifactError(f"{folder.path} was made with PyTorch {made}, this is {here}; use that version or a later "
                            "one, or export the model anew")


def _series(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("+")[0].split(".")[:2])


def _device(asked: str, folder: Folder) -> torch.device:
    device = torch.device(asked)
    if device.type not in ("cpu", "cuda"):
        raise ArtifactError(f"{folder.path} asks for the device {asked!r}; there are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{folder.path} was made for cuda, which is not there; give device='cpu' to run it here")
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@dataclass(frozen=True)
class StoredProgram:
    """What one rank runs for one kind of call, as it was written."""

    name: str
    body: Program
    steady: Program | None
    answer: Answer
    idle: bool
    stage: StageProgram | None = None
    lost: str = ""

    @property
    def parameters(self) -> set[str]:
        return self.stage.parameters if self.stage else parameters_of(self.body, self.steady)

    def digest(self) -> dict[str, str]:
        return {"artifact and call": self.name}


class _Call:
    """One kind of call of an artifact."""

    def __init__(self, folder: Folder, number: int, entry: Json, loading: Loading) -> None:
        self.entry, self.loading = entry, loading
        self.name = f"{folder.digest[:16]}.{number}"
        self.spec = loading.on_backend(entry["spec"])
        self.inputs = structure_of(entry["inputs"])
        self.looks = [look_of(e) for e in entry["looks"]]
        self.sharing = tuple(entry["sharing"])
        self.reads = {int(i): text for i, text in entry["reads"].items()}
        self._made: dict[int, StoredProgram] = {}
        if len(entry["ranks"]) != self.spec.world_size:
            raise ArtifactError(f"{folder.path} has programs for {len(entry['ranks'])} ranks, not "
                                f"{self.spec.world_size}")

    def differs(self, structure: Structure, tensors: Sequence[torch.Tensor]) -> str | None:
        """In what a call is not of this kind."""
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
            entry, reader, position = self.entry["ranks"][rank], self.loading.reader, position_of(rank, self.spec)
            with FakeTensorMode():
                likes = tuple(torch.empty(shape, dtype=dtype, device=self.loading.device)
                              for shape, dtype in map(look_of, self.entry["results"]))
            answer = Answer(structure_of(self.entry["outputs"]), (), likes)
            if "stage" in entry:
                stage = reader.stage(entry["stage"], self.spec, position)
                made = StoredProgram(self.name, stage.once, stage.steady, answer, bool(entry["idle"]), stage)
            else:
                body = reader.program(entry["body"], self.spec, position)
                steady = reader.program(entry["steady"], self.spec, position) if entry["steady"] else None
                made = StoredProgram(self.name, body, steady, answer, bool(entry["idle"]))
            self._made[rank] = made
        return self._made[rank]

    def parameters(self, rank: int) -> set[str]:
        """The names of those that ``rank`` of all takes. Where groups take turns, its place is in its own."""
        return self.of(rank % self.spec.world_size).parameters


class _Calls:
    """The kinds of calls of an artifact, as a source of programs."""

    def __init__(self, folder: Folder, calls: Sequence[_Call]) -> None:
        self.folder, self.calls = folder, calls

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
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

    def compiled(self, kind: _Call, spec: ShardingSpec, rank: int, stages: Mapping[str, int]) -> StoredProgram:
        if spec != kind.spec:
            raise SpecError(f"this call was exported for {kind.spec}, not {spec}")
        return kind.of(rank)


def _text(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


class Loaded(nn.Module):
    """A model without code: its parameters, and what callers ask of a model of diffusers."""

    config: Fields

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))


def _class(manifest: Mapping[str, Any]) -> type[Loaded]:
    """One with the signature of the original's forward, by its name."""
    signature = signature_of(manifest["signature"])
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("calls of a loaded model go to its runner")

    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    described = manifest["model"]
    config = Fields({str(k): structure_of(v).build(()) for k, v in described["config"].items()})
    name = described["class"] if str(described["class"]).isidentifier() else "Model"
    return type(name, (Loaded,), {"forward": forward, "config": config, "__module__": __name__})


