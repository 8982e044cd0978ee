"""What a walk over a program counts, and what walks that only count need do but once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xdit_compile.ir.layout import Layout
from xdit_compile.ir.program import Note
from xdit_compile.passes.sharded_value import Value

Result = Value | tuple[Any, ...] | None
LaidOut = Mapping[int, set[Layout | None]]
Way = tuple[str, str, str]
"""``count`` or ``bytes`` of a kind of collective along an axis."""
Relay = tuple[int, Layout]
"""A value, by its identity, and how it is laid out anew."""
Turned = tuple[int, tuple[int, ...]]
"""The number of an input, and where each dimension of a value that was made by turning it was before."""


@dataclass
class Cost:
    """What the walk met so far: work and traffic of one rank, and the decisions behind them.

    Attributes:
        attention_flops: those of ``flops`` that are attention; traffic: collectives and bytes sent, by kind and axis.
    """

    flops: int = 0
    attention_flops: int = 0
    sent: int = 0
    moved: int = 0
    stale_bytes: int = 0
    attentions: int = 0
    gathers: int = 0
    notes: list[Note] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)  # values of main, along all of a dimension
    results: tuple[Layout, ...] = ()  # of main, as they were computed
    traffic: Counter[Way] = field(default_factory=Counter)

    def add(self, other: Cost) -> None:
        self.flops += other.flops
        self.attention_flops += other.attention_flops
        if other.traffic:
            self.traffic.update(other.traffic)
        self.sent += other.sent
        self.moved += other.moved
        self.stale_bytes += other.stale_bytes
        self.attentions += other.attentions
        self.gathers += other.gathers


@dataclass
class Step:
    """What a walk did at one node, beside what it counted: all that later nodes can see of it.

    Attributes:
        asked: whether values had been laid out anew before, where that was asked; relaid: what was laid out anew here.
        wanted: how inputs that are whole were laid out; turned: values, by their identity, that are turned inputs.
    """

    asked: dict[Relay, bool] = field(default_factory=dict)
    relaid: list[Relay] = field(default_factory=list)
    wanted: list[tuple[int, Layout | None]] = field(default_factory=list)
    turned: dict[int, Turned] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    result: Result = None


@dataclass
class CostMemo:
    """What walks of one program that only count, for one rank, need do but once.

    Attributes:
        functions: block functions, by the layouts of their inputs; arguments: of each function, by number and layout.
        whole: nodes of which nothing is sharded; steps: all others, by the identities of the values they are given.
        relaid: values laid out anew, with what they were, whose identity is thereby nobody else's.
    """

    functions: dict[tuple[str, tuple[Layout, ...]], tuple[str, tuple[Layout, ...], Cost, LaidOut]] = field(
        default_factory=dict)
    arguments: dict[tuple[str, int, Layout], Value] = field(default_factory=dict)
    whole: dict[fx.Node, tuple[Result, Cost]] = field(default_factory=dict)
    steps: dict[tuple[Any, ...], tuple[list[Step], tuple[Result, ...]]] = field(default_factory=dict)
    relaid: dict[Relay, tuple[Value, Value]] = field(default_factory=dict)
