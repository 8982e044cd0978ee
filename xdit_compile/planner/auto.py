"""``spec="auto"``: the words it takes, whose figures of a machine it goes by, and what it chooses."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_compile.errors import SpecError
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.beside import ALONE, Beside
from xdit_compile.ir.call_arguments import Call, named_leaves
from xdit_compile.ir.parameter_groups import parameter_groups
from xdit_compile.ir.step_inputs import timestep_inputs
from xdit_compile.planner.autoencoder import shared_decoding
from xdit_compile.planner.costs import Loop
from xdit_compile.planner.machine import Machine, machine, read
from xdit_compile.planner.plan import GOALS, Planner, Question
from xdit_compile.spec import DEGREES, SHORT, ShardingSpec, pairs_of

FILE = "XDIT_COMPILE_MACHINE"
"""The environment's word for the file of this machine."""

CHOSEN = {*DEGREES, "num_patches", "warmup_steps", "stage_blocks", "offload"} - {"vae_degree"}
"""Words of the spec that are for the planner to choose."""


@dataclass(frozen=True)
class Auto:
    """A spec that is still to be chosen.

    Attributes:
        goal, exact: as of a ``Question``; memory: bytes of a device, if said; machine: a file or the name of a shipped
            one, if said; world: how many devices, if said; steps, calls: of the loop, if said.
        vae: ranks that share a pipeline's autoencoder, if said; encoders: whether it was said where encoders live.
        base: the other words that are not for the planner.
    """

    goal: str = "latency"
    exact: bool = True
    memory: int | None = None
    machine: str = ""
    world: int = 0
    steps: int = 0
    calls: int = 0
    vae: int = 0
    encoders: bool = False
    base: ShardingSpec = field(default_factory=ShardingSpec)

    @staticmethod
    def parse(spec: object) -> Auto | None:
        """From ``auto`` and words after it; None for every other spec.

        Raises:
            SpecError: a word that means nothing there, or one that is for the planner to choose.
        """
        if isinstance(spec, Auto):
            return spec
        if not isinstance(spec, str) or not re.match(r"\s*auto\s*(,|$)", spec):
            return None
        given: dict[str, Any] = {}
        others: dict[str, str] = {}
        for word, value in pairs_of(spec.partition(",")[2]):
            if word in given or word in others:
                raise SpecError(f"{word} is given twice in {spec!r}")
            if word in ("world", "steps", "calls", "vae"):
                if not value.isdecimal() or not int(value):
                    raise SpecError(f"{word} is a whole number of at least 1, got {value!r}")
                given[word] = int(value)
            elif word == "exact":
                given[word] = _one_of(word, value, ("yes", "no")) == "yes"
            elif word == "goal":
                given[word] = _one_of(word, value, GOALS)
            elif word in ("memory", "device_memory"):
                given["memory"] = bytes_of(value)
            elif word == "machine":
                given[word] = value
            elif SHORT.get(word, word) in CHOSEN or f"{word}_degree" in CHOSEN:
                raise SpecError(f"{word} is for auto to choose; leave it out, or write the whole spec yourself")
            else:
                others[word] = value
        words = [f.name for f in fields(Auto) if f.name not in ("base", "encoders")]
        try:
            return Auto(**given, encoders="encoders" in others, base=ShardingSpec.parse(others))
        except SpecError as error:
            raise SpecError(f"{error}; auto also takes {', '.join(words)}") from None

    @property
    def world_size(self) -> int:
        """Devices, where it is not yet known which spec they share: as said, as torchrun says, or all that are here."""
        if said := self.world or int(os.environ.get("WORLD_SIZE", 0)):
            return said
        here = self.machine_here()
        return here.world_size if here else max(torch.cuda.device_count(), 1)

    def check_world(self, world_size: int) -> None:
        """Raise SpecError if another number of devices was said."""
        if self.world and self.world != world_size:
            raise SpecError(f"auto,world={self.world} needs {self.world} processes, but {world_size} are running")

    def machine_here(self) -> Machine | None:
        """The machine that was said, or that of the file for this one; None if there is neither.

        Raises:
            SpecError: it cannot be read.
        """
        if self.machine:
            return machine(self.machine, self.world or None)
        path = machine_file()
        return read(path) if path.is_file() or os.environ.get(FILE) else None

    def question(self, here: Machine, world: int, batch: int, steps: int = 0, calls: int = 0,
                 beside: Beside = ALONE) -> Question:
        """What the planner is asked; what the user said goes before what was seen."""
        sized = here if here.world_size >= world else replace(here, nodes=-(-world // here.devices))
        loop = Loop(self.steps or steps or Loop.steps, self.calls or calls or 1, batch)
        return Question(sized, world, loop, self.goal, self.exact, self.memory,
                        beside.uncut() if self.encoders and self.base.encoders == "everywhere" else beside, self.base)


def spec_of(text: str) -> ShardingSpec | Auto:
    """What a text says: a spec, or how to choose one.

    Raises:
        SpecError: neither.
    """
    return Auto.parse(text) or ShardingSpec.parse(text)


def machine_file() -> Path:
    """Where ``calibrate`` writes by default and ``auto`` looks: what $XDIT_COMPILE_MACHINE says, or
    ``xdit_compile/machine.toml`` in the user's folder of settings ($XDG_CONFIG_HOME)."""
    if said := os.environ.get(FILE):
        return Path(said)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "xdit_compile" / "machine.toml"


def choose(call: Call, question: Question, decoding: Call | None = None) -> ShardingSpec:
    """The spec for one call of a model, and for what comes after the loop in a pipeline; says in one line what it
    chose and why.

    Raises:
        SpecError: there is no spec for it.
    """
    model, bound = call.module, call.bound()
    planner = Planner(captured(model, bound.args, bound.kwargs), parameter_groups(model), type(model).__name__)
    plan = planner.plan(question)
    shared = None
    if decoding:
        # It is there while it decodes, and so is all else but the values of a step.
        own = min(sum(t.nbytes for t in decoding.module.parameters()), question.beside.others)
        left = question.most - planner.resident(plan.best.spec, question) + own
        shared = shared_decoding(decoding, replace(question, memory=max(int(left), 1)))
    print("; ".join([plan.line(), *([shared.line()] if shared else [])]), file=sys.stderr)
    return replace(plan.best.spec, vae_degree=shared.degree if shared else 1)


def resolved(spec: object, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> ShardingSpec:
    """The spec that ``spec`` is, or that ``auto`` chooses for this call where no processes are running.

    Raises:
        SpecError: it cannot be read, or there is none for the call, or it is not known for which machine.
    """
    auto = Auto.parse(spec)
    if auto is None:
        return ShardingSpec.parse(spec)  # type: ignore[arg-type]
    here = auto.machine_here()
    if here is None:
        raise SpecError("auto has to know the machine where no processes are running: name one, as in "
                        "auto,machine=8xNAME, or run xdit-compile calibrate, which writes the file of this one")
    call = Call(model, args, kwargs)
    return choose(call, auto.question(here, auto.world or here.world_size, batch_of(call)))


def batch_of(call: Call) -> int:
    """How many samples a call has: the first dimension of its sample."""
    named, _ = named_leaves(call.bound())
    times = timestep_inputs(named)
    return next((t.shape[0] for n, t in named.items() if t.ndim > 2 and n not in times), 1)


def bytes_of(text: str) -> int:
    """A size as people write it: ``24GB``, ``80GiB``, a number of bytes.

    Raises:
        SpecError: it is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([kMGT]?)(i?)B?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise SpecError(f"cannot read {text!r} as a size; write it as 24GB or 80GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _one_of(word: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise SpecError(f"{word} is {' or '.join(allowed)}, got {value!r}")
    return value
