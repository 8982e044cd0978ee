"""The weights of an artifact: checked by the headers of their files, mapped where that can be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.files import ArtifactFolder
from xdit_compile.artifact.json_values import DEEPEST, look_of
from xdit_compile.artifact.loaded_model import Holder
from xdit_compile.driver.checkpoint import Checkpoint, Span, span_of
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.parameter_groups import Member
from xdit_compile.ir.released_parameters import absent

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64}


@dataclass(frozen=True)
class WeightFiles:
    """Where the tensors of a model are.

    Attributes:
        looks: shape and type of each that programs use; aliases: names that mean the same tensor, it first.
        files: of each, that which holds it, and under which name; buffers: names of those that are no parameters.
    """

    looks: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: Mapping[str, tuple[str, ...]]
    files: Mapping[str, tuple[Path, str]]
    buffers: frozenset[str]

    @staticmethod
    def of(manifest: Entry, folder: ArtifactFolder, weights: str | Path | None) -> WeightFiles:
        """From what the manifest says of tensors, and the weights that the user named.

        Raises:
            ArtifactError: they are nowhere, or in other shapes or types than the model's.
        """
        entries = manifest["tensors"].items()
        looks = {name: look_of(entry) for name, entry in entries}
        aliases = {name: (name, *([e["same_as"].text()] if "same_as" in e else []), *e["also"].texts())
                   for name, e in entries}
        # A hash of all of them would take longer than to map them.
        places = {name: (folder.file(Entry(file, names.where), whole=False), name)
                  for file, names in manifest["weights"].items() for name in names.texts()}
        given = {} if weights is None else {
            name: (path, name) for name, path in Checkpoint.at(weights).files.items()}
        found: dict[str, tuple[Path, str]] = {}
        for name, names in aliases.items():
            place = next((held[n] for held in (places, given) for n in names if n in held), None)
            if place is not None:
                found[name] = place
        if missing := [name for name in looks if name not in found]:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ArtifactError(f"{weights} has no {shown:.500}" if weights is not None else
                                f"{folder.path} does not include {shown:.500}; give weights=FOLDER with the model's "
                                "safetensors")
        return WeightFiles(looks, aliases, found, frozenset(n for n, e in entries if e["buffer"].flag()))

    def load(self, names: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
        """These tensors; one where names mean the same. On a CPU they are mapped: read when they are used.

        Raises:
            ArtifactError: one has another shape or type in its file.
        """
        made: dict[tuple[Path, str], torch.Tensor] = {}
        for path in sorted({self.files[n][0] for n in names}):
            with readable(path), _library().safe_open(str(path), framework="pt", device=str(device)) as file:
                for name in names:
                    if (place := self.files[name])[0] == path and place not in made:
                        self._check(name, file.get_slice(place[1]), path)
                        made[place] = truth(file.get_tensor(place[1]), path)
        for name in names:
            # One tensor may go by several names, of which each says what it is.
            if (tensor := made[self.files[name]]).shape != self.looks[name][0] or tensor.dtype != self.looks[name][1]:
                raise self._differs(name, (tuple(tensor.shape), tensor.dtype), self.files[name][0])
        return {name: made[self.files[name]] for name in names}

    def meta(self, names: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Stand-ins for parameters of which a rank holds but a share."""
        return {name: absent(*self.looks[name], device) for name in names}

    def spans(self) -> Span:
        """What reads a part of a parameter, as `Checkpoint.spans`.

        Raises:
            ArtifactError: by what is returned: one has another shape or type in its file.
        """
        opened: dict[Path, Any] = {}

        def read(member: Member, first: int, last: int) -> torch.Tensor:
            path, name = self.files[member.name]
            with readable(path):
                if path not in opened:
                    opened[path] = _library().safe_open(str(path), framework="pt")
                self._check(member.name, opened[path].get_slice(name), path)
                return truth(span_of(opened[path], name, member, first, last), path)

        return read

    def _check(self, name: str, header: Any, path: Path) -> None:
        found = tuple(header.get_shape()), _TYPES.get(header.get_dtype(), header.get_dtype())
        if found != self.looks[name]:
            raise self._differs(name, found, path)

    def _differs(self, name: str, found: Any, path: Path) -> ArtifactError:
        shape, dtype = self.looks[name]
        return ArtifactError(f"{name} is {found[1]}{list(found[0])} in {path}, but the model was exported with "
                             f"{dtype}{list(shape)}; convert the weights, or export the model as it is loaded now")


def tensors_in(data: bytes, path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors of a file with this content."""
    with readable(path):
        _library()
        return {name: truth(tensor, path).to(device)
                for name, tensor in import_module("safetensors.torch").load(data).items()}


def truth(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """``tensor``, of which truth values are 0 or 1: kernels rely on that."""
    if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise ArtifactError(f"{path} has truth values that are neither 0 nor 1")
    return tensor


def placed(cls: type[nn.Module], tensors: Mapping[str, torch.Tensor], buffers: Collection[str]) -> nn.Module:
    """A model of nothing but these tensors, in modules by the parts of their names."""
    holders = {name.rpartition(".")[0] for name in tensors}
    for name in tensors:
        if not all(name.split(".")) or name.count(".") > DEEPEST or name in holders:
            raise ArtifactError(f"{name!r:.200} is no name of a parameter, or one of modules that have some")
    model = cls()
    made: dict[int, nn.Parameter] = {}
    for name, tensor in sorted(tensors.items()):
        *path, leaf = name.split(".")
        module = model
        for step in path:
            if step not in module._modules:
                module._modules[step] = Holder()
            inner = module._modules[step]
            assert inner is not None
            module = inner
        if name in buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = made.setdefault(id(tensor), tensor if isinstance(tensor, nn.Parameter) else
                                                       nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def _library() -> Any:
    try:
        return import_module("safetensors")
    except ImportError as error:
        raise ArtifactError("artifacts keep tensors as safetensors, which is not installed; pip install safetensors"
                            ) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within: a file of tensors that cannot be read is told by its name."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # of safetensors' own, of PyTorch's, or the file system's: by what is wrong with it
        raise ArtifactError(f"cannot read {path}: {type(error).__name__}: {error!s:.500}") from error
