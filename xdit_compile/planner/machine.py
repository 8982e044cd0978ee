"""A machine as data: how fast its devices work and talk to each other. Read from TOML, checked, and never guessed.

Shipped ones lie in ``machines/``; ``calibrate`` writes one for the machine at hand.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from xdit_compile.errors import SpecError

FOLDER = Path(__file__).parent / "machines"
NETWORKS = "networks"
"""The file of links between nodes."""

ANY = "any"
PATTERNS = (ANY, "all_to_all", "all_gather", "all_reduce", "ring")
"""Ways to talk. ``ring`` is what neighbours pass to each other, in a ring or from stage to stage."""

AROUND = ("all_gather", "all_reduce")
"""Patterns that are carried out around a ring (Patarasuk and Yuan, 2009), where nothing else is known of them."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Rates:
    """Operations per second of one device, as they are reached: in matrix products, and in attention."""

    products: float
    attention: float


@dataclass(frozen=True)
class Link:
    """How ranks of one group talk.

    Attributes:
        devices: the group lies within so many neighbouring devices: a switch, a socket, a node; 0 for any number.
        ranks: how many ranks the group has; 0 for any number.
        pattern: one of PATTERNS.
        latency: seconds of a collective that sends next to nothing.
        bandwidth: bytes per second that one rank sends while all ranks do.
        shared: whether it is the bandwidth of a whole node instead, which all its devices share: they have one adapter.
    """

    devices: int
    ranks: int
    pattern: str
    latency: float
    bandwidth: float
    shared: bool = False

    def __str__(self) -> str:
        within = f"within {self.devices} devices" if self.devices else "any placement"
        who = f"{self.ranks} ranks" if self.ranks else "any ranks"
        return (f"{within}, {who}, {self.pattern}: {self.latency * 1e6:.1f} us + bytes / "
                f"{self.bandwidth / 1e9:.3g} GB/s")


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Attributes:
        name: what it is called in reports.
        devices: of one node; nodes: how many there are.
        memory: bytes of one device that a program may take.
        rates: by dtype.
        moved: bytes per second of element-wise work, read and written.
        launch: seconds of the host per operator that it starts; compiled: of those, what a compiler leaves, and of
            bytes that element-wise work moves (0 to 1).
        asynchronous: whether the host goes on while the device works, as with GPUs.
        overlap: of what a ring brings, the part that attention can hide (0 to 1).
        collective: seconds of the host per collective.
        host_copy: bytes per second from the host's memory to one device.
        functions: values per second of exp, tanh, gelu and the like, which on CPUs take longer than memory does.
        packing: bytes per second of weights that are put in order before they are multiplied, as CPUs do in each
            product (Goto and van de Geijn, 2008); infinite where that is hidden.
        links: how ranks talk, the narrowest placement first.
    """

    name: str
    devices: int
    memory: int
    rates: Mapping[str, Rates]
    moved: float
    launch: float
    compiled: float
    asynchronous: bool
    overlap: float
    collective: float
    host_copy: float
    links: tuple[Link, ...]
    nodes: int = 1
    functions: float = math.inf
    packing: float = math.inf

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    def rates_of(self, dtype: str) -> Rates:
        """The rates for tensors of ``dtype``.

        Raises:
            SpecError: nobody measured that.
        """
        if dtype not in self.rates:
            raise SpecError(f"{self.name} has no rates for {dtype}, but for {', '.join(self.rates)}; use a model of "
                            f"such a dtype, or add [rates.{dtype}] to the machine's file")
        return self.rates[dtype]

    def link(self, ranks: Collection[int], pattern: str) -> Link:
        """How these ranks talk: the link of the narrowest placement that holds all of them, of this pattern rather than
        any, and of this many ranks, else of the nearest number.

        Raises:
            SpecError: no link reaches so far.
        """
        wanted = [pattern, *(["ring"] if pattern in AROUND else []), ANY]
        held = [x for x in self.links if x.pattern in wanted]
        held = [x for x in held if not x.devices or len({r // x.devices for r in ranks}) == 1]
        if not held:
            raise SpecError(f"{self.name} has no link between devices {sorted(ranks)}; add one with devices = 0 to "
                            "[[links]] of the machine's file, or give a network: 2x8xNAME+NETWORK")
        narrow = min(x.devices or math.inf for x in held)
        held = [x for x in held if (x.devices or math.inf) == narrow]
        return min(held, key=lambda x: (wanted.index(x.pattern),
                                        abs(math.log(x.ranks / len(ranks))) if x.ranks else math.inf, x.ranks))

    @cached_property
    def slowest(self) -> float:
        """Bytes per second of the slowest link."""
        return min(x.bandwidth for x in self.links)

    def faster(self, factor: float) -> Machine:
        """The same with links of ``factor`` times the bandwidth."""
        return replace(self, links=tuple(replace(x, bandwidth=x.bandwidth * factor) for x in self.links))


def machine(text: str, world: int | None = None) -> Machine:
    """The machine that ``text`` names: a TOML file (it ends in .toml), or a shipped one as ``8xl40-pcie``, and on
    several nodes ``2x8xl40-pcie+ethernet-100g``.

    Args:
        world: devices, where they are not said; more than a node has are on several.

    Raises:
        SpecError: there is none of that name, or its file is wrong; says where and how.
    """
    if text.endswith(".toml"):
        found = read(Path(text))
        return found if world is None else _sized(found, world, text)
    matched = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([a-z][\w-]*?)(?:\+([\w-]+))?", text.strip(), re.IGNORECASE)
    name = matched.group(3).lower() if matched else text
    if matched is None or name not in shipped():
        raise SpecError(f"there is no machine {text!r}; write the path of a .toml file, or one of "
                        f"{', '.join(shipped())}, as in 8xNAME, or 2x8xNAME+NETWORK for two nodes")
    nodes, devices, _, network = matched.groups()
    found = read(FOLDER / f"{name}.toml")
    if devices:
        found = replace(found, devices=int(devices), nodes=int(nodes or 1))
    if world is not None and (not devices or world > found.world_size):
        found = _sized(found, world, text)
    if found.nodes > 1 or network:
        found = replace(found, links=(*(x for x in found.links if x.devices), *_network(network or "infiniband-400g")))
    return replace(found, name=text if devices else f"{found.world_size}x{text}")


def shipped() -> tuple[str, ...]:
    """Names of the machines that come with the package."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.toml") if p.stem != NETWORKS))


