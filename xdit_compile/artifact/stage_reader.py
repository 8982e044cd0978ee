"""What one rank of a stage runs, from the parts of an artifact: every name, size and place in it is compared with the
programs, before any of it is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.json_values import Look, dtype_of, look_of, look_text, nbytes_of
from xdit_compile.artifact.program_reader import Reader, Values, kept_values, look_of_node, results_of
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.mesh import STAGE
from xdit_compile.ir.program import Program
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.pipefusion.schedule import RESULT, WHOLE, Edge
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram
from xdit_compile.spec import ShardingSpec


def read_stage(reader: Reader, entry: Entry, spec: ShardingSpec, position: Mapping[str, int], state: Values,
               results: Sequence[Look]) -> StageProgram:
    """Raises ArtifactError where it does not fit together.

    Args:
        state: parameters and arguments of the call; results: what the model returns.
    """
    stage = _Stage(reader, entry, spec, position, state, results).made
    _check_edges(stage, entry["edges"], spec.pipefusion_degree, position[STAGE])
    return stage


class _Stage:
    def __init__(self, reader: Reader, entry: Entry, spec: ShardingSpec, position: Mapping[str, int], state: Values,
                 results: Sequence[Look]) -> None:
        self.reader, self.entry, self.spec, self.position = reader, entry, spec, position
        self.state, self.whole, self.patches = state, results, spec.patches
        index, last = position[STAGE], spec.pipefusion_degree - 1
        self.last = index == last
        invariant = self._program(entry["invariant"], state) if entry["invariant"] else None
        once = self._program(entry["once"], {**state, **kept_values(entry["once"], invariant)})
        self.held, self.fixed = entry["held"].texts(), entry["fixed"].wholes()
        found = results_of(once)
        if len(set(self.held)) < len(self.held) or len(found) != len(self.held) + len(self.fixed):
            raise ArtifactError(f"{entry.where}: once makes {len(found)} values, but {len(self.held)} names and "
                                f"{len(self.fixed)} results are said")
        self.once = {("once", name): look for name, look in zip(self.held, found, strict=False)}
        self.samples = {i: self._cut(cut, state.get(("argument", f"arg_{i}"))) for i, cut in
                        entry["samples"].numbered()}
        self.cuts = [self._cut(cut, look) if cut else None for cut, look in zip(
            entry["cuts"].parts(len(results)), results, strict=True)]
        self.receives = {i: entry_.texts() for i, entry_ in entry["receives"].numbered()}
        self.sends = {i: entry_.texts() for i, entry_ in entry["sends"].numbered()}
        if any(i >= index for i in self.receives) or any(not index < i <= last for i in self.sends):
            raise ArtifactError(f"{entry.where}: stage {index} of {last + 1} receives from {list(self.receives)} and "
                                f"sends to {list(self.sends)}")
        self.returns, self.places = entry["returns"].texts(), entry["results"].wholes()
        self.shapes = self._shapes()
        units = self._units()
        self.made = StageProgram(
            invariant, once, units, self.held, self.samples, self.sends, self.returns, self.receives, self.shapes,
            tuple(self.cuts), self.places, self.fixed, tuple(map(_edge, entry["edges"].parts())),
            tuple(part.texts() for part in entry["blocks"].parts(last + 1)))
        self._check_results(found[len(self.held):])

    def _program(self, entry: Entry, values: Values) -> Program:
        return self.reader.program(entry, self.spec, self.position, lambda *what: values.get(what), part=True)

    def _cut(self, entry: Entry, look: Look | None) -> Cut:
        """How a tensor comes in patches."""
        if look is None:
            raise ArtifactError(f"{entry.where} cuts what is not there")
        dim, borders = entry["dim"].whole(-len(look[0]), -1), entry["borders"].wholes()
        if len(borders) != self.patches + 1 or borders[0] != 0 or list(borders) != sorted(borders) or (
                borders[-1] != look[0][dim]):
            raise ArtifactError(f"{entry.where} cuts dimension {dim} of {look_text(look)} at {list(borders)[:20]}, "
                                f"where there are {self.patches} patches")
        return Cut(dim, borders)

    def _shapes(self) -> dict[tuple[str, int], Look]:
        made: dict[tuple[str, int], Look] = {}
        for part in self.entry["shapes"].parts():
            name, unit, shape, dtype = part.parts(4)
            look = look_of(Entry({"shape": shape.value, "dtype": dtype.value}, part.where))
            key = name.text(), unit.whole(WHOLE)
            if key in made:
                raise ArtifactError(f"{part.where} is there twice")
            made[key] = (look[0], dtype_of(dtype))
        return made

    def _units(self) -> dict[int, Program]:
        """The program of each patch, and that of all."""
        entries = dict(self.entry["units"].numbered(WHOLE))
        if WHOLE not in entries or entries.keys() - {WHOLE} not in (set(), set(range(min(self.patches, 2**20)))):
            raise ArtifactError(f"{self.entry['units'].where} is for {sorted(entries)[:20]}, where there are "
                                f"{self.patches} patches")
        made: dict[int, Program] = {}
        caches: list[Look] = []
        for unit in sorted(entries):
            made[unit] = self._unit(unit, entries[unit])
            found = [look_of_node(n) for n, i in zip(made[unit].main.graph.find_nodes(op="placeholder"),
                                                     made[unit].inputs, strict=True) if i.kind == "cache"]
            caches = found if unit == WHOLE else caches
            if found != caches:
                raise ArtifactError(f"{entries[unit].where} keeps other values than the program of all patches")
        return made

    def _unit(self, unit: int, entry: Entry) -> Program:
        received = {("received", name): self.shapes[name, unit] for names in self.receives.values() for name in names
                    if (name, unit) in self.shapes}
        if len(received) != sum(map(len, self.receives.values())):
            raise ArtifactError(f"{self.entry.where}: shapes of what unit {unit} receives are missing, or a name is "
                                "there twice")
        values: dict[tuple[str, str], Look] = {**self.state, **self.once, **received}
        for i, cut in self.samples.items() if unit != WHOLE else ():
            values["argument", f"arg_{i}"] = _piece(values["argument", f"arg_{i}"], cut, unit)
        return self.reader.program(entry, self.spec, self.position, lambda *what: values.get(what), part=True,
                                   caches=True)

    def _check_results(self, fixed: Sequence[Look]) -> None:
        """What units return is what is sent, and then the model's results."""
        for name in {name for names in self.sends.values() for name in names} - set(self.returns):
            raise ArtifactError(f"{self.entry.where} sends {name!r:.100}, which no unit returns")
        places = (*self.places, *self.fixed)
        if self.last and sorted(places) != list(range(len(self.whole))):
            raise ArtifactError(f"{self.entry.where} has results {sorted(places)[:20]} of {len(self.whole)}")
        for unit, program in self.made.units.items():
            found = results_of(program)
            if len(found) != len(self.returns) + len(self.places):
                raise ArtifactError(f"{self.entry.where}: unit {unit} makes {len(found)} values, where "
                                    f"{len(self.returns)} are sent and {len(self.places)} are results")
            for place, look in zip(self.places, found[len(self.returns):], strict=True):
                self._same(unit, place, look)
        for place, look in zip(self.fixed, fixed, strict=True):
            self._same(WHOLE, place, look)

    def _same(self, unit: int, place: int, look: Look) -> None:
        if not self.last or place >= len(self.whole):
            return
        cut = self.cuts[place]
        wanted = self.whole[place] if cut is None or unit == WHOLE else _piece(self.whole[place], cut, unit)
        if look != wanted:
            raise ArtifactError(f"{self.entry.where}: unit {unit} makes result {place} as {look_text(look)}, but it is "
                                f"{look_text(wanted)}")


