"""What ranks hold of parameters that come block by block: groups of them, of which tensor ranks have parts, as JSON.

Offsets are not written: they follow from sizes, as they do where the model is. What a file says is compared with the
shapes of the artifact's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, pairwise
from typing import cast

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.json_values import Json, Look, look_text
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.parameter_groups import Member, ParameterGroup, group_of, strides_of
from xdit_compile.ir.program import Part
from xdit_compile.spec import ShardingSpec


def groups_json(groups: Iterable[ParameterGroup]) -> Json:
    """Of each its path, and of each parameter the name, the order in which its dimensions lie in memory, and the part
    that is held."""
    return [{"path": group.path, "members": [[m.name, m.order, m.part] for m in group.members]} for group in groups]


def groups_of(entry: Entry, tensors: Mapping[str, Look]) -> dict[str, ParameterGroup]:
    """The groups by name.

    Args:
        tensors: shapes and types of the whole parameters.

    Raises:
        ArtifactError: they are no groups of these tensors, or a parameter is in two of them.
    """
    made: dict[str, ParameterGroup] = {}
    seen: set[str] = set()
    for part in entry.parts():
        looks = [_look(of, tensors) for of in part["members"].parts()]
        if (types := len({dtype for _, dtype in looks})) != 1:
            raise ArtifactError(f"{part.where} has parameters of {types} types, where there has to be one")
        group = group_of(part["path"].text(), looks[0][1], [
            _member(of, look) for of, look in zip(part["members"].parts(), looks, strict=True)])
        names = [m.name for m in group.members]
        if group.name in made or len(set(names)) < len(names) or seen & set(names):
            raise ArtifactError(f"{part.where} is there twice, or has a parameter that is")
        seen |= set(names)
        made[group.name] = group
    return made


def _look(entry: Entry, tensors: Mapping[str, Look]) -> Look:
    name = entry.parts(3)[0]
    if name.text() not in tensors:
        raise ArtifactError(f"{name.where} is {name.value!r:.100}, which is no tensor of the artifact")
    return tensors[name.value]


def _member(entry: Entry, look: Look) -> Member:
    name, order, part = entry.parts(3)
    dims = order.wholes()
    if sorted(dims) != list(range(len(look[0]))):
        raise order.wrong(f"order of {len(look[0])} dimensions")
    held = spans_of(part, look) if part else None
    shape, _ = local_look(look, held)
    return Member((name.text(),), shape, strides_of(shape, dims), part=held)


def spans_of(entry: Entry, look: Look) -> Part:
    """Index ranges of each dimension of a tensor, in order and apart.

    Raises:
        ArtifactError: they are not, or not of this tensor.
    """
    shape = look[0]
    if len(entry.parts()) != len(shape):
        raise ArtifactError(f"{entry.where} is of {len(entry.parts())} dimensions of {look_text(look)}")
    made = []
    for spans, size in zip(entry.parts(), shape, strict=True):
        ends = [cast(tuple[int, int], tuple(p.whole(0, size) for p in span.parts(2))) for span in spans.parts()]
        if any(a > b for a, b in pairwise(chain.from_iterable(ends))):
            raise spans.wrong(f"list of ranges within {size}, one after the other")
        made.append(tuple(ends))
    return tuple(made)


def local_look(look: Look, part: Part | None) -> Look:
    """Shape and type of this part of a tensor."""
    shape, dtype = look
    return (shape if part is None else tuple(sum(b - a for a, b in spans) for spans in part)), dtype


def share_look(group: ParameterGroup, spec: ShardingSpec) -> Look:
    """Shape and type of what a rank holds of a group."""
    return (group.share(spec.shard_degree),), group.dtype
