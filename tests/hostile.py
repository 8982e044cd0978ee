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


@spoils("names '../.*is none of the files of")
def a_path_outside(path: Path) -> None:
    said = manifest(path)
    name, _, _ = first(path)
    text = json.dumps(said).replace(name, f"../{path.name}/{name}")
    put(path, json.loads(text))


@spoils("is none of the files of")
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


@spoils(r"inputs\[0\]: 1152921504606846976 is no size of a tensor")
def an_absurd_size(path: Path) -> None:
    name, document, _ = first(path)
    values = document["graph_module"]["graph"]["tensor_values"]
    values[document["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"]]["sizes"][0]["as_int"] = 2**60
    renewed(path, name, json.dumps(document).encode())


@spoils(r"shape\[0\] is 10+, which is no whole number")
def an_absurd_weight(path: Path) -> None:
    said = manifest(path)
    next(iter(said["tensors"].values()))["shape"] = [10**18]
    put(path, said)


@spoils("bytes, more than the")
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


@spoils("is damaged")
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


@spoils("'torch.load', which is not on the list")
def a_function_of_python(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.load"))


@spoils("'os.system', which is not on the list")
def a_function_of_a_module(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="os.system"))


@spoils("which is not on the list of operators")
def an_operator_that_reads_files(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.ops.aten.from_file.default"))


@spoils("which is not on the list of operators")
def an_operator_that_writes(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.ops.aten.add_.Tensor"))


@spoils("which is not on the list of operators")
def an_operator_that_is_none(path: Path) -> None:
    wrong(path, lambda nodes: nodes[0].update(target="torch.ops.aten.__class__.__mro__"))


@spoils("holds an argument as_expr")
def an_expression_to_evaluate(path: Path) -> None:
    text = f"__import__('os').environ.__setitem__({MARK!r}, 'expression')"

    def change(nodes: list[dict[str, Any]]) -> None:
        nodes[0]["inputs"][0]["arg"] = {"as_expr": {"expr_str": text, "hint": None}}

    wrong(path, change)


@spoils(r"nodes\[\d+\] \(torch.ops.aten.reshape.default\).*shape '\[7, 11, 13\]' is invalid")
def shapes_that_do_not_fit(path: Path) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        view = next(n for n in nodes if n["target"] == "torch.ops.aten.reshape.default")
        view["inputs"][1]["arg"]["as_ints"] = [7, 11, 13]

    wrong(path, change)


# Memory


def arguments_of(nodes: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    return next(n for n in nodes if n["target"] == f"torch.ops.aten.{target}")["inputs"]


@spoils("makes a value of 17592186044416 bytes, more than the")
def a_value_larger_than_said(path: Path) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        node = next(n for n in nodes if "as_tensor" in n["outputs"][0])
        node["target"] = "torch.ops.aten.full.default"
        node["inputs"] = [{"name": "size", "arg": {"as_ints": [2**42]}, "kind": 1},
                          {"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1}]

    wrong(path, change)


@spoils(r"it makes 200000000 results, but \d+ are taken")
def results_without_number(path: Path) -> None:
    """2e8 of one element each took 6 GB while they were loaded."""
    def change(nodes: list[dict[str, Any]]) -> None:
        at = next(i for i, n in enumerate(nodes) if "as_tensors" in n["outputs"][0])
        name = nodes[at]["outputs"][0]["as_tensors"][0]["name"]
        nodes.insert(at, {"target": "torch.ops.aten.expand.default", "metadata": {}, "inputs": [
            {"name": "self", "arg": {"as_tensor": {"name": "many0"}}, "kind": 1},
            {"name": "size", "arg": {"as_ints": [200_000_000]}, "kind": 1}],
            "outputs": [{"as_tensor": {"name": "many"}}]})
        nodes.insert(at, {"target": "torch.ops.aten.full.default", "metadata": {}, "inputs": [
            {"name": "size", "arg": {"as_ints": [1]}, "kind": 1},
            {"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1}],
            "outputs": [{"as_tensor": {"name": "many0"}}]})
        nodes[at + 2] = {"target": "torch.ops.aten.unbind.int", "metadata": {}, "inputs": [
            {"name": "self", "arg": {"as_tensor": {"name": "many"}}, "kind": 1}],
            "outputs": [{"as_tensors": [{"name": name}]}]}

    said = manifest(path)
    said["memory"]["values"] = 2**40
    put(path, said)
    wrong(path, change)


@spoils("says that a rank takes 100 bytes of values, but its programs take|bytes, more than the 100")
def less_memory_than_it_takes(path: Path) -> None:
    said = manifest(path)
    said["memory"]["values"] = 100
    put(path, said)


# Writing


@spoils("writes into the parameter")
def weights_that_are_written(path: Path) -> None:
    """Into the first parameter, what an operator made of it."""
    said = manifest(path)
    name = said["calls"][0]["ranks"][0]["body"]["functions"]["main"]
    document = json.loads((path / name).read_text())
    graph = document["graph_module"]["graph"]
    kinds = [kind for kind, _ in said["calls"][0]["ranks"][0]["body"]["inputs"]]
    weight = graph["inputs"][kinds.index("parameter")]["as_tensor"]["name"]
    graph["nodes"].append({"target": "torch.ops.aten.copy_.default", "metadata": {}, "inputs": [
        {"name": n, "arg": {"as_tensor": {"name": weight}}, "kind": 1} for n in ("self", "src")],
        "outputs": [{"as_tensor": {"name": "written"}}]})
    renewed(path, name, json.dumps(document).encode())


# References


@spoils("which nothing before it has made")
def a_value_that_comes_later(path: Path) -> None:
    def change(nodes: list[dict[str, Any]]) -> None:
        node = next(n for n in nodes if "as_tensor" in n["outputs"][0] and "as_tensor" in n["inputs"][0]["arg"])
        node["inputs"][0]["arg"]["as_tensor"]["name"] = node["outputs"][0]["as_tensor"]["name"]

    wrong(path, change)


@spoils("returns .* but the model")
def results_of_another_shape(path: Path) -> None:
    said = manifest(path)
    said["calls"][0]["results"][0]["shape"][0] += 1
    put(path, said)


@spoils("takes the argument 'arg_99', which is not there")
def an_argument_that_is_not_there(path: Path) -> None:
    said = manifest(path)
    entries = said["calls"][0]["ranks"][0]["body"]["inputs"]
    next(e for e in entries if e[0] == "argument")[1] = "arg_99"
    put(path, said)


# JSON


def text_of(path: Path, old: str, new: str) -> None:
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new, 1))


@spoils("the key 'spec' is there twice")
def a_key_twice(path: Path) -> None:
    text_of(path, '"spec":', '"spec": "ulysses=1", "spec":')


@spoils("NaN is no number of JSON")
def a_size_that_is_no_number(path: Path) -> None:
    text_of(path, '"world_size": 1', '"world_size": NaN')


@spoils("is damaged: Exceeds the limit")
def a_number_of_many_digits(path: Path) -> None:
    text_of(path, '"world_size": 1', '"world_size": 1' + "0" * 5000)


@spoils(r"outputs.*is nested more than 32 times")
def results_nested_deeply(path: Path) -> None:
    said = manifest(path)
    for _ in range(200):
        said["calls"][0]["outputs"] = {"tuple": [said["calls"][0]["outputs"]]}
    put(path, said)


@spoils("which is none of the files of")
def a_name_without_end(path: Path) -> None:
    said = manifest(path)
    said["calls"][0]["ranks"][0]["body"]["functions"]["main"] = "x" * 100_000
    put(path, said)


# Files


@spoils("is missing, or no plain file")
def a_manifest_that_is_a_link(path: Path) -> None:
    os.replace(path / "manifest.json", path.parent / "elsewhere")
    (path / "manifest.json").symlink_to(path.parent / "elsewhere")


@spoils("is missing, or no plain file")
def a_pipe_without_end(path: Path) -> None:
    name, _, _ = first(path)
    (path / name).unlink()
    os.mkfifo(path / name)


@spoils("is missing, or no plain file")
def a_folder_for_a_file(path: Path) -> None:
    name, _, _ = first(path)
    (path / name).unlink()
    (path / name).mkdir()


# How it is run


@spoils("says backend=inductor, compile_options=.*but how programs are run is not for a file to say")
def a_compiler_to_run(path: Path) -> None:
    said = manifest(path)
    said["spec"] = said["calls"][0]["spec"] = 'ulysses=1,backend=inductor,compile_options={"cpp.cxx": ["./evil"]}'
    put(path, said)


@spoils("says attention_kernel=flash_attn")
def an_attention_kernel(path: Path) -> None:
    put(path, manifest(path) | {"spec": "ulysses=1,attention_kernel=flash_attn"})


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


@spoils("has no 'calls'")
def without_calls(path: Path) -> None:
    said = manifest(path)
    del said["calls"]
    put(path, said)


@spoils("as float32.*but it is bfloat16")
def weights_of_another_type(path: Path) -> None:
    said = manifest(path)
    next(iter(said["tensors"].values()))["dtype"] = "bfloat16"
    put(path, said)


@spoils("does not include")
def a_weight_too_many(path: Path) -> None:
    said = manifest(path)
    said["tensors"]["more.weight"] = next(iter(said["tensors"].values())) | {"also": []}
    put(path, said)
