"""Which operators may an artifact call? Those that our own programs call: every test model under every kind of
parallelism is compiled as `export` would, and its operators are listed. With them come the operators that have a
sharding rule, and PyTorch's core set of element-wise ones, which other people's models call as well.

What each operator is (its kind) is decided by a person, who has read what its kernels do with what they are given, and
stays in the file. A new operator is written with an empty kind, and is refused until somebody has filled it in.

    python benchmarks/permissions.py --output xdit_compile/artifact/permissions.json
    python benchmarks/permissions.py --cases dit flux --output /tmp/permissions.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xdit_compile.artifact.graph_writer import operators_of
from xdit_compile.artifact.permissions import name_of
from xdit_compile.driver.captured_programs import CapturedPrograms
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.program import Program
from xdit_compile.passes.rules import RULES
from xdit_compile.spec import ShardingSpec

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import cases
import quantized
import zoo

SPECS = ("ulysses=1", "ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2", "tensor=2",
         "ulysses=2,shard=2,offload=block")
NAMESPACES = ("aten", "prims", "_c10d_functional", "xdit_compile")
LEFT_OUT = {"xdit_compile.python.default"}
"""Runs a module that no graph can hold, which is in no file."""


def programs(name: str, specs: Sequence[str], kind: str = "") -> Iterator[Program]:
    """What ranks run of a test model, whose weights may be packed. Those of the first and the last differ from all
    between in nothing that matters here: they hold borders."""
    case = zoo.CASES[name]
    model = cases.made(case)
    if kind:
        quantized.KINDS[kind](model)
    source = CapturedPrograms(model)
    yield from compiled(name, source, case.inputs(1, False), specs[:1])
    yield from compiled(name, source, case.inputs(2, True), specs)


def compiled(name: str, source: CapturedPrograms, inputs: Any, specs: Sequence[str]) -> Iterator[Program]:
    """Those of one call."""
    args, kwargs = call_arguments(source.model, inputs)
    kind = source.make(args, kwargs)
    for text in specs:
        spec = ShardingSpec.parse(text)
        for rank in sorted({0, spec.world_size - 1}):
            try:
                made = source.compiled(kind, spec, rank, {})
            except XditError as error:
                print(f"{name} {text}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
                break
            stage = made.stage
            both = (stage.invariant, stage.once, *stage.units.values()) if stage else (made.body, made.invariant)
            yield from (p for p in both if p is not None)


def called(names: list[str], specs: Sequence[str]) -> Counter[Any]:
    """How many of the test models call each operator."""
    found: Counter[Any] = Counter()
    for name, kind in tqdm([*((n, "") for n in names), *((names[0], k) for k in quantized.KINDS)],
                           desc="test models", mininterval=10):
        own: set[Any] = set()
        try:
            for program in programs(name, specs, kind):
                for _, module in program.functions():
                    own |= operators_of(module)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        if new := sorted(str(o) for o in own - found.keys()):
            print(f"{name}: {', '.join(new)}", file=sys.stderr, flush=True)
        found.update(own)
    return found


def core_pointwise() -> Iterator[Any]:
    """PyTorch's core operators that are element-wise."""
    for packet in dir(torch.ops.aten):
        operator = getattr(torch.ops.aten, packet)
        for overload in operator.overloads() if isinstance(operator, torch._ops.OpOverloadPacket) else ():
            found = getattr(operator, overload)
            if {torch.Tag.core, torch.Tag.pointwise} <= set(found.tags) and not found._schema.is_mutable and (
                    torch.Tag.nondeterministic_seeded not in found.tags):
                yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(zoo.CASES), help="test models (default: all)")
    parser.add_argument("--specs", nargs="*", default=SPECS, help="of parallelism (default: each kind)")
    parser.add_argument("--output", type=Path, required=True, help="the list; kinds that are in it stay")
    options = parser.parse_args()
    before = json.loads(options.output.read_text()) if options.output.exists() else {}
    operators = {*called(options.cases, options.specs), *RULES, *core_pointwise()}
    made = {}
    for operator in sorted((o for o in operators if o.namespace in NAMESPACES), key=str):
        writes = [a.name for a in operator._schema.arguments if a.alias_info and a.alias_info.is_write]
        name = name_of(operator)
        if name in LEFT_OUT:
            continue
        made[name] = {"kind": before.get(name, {}).get("kind", ""), "writes": writes}
    options.output.write_text("{\n" + ",\n".join(
        f'"{name}": {json.dumps(entry)}' for name, entry in made.items()) + "\n}\n")
    new = [name for name, entry in made.items() if not entry["kind"]]
    print(f"{len(made)} operators; without a kind: {', '.join(new) or 'none'}")
    if gone := sorted(before.keys() - made.keys()):
        print(f"no longer called: {', '.join(gone)}")


if __name__ == "__main__":
    main()
