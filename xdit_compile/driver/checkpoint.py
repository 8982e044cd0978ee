"""Tensors of a model that is larger than one device, read from safetensors by those ranks that use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_compile.errors import XditError
from xdit_compile.ir.layout import length
from xdit_compile.ir.packed_tensors import is_packed, whole_name
from xdit_compile.ir.parameter_groups import Member
from xdit_compile.ir.program import Part, part_of
from xdit_compile.runtime.execution.parameter_store import Span


@dataclass(frozen=True)
class Checkpoint:
    """Where each tensor of a model is kept.

    Attributes:
        source: what the user named; files: by the tensors' names.
    """

    source: Path
    files: Mapping[str, Path]

    @staticmethod
    def at(path: str | Path) -> Checkpoint:
        """Those in a file, or in a folder as diffusers and transformers save them: one file, or several and an index.

        Raises:
            XditError: there are none, or an index names files outside the folder.
        """
        path = Path(path)
        if path.is_file():
            return Checkpoint(path, dict.fromkeys(_names(path), path))
        indexes = sorted(path.glob("*.safetensors.index.json"))
        if len(indexes) == 1:
            listed = json.loads(indexes[0].read_text())["weight_map"]
            if outside := {f for f in listed.values() if Path(f).name != f}:
                raise XditError(f"{indexes[0]} names files that are not beside it: {', '.join(sorted(outside))}")
            return Checkpoint(path, {name: path / file for name, file in listed.items()})
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(f.name for f in [*indexes, *files]) or "nothing"
            raise XditError("weights are read from a safetensors file, or a folder with one such file or one index, "
                            f"but {path} holds {found}")
        return Checkpoint(path, dict.fromkeys(_names(files[0]), files[0]))

    def load(self, model: nn.Module, names: Collection[str], device: torch.device) -> None:
        """Read those of ``names`` that ``model`` has on the meta device, in its own types.

        Raises:
            XditError: one is missing, or of another shape.
        """
        names = {*names, *map(whole_name, names)}
        wanted = {name: place for name, place in _places(model).items() if name in names and place.tensor.is_meta}
        if packed := [name for name, place in wanted.items() if is_packed(place.tensor)]:
            raise XditError(f"{packed[0]} is a {type(wanted[packed[0]].tensor).__qualname__}: weights= reads plain "
                            "tensors from safetensors, none that are packed or quantized. Load the model with its "
                            "weights first, on every rank")
        missing = [name for name in wanted if name not in self.files]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise XditError(f"{self.source} has no {shown}; buffers that are not saved have to be made with the model, "
                            "as under accelerate.init_empty_weights()")
        for file in sorted({self.files[name] for name in wanted}):
            with _open(file, device) as opened:
                for name, place in wanted.items():
                    if self.files[name] == file:
                        place.set(name, opened.get_tensor(name), self.source)


    def spans(self) -> Span:
        """What reads a part of a parameter, and no more of the file than the rows that it is in; in the file's type.

        Raises:
            XditError: by what is returned, as ``load``.
        """
        opened: dict[Path, Any] = {}

        def read(member: Member, first: int, last: int) -> torch.Tensor:
            name = next((n for n in member.names if n in self.files), None)
            if name is None:
                raise XditError(f"{self.source} has no {member.name}")
            file = self.files[name]
            if file not in opened:
                opened[file] = _open(file, torch.device("cpu"))
            whole = member.layout.shape if member.layout else member.shape
            if (shape := tuple(opened[file].get_slice(name).get_shape())) != whole:
                raise XditError(f"{name} is {list(shape)} in {self.source} and {list(whole)} in the model")
            return span_of(opened[file], name, member, first, last)

        return read

    def digest(self) -> str:
        """Equal where ranks read the same files: their headers, and some of what follows."""
        made = hashlib.blake2b(digest_size=8)
        for file in sorted(set(self.files.values())):
            made.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                made.update(opened.read(min(size, file.stat().st_size)))
                for place in range(8 + size, file.stat().st_size, max(file.stat().st_size // PROBES, 64)):
                    opened.seek(place)
                    made.update(opened.read(64))
        return made.hexdigest()


def span_of(file: Any, name: str, member: Member, first: int, last: int) -> torch.Tensor:
    """A parameter's elements from one to another, in the order in which they lie in memory, of a file that is open;
    no more of it is read than the rows that they are in."""
    header = file.get_slice(name)
    if member.part is not None:
        return _rows(header, member.part).permute(member.order).reshape(-1)[first:last]
    shape = member.shape
    if member.order != tuple(range(len(shape))) or not shape:
        return file.get_tensor(name).permute(member.order).reshape(-1)[first:last]
    # The first dimension that says anything is that of rows.
    dim = next((i for i, size in enumerate(shape) if size > 1), 0)
    row = member.size // shape[dim]
    top, bottom = first // row, -(-last // row)
    part = header[(*[slice(None)] * dim, slice(top, bottom))]
    return part.reshape(-1)[first - top * row : last - top * row]


def _rows(header: Any, part: Part) -> torch.Tensor:
    """This part of a tensor in a file, of which no rows are read that are not in it."""
    first, *rest = part
    return part_of(torch.cat([header[a:b] for a, b in first or ((0, 0),)]), (((0, length(list(first))),), *rest))


PROBES = 256
"""So many places of a file are looked at to tell it from another with the same header."""


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    leaf: str
    tensor: torch.Tensor

    def set(self, name: str, value: torch.Tensor, source: Path) -> None:
        if value.shape != self.tensor.shape:
            raise XditError(f"{name} is {list(value.shape)} in {source} and {list(self.tensor.shape)} in the model")
        value = value.to(self.tensor.dtype)
        if isinstance(self.tensor, nn.Parameter):
            self.module._parameters[self.leaf] = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        else:
            self.module._buffers[self.leaf] = value


def _places(model: nn.Module) -> dict[str, _Place]:
    return {f"{path}.{leaf}".lstrip("."): _Place(module, leaf, tensor) for path, module in model.named_modules()
            for store in (module._parameters, module._buffers) for leaf, tensor in store.items() if tensor is not None}


def _names(file: Path) -> list[str]:
    with _open(file, torch.device("cpu")) as opened:
        return list(opened.keys())


def _open(file: Path, device: torch.device) -> Any:
    try:
        library = import_module("safetensors")
    except ImportError as error:
        raise XditError("weights= reads safetensors, which is not installed; pip install safetensors") from error
    try:
        return library.safe_open(file, framework="pt", device=str(device))
    except (OSError, library.SafetensorError) as error:
        raise XditError(f"cannot read {file}: {error}") from error
