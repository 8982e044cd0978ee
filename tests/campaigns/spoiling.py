"""Random ways to spoil an artifact by one who knows the format: structure-aware, with hashes made good again."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**31 - 1, 2**32, 2**40, 2**48, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
           10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"))
TEXTS = ("", "x", "main", "../manifest.json", "/dev/zero", "self", "torch", "None", "lambda", "__class__",
         "forward", "_modules", "x" * 300, "x" * 100_000, "a.b.c", "a" + ".a" * 3000, "\x00", "\ud800", "é",
         "0", "-1", "cpu", "cuda:0", "meta", "float32", "bool", "int64", "tensor", "inf", "nan", "1e9", "auto",
         "flash_attn", "ulysses=1,backend=inductor", "ulysses=1000000", "pipefusion=2", "ring=2",
         'ulysses=1,compile_options={"cpp.cxx": ["x"]}')
VALUES = (None, True, False, [], {}, "", 0, [[]], {"": ""}, [None], {"as_tensor": {"name": "x"}}, {"as_int": 1},
          {"as_none": True}, {"as_expr": {"expr_str": "1"}}, {"as_ints": [1, 2, 3]}, {"as_float": "nan"}, "tensor")


@dataclass
class Spoiled:
    """What was done. ``neutral``: the program is what it was."""

    said: str
    neutral: bool


@cache
def operators() -> list[str]:
    """All that PyTorch has."""
    return sorted(f"torch.ops.{name.replace('::', '.')}" + ("" if "." in name else ".default")
                  for name in torch._C._dispatch_get_all_op_names())


@cache
def permitted() -> list[str]:
    from xdit_compile.artifact.permissions import permissions

    return [f"torch.ops.{name}" for name in permissions()]


def spoil(path: Path, chance: random.Random) -> Spoiled:
    """One to three changes of the artifact at ``path``."""
    ways: list[tuple[Callable[[Path, random.Random], str], int]] = [
        (a_value, 30), (an_operator, 14), (a_reference, 8), (arguments, 16), (a_subtree, 8), (a_key_twice, 2),
        (deeply, 2), (a_byte, 4), (tensors, 10), (a_header, 4), (a_file, 4), (lists, 8)]
    if chance.random() < 0.02:
        return Spoiled(nothing(path, chance), True)
    said = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        (way,) = chance.choices([w for w, _ in ways], [n for _, n in ways])
        try:
            said.append(f"{way.__name__}: {way(path, chance)}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            said.append(f"{way.__name__}: not possible after what was done before ({error})")
        if way is a_file:
            break  # there may be nothing any more that one can read
    return Spoiled("; ".join(said), False)


# Files


def documents(path: Path) -> list[str]:
    """Files of JSON, the manifest as often as all others together."""
    graphs = sorted(p.name for p in path.glob("*.json") if p.name != MANIFEST)
    return graphs + [MANIFEST] * max(1, len(graphs))


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def write(path: Path, name: str, data: bytes) -> None:
    """Another content for a file, with a manifest that agrees."""
    (path / name).write_bytes(data)
    if name == MANIFEST:
        return
    said = read(path, MANIFEST)
    said["parts"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        said["parts"][name]["header"] = hashlib.sha256(data[: 8 + length]).hexdigest() if length < 2**25 else "0"
    (path / MANIFEST).write_text(json.dumps(said))


def change(path: Path, chance: random.Random, edit: Callable[[Any], str], name: str | None = None) -> str:
    name = name or chance.choice(documents(path))
    document = read(path, name)
    said = edit(document)
    write(path, name, json.dumps(document).encode())
    return f"{name}: {said}"


def places(document: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """All containers, each with the keys of what is in it."""
    found = [] if found is None else found
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        found.append((document, key))
        if isinstance(value, (dict, list)):
            places(value, found)
    return found


def interesting(document: Any, chance: random.Random) -> tuple[Any, Any]:
    """A place, not among what nobody reads, most of the time."""
    if "graph_module" in document and chance.random() < 0.95:
        graph = document["graph_module"]["graph"]
        inside = chance.choice([graph["nodes"], graph["nodes"], graph["nodes"], graph["inputs"], graph["outputs"],
                                {n["as_tensor"]["name"]: graph["tensor_values"][n["as_tensor"]["name"]]
                                 for n in graph["inputs"]}])
        listed = [p for p in places(inside) if p[1] != "nn_module_stack"]
    else:
        listed = places({k: v for k, v in document.items() if k != "parts"} if chance.random() < 0.95 else document)
    return chance.choice(listed)


# Ways


def nothing(path: Path, chance: random.Random) -> str:
    """The same values in another form."""
    for name in (documents(path)[0], MANIFEST):
        document = read(path, name)
        if name == MANIFEST:
            pairs = list(document.items())
            chance.shuffle(pairs)
            document = dict(pairs)
        write(path, name, json.dumps(document, indent=chance.choice((None, 0, 3))).encode())
    return "the same in another form"


def a_value(path: Path, chance: random.Random) -> str:
    def edit(document: Any) -> str:
        holder, key = interesting(document, chance)
        old = holder[key]
        if isinstance(old, bool) or old is None:
            new = chance.choice(VALUES)
        elif isinstance(old, (int, float)):
            new = chance.choice([*NUMBERS, old + 1, old - 1, old * 2, old * 1000, -old, chance.choice(VALUES)])
        elif isinstance(old, str):
            new = chance.choice([*TEXTS, *[h[k] for h, k in places(document) if isinstance(h[k], str)][:50]])
        else:
            new = chance.choice(VALUES)
        action = chance.random()
        if action < 0.12:
            del holder[key]
            return f"without {key!r}"
        if action < 0.2 and isinstance(holder, dict):
            holder[chance.choice(TEXTS)] = holder.pop(key)
            return f"another name for {key!r}"
        holder[key] = new
        return f"{key!r} is {str(new)[:60]!r}, was {str(old)[:60]!r}"

    return change(path, chance, edit)


def graph_nodes(document: Any) -> list[Any]:
    return document["graph_module"]["graph"]["nodes"]


def a_graph(path: Path, chance: random.Random) -> str:
    return chance.choice(sorted(p.name for p in path.glob("*.json") if p.name != MANIFEST))


def an_operator(path: Path, chance: random.Random) -> str:
    def edit(document: Any) -> str:
        node = chance.choice(graph_nodes(document))
        old = node["target"]
        node["target"] = chance.choice(permitted() if chance.random() < 0.7 else operators())
        return f"{old} is {node['target']}"

    return change(path, chance, edit, a_graph(path, chance))


def a_reference(path: Path, chance: random.Random) -> str:
    def edit(document: Any) -> str:
        names = [h for h, k in places([document["graph_module"]["graph"]["nodes"],
                                       document["graph_module"]["graph"]["outputs"]]) if k == "name" and "arg" not in h]
        one, other = chance.choice(names), chance.choice(names)
        old, one["name"] = one["name"], other["name"]
        return f"{old} is {one['name']}"

    return change(path, chance, edit, a_graph(path, chance))


def arguments(path: Path, chance: random.Random) -> str:
    """Numbers that operators are given, and whole arguments."""
    def edit(document: Any) -> str:
        nodes = [n for n in graph_nodes(document) if n["inputs"]]
        node = chance.choice(nodes)
        given = chance.choice(node["inputs"])
        lists = [h for h, k in places(given["arg"]) if isinstance(h, list) and all(type(x) is int for x in h)]
        plain = [(h, k) for h, k in places(given["arg"]) if type(h[k]) in (int, float) and k != "name"]
        action = chance.random()
        if lists and action < 0.3:
            numbers = chance.choice(lists)
            numbers[:] = [chance.choice([*NUMBERS[:20], *numbers, *numbers]) for _ in range(chance.randrange(6))]
        elif plain and action < 0.7:
            holder, key = chance.choice(plain)
            holder[key] = chance.choice([*NUMBERS[:20], holder[key] + 1, holder[key] - 1])
        elif action < 0.85:
            other = chance.choice(chance.choice(nodes)["inputs"])
            given["arg"] = other["arg"]
        elif action < 0.93:
            chance.shuffle(node["inputs"])
        else:
            given["arg"] = chance.choice([
                {"as_none": True}, {"as_int": chance.choice(NUMBERS[:19])}, {"as_bool": True}, {"as_ints": [0, 0]},
                {"as_string": chance.choice(TEXTS)}, {"as_float": 1e300}])
        return f"arguments of {node['target']}"

    return change(path, chance, edit, a_graph(path, chance))


def a_subtree(path: Path, chance: random.Random) -> str:
    """One value in the place of another, perhaps from another file."""
    source = read(path, chance.choice(documents(path)))

    def edit(document: Any) -> str:
        (holder, key), (other, name) = interesting(document, chance), interesting(source, chance)
        holder[key] = json.loads(json.dumps(other[name]))
        return f"{key!r} is what {name!r} was"

    return change(path, chance, edit)


def lists(path: Path, chance: random.Random) -> str:
    """Entries dropped, doubled, exchanged, or there very often."""
    def edit(document: Any) -> str:
        found = [h[k] for h, k in places(document) if isinstance(h[k], list) and h[k]]
        held = chance.choice(found)
        action = chance.randrange(5)
        if action == 0:
            held.pop(chance.randrange(len(held)))
        elif action == 1:
            held.insert(chance.randrange(len(held)), held[chance.randrange(len(held))])
        elif action == 2:
            chance.shuffle(held)
        elif action == 3:
            held *= min(1000, 200_000 // len(json.dumps(held)) + 1)
        else:
            held.clear()
        return f"a list, changed in way {action}"

    return change(path, chance, edit)


def a_key_twice(path: Path, chance: random.Random) -> str:
    name = chance.choice(documents(path))
    text = (path / name).read_text()
    at = chance.choice([i for i, c in enumerate(text) if c == "{"])
    end = text.find(":", at)
    key = text[at + 1:end].strip()
    write(path, name, (text[:at + 1] + f"{key}: 1, " + text[at + 1:]).encode())
    return f"{name}: {key[:60]} twice"


def deeply(path: Path, chance: random.Random) -> str:
    depth = chance.choice((20, 100, 500, 900, 5000, 200_000))
    name = chance.choice(documents(path))
    document = read(path, name)
    holder, key = interesting(document, chance)
    holder[key] = "@"
    opened, closed = chance.choice((("[", "]"), ('{"tuple": [', "]}"), ('{"list": ["tensor", ', "]}"),
                                    ('{"output": "a:b", "fields": [["x", ', "]]}")))
    text = json.dumps(document).replace('"@"', opened * depth + "1" + closed * depth, 1)
    write(path, name, text.encode())
    return f"{name}: {key!r} nested {depth} times"


def a_byte(path: Path, chance: random.Random) -> str:
    name = chance.choice(documents(path))
    data = bytearray((path / name).read_bytes())
    for _ in range(chance.choice((1, 1, 5))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.2:
        data = data[: chance.randrange(len(data))]
    write(path, name, bytes(data))
    return f"{name}: bytes"


def tensors(path: Path, chance: random.Random) -> str:
    """Bits and lengths of files of tensors."""
    name = chance.choice(sorted(p.name for p in path.glob("*.safetensors")))
    data = bytearray((path / name).read_bytes())
    body = 8 + int.from_bytes(data[:8], "little")
    action = chance.randrange(5)
    if action == 0:
        for _ in range(chance.choice((1, 10, 1000))):
            data[chance.randrange(min(body, len(data) - 1), len(data))] = chance.randrange(256)
    elif action == 1:
        del data[chance.randrange(len(data)):]
    elif action == 2:
        data += bytes(chance.choice((1, 8, 1000)))
    elif action == 3:
        data[chance.randrange(8)] = chance.randrange(256)
    else:
        data[chance.randrange(8, body)] = chance.randrange(256)
    write(path, name, bytes(data))
    return f"{name}: way {action}"


def a_header(path: Path, chance: random.Random) -> str:
    """What a file says of its tensors."""
    name = chance.choice(sorted(p.name for p in path.glob("*.safetensors")))
    data = (path / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8: 8 + length])
    holder, key = chance.choice(places(header))
    old = holder[key]
    holder[key] = chance.choice([*NUMBERS[:20], *VALUES, "F64", "BOOL", "U8", "F8_E4M3", "F4", "I16", "C64", [0, 0],
                                 [2**40, 2**40], [10**7]])
    if chance.random() < 0.2:
        header["x" * chance.choice((1, 300, 70_000))] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    write(path, name, len(text).to_bytes(8, "little") + text + data[8 + length:])
    return f"{name}: {key!r} is {holder[key]!s:.50}, was {old!s:.50}"


def a_file(path: Path, chance: random.Random) -> str:
    """Something else in the place of a file."""
    name = chance.choice(sorted(p.name for p in path.iterdir()))
    action = chance.randrange(7)
    target = path / name
    data = target.read_bytes()
    target.unlink()
    if action == 0:
        os.mkfifo(target)
    elif action == 1:
        target.symlink_to("/dev/zero")
    elif action == 2:
        (path.parent / "elsewhere").write_bytes(data)
        target.symlink_to(path.parent / "elsewhere")
    elif action == 3:
        target.mkdir()
    elif action == 4:
        target.symlink_to(name)
    elif action == 5:
        target.write_bytes(b"")
        os.truncate(target, 2**36)
    return f"{name}: way {action}"