def _check_edges(stage: StageProgram, entry: Entry, stages: int, index: int) -> None:
    """Messages between stages are as long as what is sent and received: who sends relies on that, and who receives."""
    edges, last = stage.edges, stages - 1
    pairs = [(e.source, e.target, e.name) for e in edges]
    inside = all(0 <= e.source < stages and 0 <= e.target < stages and (
        e.source == last != e.target if e.name == RESULT else e.source < e.target) for e in edges)
    hidden = {(e.source, e.target) for e in edges if e.name != RESULT}
    if not inside or len(set(pairs)) < len(pairs) or sum(n != RESULT for *_, n in pairs) != len(hidden) or {
            e.target for e in edges if e.name == RESULT} != set(range(last)) or {
            a for a, b in hidden if b == index} != set(stage.receives) or {
            b for a, b in hidden if a == index} != set(stage.sends):
        raise ArtifactError(f"{entry.where}: {', '.join(map(str, edges))!s:.300} among {stages} stages are not what "
                            f"stage {index} receives and sends")
    for edge in edges:
        for unit, program in stage.units.items():
            found = dict(zip(stage.returns, results_of(program), strict=False))
            if edge.name == RESULT or index not in (edge.source, edge.target):
                continue
            looks = [found[n] for n in stage.sends[edge.target]] if edge.source == index else [
                stage.shapes[n, unit] for n in stage.receives[edge.source]]
            sizes = edge.whole if unit == WHOLE else edge.nbytes[unit] if unit < len(edge.nbytes) else -1
            if sizes != sum(map(nbytes_of, looks)):
                raise ArtifactError(f"{entry.where}: {edge} has {sizes} bytes for unit {unit}, but "
                                    f"{sum(map(nbytes_of, looks))} are sent or received")


def _edge(entry: Entry) -> Edge:
    return Edge(entry["source"].whole(), entry["target"].whole(), entry["nbytes"].wholes(), entry["whole"].whole(),
                entry["name"].text())


def _piece(look: Look, cut: Cut, unit: int) -> Look:
    shape = list(look[0])
    shape[cut.dim] = cut.borders[unit + 1] - cut.borders[unit]
    return tuple(shape), look[1]