def networks() -> tuple[str, ...]:
    """Names of the networks between nodes that come with the package."""
    return tuple(_loaded(FOLDER / f"{NETWORKS}.toml"))


def read(path: Path) -> Machine:
    """The machine of a TOML file.

    Raises:
        SpecError: it cannot be read, or lacks something, or has what no machine has.
    """
    data = _Table(_loaded(path), str(path))
    rates = data.table("rates")
    known = {dtype: rates.table(dtype) for dtype in rates.values}
    if unknown := known.keys() - set(DTYPES):
        raise SpecError(f"{path}: [rates] has {', '.join(sorted(unknown))}; dtypes are {', '.join(DTYPES)}")
    device = data.table("device")
    made = Machine(
        name=data.text("name"), devices=data.whole("devices"), nodes=data.whole("nodes", 1),
        memory=int(device.number("memory_gb") * 1e9),
        rates={dtype: Rates(t.number("products_tflops") * 1e12, t.number("attention_tflops") * 1e12)
               for dtype, t in known.items()},
        moved=device.number("element_wise_gb_per_s") * 1e9, launch=device.number("launch_us", least=0) / 1e6,
        compiled=device.number("left_by_a_compiler", 0.3), asynchronous=device.flag("asynchronous", True),
        overlap=device.number("overlap", 0.0, least=0), collective=device.number("collective_us", least=0) / 1e6,
        host_copy=device.number("host_copy_gb_per_s", 10.0) * 1e9,
        functions=device.number("functions_g_per_s", 0.0, least=0) * 1e9 or math.inf,
        packing=device.number("packing_gb_per_s", 0.0, least=0) * 1e9 or math.inf,
        links=tuple(_link(t) for t in data.tables("links")))
    if not made.rates:
        raise SpecError(f"{path}: [rates] is empty; it says for a dtype, as [rates.bfloat16], how fast products are")
    for table in (data, device, rates, *known.values()):
        table.finish()
    return made


