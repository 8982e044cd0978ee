"""Ways to spoil an artifact: each gets a copy of a good one, and says what loading it must complain of."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = "XDIT_COMPILE_WAS_RUN"
"""What code in a spoiled file would set in the environment."""

Spoil = Callable[[Path], None]
SPOILED: dict[str, tuple[Spoil, str]] = {}


def spoils(complaint: str) -> Callable[[Spoil], Spoil]:
    def known(function: Spoil) -> Spoil:
        SPOILED[function.__name__] = (function, complaint)
        return function
    return known


class Runs:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> Any:
        return exec, (f"import os; os.environ[{MARK!r}] = 'pickle'",)


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def put(path: Path, said: Any) -> None:
    (path / "manifest.json").write_text(json.dumps(said))


def renewed(path: Path, name: str, data: bytes) -> None:
    """Another content for a file, with a manifest that agrees: by one who knows the format."""
    (path / name).write_bytes(data)
    said = manifest(path)
    said["parts"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    put(path, said)


def graphs(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(path.glob("*.json")):
        if file.name != "manifest.json":
            yield file.name, json.loads(file.read_text())


def first(path: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """A graph that is a block: its file, it, and its nodes."""
    name, document = max(graphs(path), key=lambda g: len(g[1]["graph_module"]["graph"]["nodes"]))
    return name, document, document["graph_module"]["graph"]["nodes"]


def wrong(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    name, document, nodes = first(path)
    change(nodes)
    renewed(path, name, json.dumps(document).encode())


# Damage


@spoils("has no manifest")
def without_a_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@spoils("is damaged")
def half_a_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


@spoils("is damaged")
def a_manifest_nested_too_deeply(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 200_000)


@spoils("bytes, but was written with")
def half_a_graph(path: Path) -> None:
    name, _, _ = first(path)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])


@spoils("does not have the hash")
def a_bit_of_a_graph(path: Path) -> None:
    name, _, _ = first(path)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 3] ^= 1
    (path / name).write_bytes(bytes(data))


@spoils("does not have the hash")
def a_bit_of_the_weights_header(path: Path) -> None:
    (file,) = path.glob("stage-0.safetensors")
    data = bytearray(file.read_bytes())
    data[20] ^= 4
    file.write_bytes(bytes(data))


@spoils("bytes, but was written with")
def half_the_weights(path: Path) -> None:
    (file,) = path.glob("stage-0.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@spoils("is missing, or no plain file")
def without_a_graph(path: Path) -> None:
    name, _, _ = first(path)
    (path / name).unlink()


# Names


@spoils("names '../|is none of its files")
def a_path_outside(path: Path) -> None:
    said = manifest(path)
    name, _, _ = first(path)
    text = json.dumps(said).replace(name, f"../{path.name}/{name}")
    put(path, json.loads(text))


@spoils("is none of its files")
def an_absolute_path(path: Path) -> None:
    said = manifest(path)
    name, _, _ = first(path)
    put(path, json.loads(json.dumps(said).replace(name, str(path / name))))


@spoils("is missing, or no plain file")
def a_link_to_elsewhere(path: Path) -> None:
    name, _, _ = first(path)
    elsewhere = path.parent / "elsewhere"
    os.replace(path / name, elsewhere)
    (path / name).symlink_to(elsewhere)


# Sizes


@spoils("no size of a tensor|no shape of a tensor|cannot take")
def an_absurd_size(path: Path) -> None:
    name, document, _ = first(path)
    values = document["graph_module"]["graph"]["tensor_values"]
    values[document["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"]]["sizes"][0]["as_int"] = 2**60
    renewed(path, name, json.dumps(document).encode())


@spoils("is no shape of a tensor")
def an_absurd_weight(path: Path) -> None:
    said = manifest(path)
    next(iter(said["tensors"].values()))["shape"] = [10**18]
    put(path, said)


@spoils("bytes, more than any")
def a_manifest_without_end(path: Path) -> None:
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**40)


@spoils("cannot read")
def a_header_that_claims_all_memory(path: Path) -> None:
    (file,) = path.glob("stage-0.safetensors")
    data = bytearray(file.read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    renewed(path, file.name, bytes(data))


# Code


@spoils("this is no graph")
def a_pickle_as_a_graph(path: Path) -> None:
    name, _, _ = first(path)
    renewed(path, name, pickle.dumps(Runs()))


@spoils("cannot read")
def a_pickle_as_weights(path: Path) -> None:
    (file,) = path.glob("stage-0.safetensors")
    with zipfile.ZipFile(path / "draft", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs()))
        archive.writestr("archive/version", "3")
    data = (path / "draft").read_bytes()
    (path / "draft").unlink()
    renewed(path, file.name, data)


@spoils("is damaged")
def a_pickle_as_a_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(pickle.dumps(Runs()))


@spoils("only operators of")
def a_function_of_python(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.load"))


@spoils("only operators of")
def a_function_of_a_module(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="os.system"))


@spoils("is not allowed in artifacts")
def an_operator_that_reads_files(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.ops.aten.from_file.default"))


@spoils("which writes into its arguments")
def an_operator_that_writes(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.ops.aten.add_.Tensor"))


@spoils("does not have")
def an_operator_that_is_none(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.ops.aten.__class__.__mro__"))


@spoils("holds an argument as_expr")
def an_expression_to_evaluate(path: Path) -> None:
    text = f"__import__('os').environ.__setitem__({MARK!r}, 'expression')"

    def change(nodes: list[dict[str, Any]]) -> None:
        nodes[0]["inputs"][0]["arg"] = {"as_expr": {"expr_str": text, "hint": None}}

    wrong(path, change)


@spoils("cannot take what it is given")
def shapes_that_do_not_fit(path: Path) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        view = next(n for n in nodes if n["target"] == "torch.ops.aten.reshape.default")
        view["inputs"][1]["arg"]["as_ints"] = [7, 11, 13]

    wrong(path, change)


# What it says of itself


@spoils("has version 99 of the format")
def a_later_version(path: Path) -> None:
    put(path, manifest(path) | {"version": 99})


@spoils("was made with PyTorch 99.0")
def a_later_pytorch(path: Path) -> None:
    said = manifest(path)
    said["made_with"]["torch"] = "99.0.0"
    put(path, said)


@spoils("runs on 2 processes|was made for")
def another_world(path: Path) -> None:
    put(path, manifest(path) | {"world_size": 2})


@spoils("does not say what it should")
def without_calls(path: Path) -> None:
    said = manifest(path)
    del said["calls"]
    put(path, said)


@spoils("is float32|was exported with")
def weights_of_another_type(path: Path) -> None:
    said = manifest(path)
    next(iter(said["tensors"].values()))["dtype"] = "bfloat16"
    put(path, said)


@spoils("does not include")
def a_weight_too_many(path: Path) -> None:
    said = manifest(path)
    said["tensors"]["more.weight"] = next(iter(said["tensors"].values())) | {"also": []}
    put(path, said)