def _loaded(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"the machine's file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"the machine's file {path} is no TOML: {error}") from error


def _sized(found: Machine, world: int, text: str) -> Machine:
    """``found`` with ``world`` devices: on one node, or on nodes that are full."""
    if world <= found.devices:
        return replace(found, devices=world, nodes=1)
    if world % found.devices:
        raise SpecError(f"{world} devices do not fill nodes of {found.devices}, as {text} has them; "
                        f"use {world // found.devices * found.devices}, or say how many there are")
    return replace(found, nodes=world // found.devices)


def _network(name: str) -> Sequence[Link]:
    path = FOLDER / f"{NETWORKS}.toml"
    known = _Table(_loaded(path), str(path))
    if name not in known.values:
        raise SpecError(f"there is no network {name!r}; there are {', '.join(known.values)}")
    return [_link(t) for t in known.table(name).tables("links")]


def _link(table: _Table) -> Link:
    made = Link(table.whole("devices", 0), table.whole("ranks", 0), table.text("pattern", ANY),
                table.number("latency_us", least=0) / 1e6, table.number("gb_per_s") * 1e9, table.flag("shared", False))
    if made.pattern not in PATTERNS:
        raise SpecError(f"{table.where}: pattern is one of {', '.join(PATTERNS)}, got {made.pattern!r}")
    table.finish()
    return made


class _Table:
    """A table of a TOML file, each word of which is asked for once and checked."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise SpecError(f"{where} is a table, got {values!r}")
        self.values, self.where, self.asked = values, where, set[str]()

    def _get(self, word: str, default: Any) -> Any:
        self.asked.add(word)
        if word not in self.values and default is None:
            raise SpecError(f"{self.where} lacks {word}")
        return self.values.get(word, default)

    def text(self, word: str, default: str | None = None) -> str:
        value = self._get(word, default)
        if not isinstance(value, str) or not value:
            raise SpecError(f"{self.where}: {word} is a text, got {value!r}")
        return value

    def flag(self, word: str, default: bool) -> bool:
        value = self._get(word, default)
        if not isinstance(value, bool):
            raise SpecError(f"{self.where}: {word} is true or false, got {value!r}")
        return value

    def whole(self, word: str, default: int | None = None) -> int:
        value = self._get(word, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if default == 0 else 1):
            raise SpecError(f"{self.where}: {word} is a whole number of at least {0 if default == 0 else 1}, "
                            f"got {value!r}")
        return value

    def number(self, word: str, default: float | None = None, least: float | None = None) -> float:
        """A finite number above 0, or of at least ``least``."""
        value = self._get(word, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or (value <= 0 if least is None else value < least):
            asked = "above 0" if least is None else f"of at least {least}"
            raise SpecError(f"{self.where}: {word} is a number {asked}, got {value!r}")
        return float(value)

    def table(self, word: str) -> _Table:
        return _Table(self._get(word, None), f"{self.where}: [{word}]")

    def tables(self, word: str) -> list[_Table]:
        found = self._get(word, None)
        if not isinstance(found, list) or not found:
            raise SpecError(f"{self.where}: [[{word}]] is there at least once")
        return [_Table(t, f"{self.where}: [[{word}]] number {i + 1}") for i, t in enumerate(found)]

    def finish(self) -> None:
        """Refuse words that nobody asked for."""
        if unknown := self.values.keys() - self.asked:
            raise SpecError(f"{self.where} has {', '.join(sorted(unknown))}, which means nothing there; it may have "
                            f"{', '.join(sorted(self.asked))}")
