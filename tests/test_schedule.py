"""A schedule does what PipeFusion asks for, its check refuses what would go wrong, its simulation adds up by hand.

The model of a schedule is `play`: stages that hold messages, and queues that messages come out of as they went in.
"""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xdit_compile.diagnostics.timeline_plot import draw
from xdit_compile.errors import XditError
from xdit_compile.runtime.pipefusion.schedule import (
    RESULT,
    WHOLE,
    Bar,
    Edge,
    Op,
    Schedule,
    ScheduleError,
    Timeline,
    check,
    drain_ops,
    schedule,
    simulate,
    step_ops,
)

many = settings(deadline=None, derandomize=True, max_examples=150)

SVG = "{http://www.w3.org/2000/svg}"
Message = tuple[Edge, int, int]


def wires(stages: int, patches: int, skips: tuple[tuple[int, int], ...] = ()) -> tuple[Edge, ...]:
    """Hidden states from each stage to the next, skips, and results."""
    ends = [("hidden", s, s + 1) for s in range(stages - 1)] + [("skip", s, t) for s, t in skips]
    ends += [(RESULT, stages - 1, s) for s in range(stages - 1)]
    return tuple(Edge(s, t, (8,) * patches, 8 * patches, name) for name, s, t in ends)


@st.composite
def schedules(draw: st.DrawFn, least_stages: int = 1) -> Schedule:
    stages, patches = draw(st.integers(least_stages, 6)), draw(st.integers(1, 8))
    pairs = [(s, t) for t in range(stages) for s in range(t)]
    skips = tuple(draw(st.lists(st.sampled_from(pairs), unique=True, max_size=5))) if pairs else ()
    edges = draw(st.permutations(wires(stages, patches, skips)))
    return schedule(stages, patches, draw(st.integers(1, 6)), draw(st.integers(0, 7)), edges,
                    chained=draw(st.booleans()))


class Wrong(Exception):
    """What `play` meets in a schedule that is not sound."""


def play(s: Schedule) -> list[list[tuple[int, int]]]:
    """The runs of each stage, in order. Fails where a stage lacks something or gets other than it expects, and if
    anything is left undone."""
    queues: dict[Edge, deque[Message]] = defaultdict(deque)
    ran: list[list[tuple[int, int]]] = [[] for _ in s.ops]
    held: list[set[Message]] = [set() for _ in s.ops]
    ever: list[set[Message]] = [set() for _ in s.ops]
    sent: set[Message] = set()
    left = [deque(ops) for ops in s.ops]
    order = [(step, unit) for step, units in enumerate(s.units) for unit in units]

    def overlapping(unit: int, step: int) -> list[int]:
        """The units of a step that ``unit`` of the one before or after has something in common with."""
        return [u for u in s.units[step] if u == unit or WHOLE in (u, unit)] if 0 <= step < len(s.units) else []

    def needed(stage: int, step: int, unit: int) -> list[Message]:
        """What a run is computed from: in the first stage also results of the step before, of the same patch or
        whatever overlaps it; all of them in every stage if unchained."""
        found = [(e, step, unit) for e in s.edges if e.target == stage and e.name != RESULT]
        for e in (e for e in s.edges if e.target == stage and e.name == RESULT and step):
            if stage == 0 or not s.chained:
                found += [(e, step - 1, u) for u in (overlapping(unit, step - 1) if s.chained else s.units[step - 1])]
        return found

    def early(stage: int, op: Op) -> bool:
        """Whether a stage would wait for a result before it has run all that is computed from it elsewhere."""
        return (s.chained and stage > 0 and op.edge.name == RESULT
                and not {(op.step + 1, u) for u in overlapping(op.unit, op.step + 1)}.issubset(ran[stage]))

    def do(stage: int, op: Op) -> None:
        where, message = (op.step, op.unit), (op.edge, op.step, op.unit)
        if op.kind == "run":
            now = needed(stage, *where) if s.chained else [m for m in needed(stage, *where) if m[0].name != RESULT]
            if order[len(ran[stage]):][:1] != [where] or not held[stage].issuperset(now) or not ever[
                    stage].issuperset(needed(stage, *where)):
                raise Wrong(op)
            ran[stage].append(where)
        elif op.kind == "send":
            if op.edge not in s.edges or op.edge.source != stage or where not in ran[stage] or message in sent:
                raise Wrong(op)
            sent.add(message)
            queues[op.edge].append(message)
        elif op.kind == "recv":
            if op.edge.target != stage or early(stage, op) or queues[op.edge].popleft() != message:
                raise Wrong(op)
            held[stage].add(message)
            ever[stage].add(message)
        else:
            if message not in held[stage] or (op.edge.name != RESULT and where not in ran[stage]):
                raise Wrong(op)
            held[stage].remove(message)

    moved = True
    while moved:
        moved = False
        for stage, ops in enumerate(left):
            while ops and (ops[0].kind != "recv" or queues[ops[0].edge]):
                do(stage, ops.popleft())
                moved = True
    if any(left) or any(held) or any(queues.values()) or any(runs != order for runs in ran) or len(
            sent) != len(s.edges) * len(order):
        raise Wrong("the end")
    return ran


def changed(s: Schedule, stage: int, ops: list[Op]) -> Schedule:
    return replace(s, ops=(*s.ops[:stage], tuple(ops), *s.ops[stage + 1:]))


@many
@given(schedules())
def test_a_schedule_is_sound(s: Schedule) -> None:
    check(s)
    assert all(runs == [(t, u) for t, units in enumerate(s.units) for u in units] for runs in play(s))


@many
@given(schedules())
def test_two_stages_exchange_messages_in_one_order_over_all_their_edges(s: Schedule) -> None:
    # As transports ask for that match the messages between two processes by their order.
    between: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for op in (op for ops in s.ops for op in ops if op.edge and op.kind in ("send", "recv")):
        between[op.kind, op.edge.source, op.edge.target].append(str(op).partition(" ")[2])
    for (kind, source, target), messages in between.items():
        assert messages == between["send" if kind == "recv" else "recv", source, target]


def agree(broken: Schedule, *moved: Op) -> bool:
    """Whether a schedule in which operations were moved goes wrong; the check has to say the same and name one."""
    try:
        play(broken)
    except Wrong:
        with pytest.raises(ScheduleError) as refused:
            check(broken)
        assert any(str(op).partition(" ")[2] in str(refused.value) for op in moved)
        return True
    check(broken)
    return False


@many
@given(schedules(), st.data())
def test_the_check_refuses_what_goes_wrong_and_nothing_else(s: Schedule, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, len(s.ops) - 1))
    ops = list(s.ops[stage])
    i, j = (data.draw(st.integers(0, len(ops) - 1)) for _ in range(2))
    ops[i], ops[j] = ops[j], ops[i]
    agree(changed(s, stage, ops), ops[i], ops[j])


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(("stages", "patches", "steps", "warmup"), [(2, 2, 3, 1), (2, 2, 2, 0), (3, 2, 2, 1)])
def test_every_move_of_an_operation_that_goes_wrong_is_refused(stages: int, patches: int, steps: int, warmup: int,
                                                               chained: bool) -> None:
    s = schedule(stages, patches, steps, warmup, wires(stages, patches, ((0, stages - 1),)), chained=chained)
    wrong = []
    for stage, ops in enumerate(s.ops):
        for i, op in enumerate(ops):
            rest = [*ops[:i], *ops[i + 1:]]
            wrong += [agree(changed(s, stage, [*rest[:j], op, *rest[j:]]), op) for j in range(len(ops)) if j != i]
    assert 0 < sum(wrong) < len(wrong), "moves of both kinds"


@many
@given(schedules(), st.data())
def test_an_operation_left_out_or_done_twice_is_named(s: Schedule, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, len(s.ops) - 1))
    ops = list(s.ops[stage])
    i = data.draw(st.integers(0, len(ops) - 1))
    for wrong, what in ((ops[:i] + ops[i + 1:], "is missing"), (ops[:i] + ops[i:i + 1] + ops[i:], "is there twice")):
        broken = changed(s, stage, wrong)
        with pytest.raises(ScheduleError, match=f"^stage {stage}: {re.escape(str(ops[i]))} {what}$"):
            check(broken)
        with pytest.raises(Wrong):
            play(broken)


@many
@given(schedules(least_stages=2), st.data())
def test_a_send_to_the_wrong_stage_is_named(s: Schedule, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, len(s.ops) - 1))
    ops = list(s.ops[stage])
    i = data.draw(st.sampled_from([i for i, op in enumerate(ops) if op.kind == "send"]))
    assert ops[i].edge is not None
    target = data.draw(st.integers(-1, len(s.ops)))
    assume(target != ops[i].edge.target)
    ops[i] = replace(ops[i], edge=replace(ops[i].edge, target=target))
    with pytest.raises(ScheduleError, match=re.escape(str(ops[i]))):
        check(changed(s, stage, ops))


def test_messages_that_pass_each_other_are_refused() -> None:
    s = schedule(2, 2, 1, 0, wires(2, 2))
    ops = list(s.ops[1])
    first, second = (i for i, op in enumerate(ops) if op.kind == "recv")
    ops.insert(first, ops.pop(second))
    with pytest.raises(ScheduleError, match=r"^stage 1: recv hidden 0->1 step 0 patch 1 where stage 0 does "
                                            r"send hidden 0->1 step 0 patch 0$"):
        check(changed(s, 1, ops))


def test_stages_that_wait_for_each_other_are_refused() -> None:
    s = schedule(2, 1, 1, 0, wires(2, 1))
    ops = list(s.ops[0])
    assert [op.kind for op in ops] == ["run", "send", "recv", "free"]
    ops[1], ops[2] = ops[2], ops[1]
    with pytest.raises(ScheduleError, match=r"wait for ever: stage 0 in recv result 1->0 step 0 patch 0, "
                                            "stage 1 in recv hidden 0->1 step 0 patch 0$"):
        check(changed(s, 0, ops))


@many
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_sends_that_block_are_enough_for_one_unit_at_a_time_only(stages: int, patches: int, steps: int,
                                                                 warmup: int, chained: bool) -> None:
    s = schedule(stages, patches, steps, warmup, wires(stages, patches), chained=chained)
    single = patches == 1 or warmup >= steps
    if stages == 1 or (single and (stages == 2 or steps == 1 or not chained)):
        check(s, blocking=True)
    else:
        # The last stage offers a result while stages before it still offer it a later patch, or one of the next step.
        check(s)
        with pytest.raises(ScheduleError, match=r"wait for ever if sends block: stage 0 in .* in send result"):
            check(s, blocking=True)


def test_operations_as_text() -> None:
    s = schedule(2, 2, 2, 1, wires(2, 2))
    assert str(s).splitlines() == [
        "stage 0 of 2",
        "  run step 0 whole",
        "  send hidden 0->1 step 0 whole",
        "  recv result 1->0 step 0 whole",
        "  run step 1 patch 0",
        "  send hidden 0->1 step 1 patch 0",
        "  run step 1 patch 1",
        "  send hidden 0->1 step 1 patch 1",
        "  free result 1->0 step 0 whole",
        "  recv result 1->0 step 1 patch 0",
        "  free result 1->0 step 1 patch 0",
        "  recv result 1->0 step 1 patch 1",
        "  free result 1->0 step 1 patch 1",
        "stage 1 of 2",
        "  recv hidden 0->1 step 0 whole",
        "  run step 0 whole",
        "  send result 1->0 step 0 whole",
        "  free hidden 0->1 step 0 whole",
        "  recv hidden 0->1 step 1 patch 0",
        "  run step 1 patch 0",
        "  send result 1->0 step 1 patch 0",
        "  free hidden 0->1 step 1 patch 0",
        "  recv hidden 0->1 step 1 patch 1",
        "  run step 1 patch 1",
        "  send result 1->0 step 1 patch 1",
        "  free hidden 0->1 step 1 patch 1",
    ]


def test_results_come_when_the_sample_is_computed_from_them() -> None:
    edges = (Edge(1, 0, (8, 8), 16, RESULT),)

    def words(before: tuple[int, ...] | None, units: tuple[int, ...]) -> list[str]:
        return [str(op).replace("result 1->0 ", "") for op in step_ops(0, 2, before, units, 5, edges)]

    assert words(None, (0, 1)) == ["run step 5 patch 0", "run step 5 patch 1"]
    assert words((0, 1), (0, 1)) == [
        "recv step 4 patch 0", "run step 5 patch 0", "free step 4 patch 0",
        "recv step 4 patch 1", "run step 5 patch 1", "free step 4 patch 1"]
    assert words((WHOLE,), (0, 1)) == [
        "recv step 4 whole", "run step 5 patch 0", "run step 5 patch 1", "free step 4 whole"]
    assert words((0, 1), (WHOLE,)) == [
        "recv step 4 patch 0", "recv step 4 patch 1", "run step 5 whole", "free step 4 patch 0", "free step 4 patch 1"]
    assert step_ops(1, 2, (0,), (0,), 5, edges) == (Op("run", 5, 0), Op("send", 5, 0, edges[0]))
    # Stages between the first and the last do not wait for results before they have run.
    edges = (Edge(0, 1, (8, 8), 16, "hidden"), Edge(2, 0, (8, 8), 16, RESULT), Edge(2, 1, (8, 8), 16, RESULT))

    def later(before: tuple[int, ...] | None, units: tuple[int, ...]) -> list[str]:
        return [str(op).replace("result 2->1 ", "") for op in step_ops(1, 3, before, units, 5, edges)
                if op.edge != edges[0]]

    assert later(None, (0, 1)) == ["run step 5 patch 0", "run step 5 patch 1"]
    assert later((0, 1), (0, 1)) == [
        "run step 5 patch 0", "recv step 4 patch 0", "free step 4 patch 0",
        "run step 5 patch 1", "recv step 4 patch 1", "free step 4 patch 1"]
    assert later((WHOLE,), (0, 1)) == [
        "run step 5 patch 0", "run step 5 patch 1", "recv step 4 whole", "free step 4 whole"]
    assert later((0, 1), (WHOLE,)) == [
        "run step 5 whole", "recv step 4 patch 0", "recv step 4 patch 1", "free step 4 patch 0", "free step 4 patch 1"]
    edges = edges[1:2]
    assert [op.kind for op in drain_ops(0, 2, (0, 1), 5, edges)] == ["recv", "free"] * 2
    assert drain_ops(1, 2, (0, 1), 5, edges) == ()


@pytest.mark.parametrize(
    ("edge", "why"),
    [
        (Edge(1, 0, (8, 8), 16, "hidden"), "all else goes forward"),
        (Edge(1, 1, (8, 8), 16, "skip"), "all else goes forward"),
        (Edge(0, 3, (8, 8), 16, "skip"), "among 3 stages"),
        (Edge(1, 0, (8, 8), 16, RESULT), "a result leaves the last"),
        (Edge(2, 2, (8, 8), 16, RESULT), "a result leaves the last"),
        (Edge(0, 1, (8,), 16, "skip"), "sizes for 1 patches of 2"),
        (Edge(0, 1, (4, 4), 16, "hidden"), "edges of the same name"),
    ],
    ids=str,
)
def test_edges_that_make_no_pipeline_are_refused(edge: Edge, why: str) -> None:
    with pytest.raises(ScheduleError, match=why):
        schedule(3, 2, 1, 0, (*wires(3, 2), edge))


@pytest.mark.parametrize("numbers", [(0, 1, 1, 0), (1, 0, 1, 0), (1, 1, -1, 0), (1, 1, 1, -1)])
def test_numbers_that_make_no_run_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ScheduleError, match="stages"):
        schedule(*numbers, ())


C = 0.25
"""Seconds that a patch takes in a stage; sums of it are exact."""


def simulated(stages: int, patches: int, steps: int, warmup: int, runs: Mapping[int, float] | None = None,
              hidden: float = 0.0, result: float = 0.0, chained: bool = True) -> Timeline:
    s = schedule(stages, patches, steps, warmup, wires(stages, patches), chained=chained)
    check(s)
    return simulate(s, lambda stage, unit: (runs or {}).get(stage, C) * (patches if unit == WHOLE else 1),
                    lambda edge, unit: result if edge.name == RESULT else hidden)


@many
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 6))
def test_nothing_is_drained_between_steps(stages: int, patches: int, steps: int) -> None:
    made = simulated(stages, patches, steps, 0)
    if patches >= stages:
        assert made.seconds == (steps * patches + stages - 1) * C
        assert made.bubble() == pytest.approx((stages - 1) / (steps * patches + stages - 1))
    else:
        # A patch comes back to the first stage after it has been through all of them.
        assert made.seconds == ((steps - 1) * stages + patches + stages - 1) * C
    drained = simulated(stages, patches, steps, 0, chained=False)
    assert drained.seconds == steps * (patches + stages - 1) * C


@many
@given(st.integers(1, 6), st.integers(1, 6))
def test_one_patch_is_one_stage_at_a_time(stages: int, steps: int) -> None:
    made = simulated(stages, 1, steps, 0)
    assert made.seconds == steps * stages * C
    assert made.bubble() == pytest.approx(1 - 1 / stages)


@many
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 4), st.integers(0, 4))
def test_whole_steps_go_through_one_stage_after_the_other(stages: int, patches: int, warmup: int, more: int) -> None:
    assume(warmup + more and patches >= stages)
    made = simulated(stages, patches, warmup + more, warmup)
    assert made.seconds == (warmup * stages * patches + (more * patches + stages - 1 if more else 0)) * C
    if warmup:
        assert made.bubble(0, warmup - 1) == pytest.approx(1 - 1 / stages)
        # All of the first step in one stage, then in the next.
        assert [(b.stage, b.start, b.end) for b in made.bars if b.kind == "run" and b.step == 0] == [
            (s, s * patches * C, (s + 1) * patches * C) for s in range(stages)]
    if more:
        assert made.bubble(warmup) == pytest.approx((stages - 1) / (more * patches + stages - 1))


def test_transfers_slower_than_runs_are_waited_for() -> None:
    # Stage 1 runs a patch of 0.25 s whenever another second of transfer is over, the edge never idle.
    made = simulated(2, 3, 1, 0, hidden=1.0)
    assert [(b.start, b.end) for b in made.bars if b.stage == 0 and b.kind == "run"] == [
        (0, C), (C, 2 * C), (2 * C, 3 * C)]
    assert [(b.kind, b.start, b.end) for b in made.bars if b.stage == 1] == [
        ("recv", 0, 1.25), ("run", 1.25, 1.5), ("recv", 1.5, 2.25), ("run", 2.25, 2.5),
        ("recv", 2.5, 3.25), ("run", 3.25, 3.5)]
    assert made.seconds == 3.5
    assert made.busy() == (0.75 / 3.5, 0.75 / 3.5)
    # What comes after the last run is waited for too, but no part of the time in which stages could run.
    late = simulated(2, 3, 1, 0, result=1.0)
    assert late.seconds == 0.5 + 3 * 1.0
    assert late.bubble() == pytest.approx(1 / 4)


def test_transfers_hide_behind_runs() -> None:
    made = simulated(2, 4, 3, 0, hidden=C, result=C)
    assert made.seconds == (3 * 4 + 1) * C + C + C, "the first message, and the last"


@many
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2), st.sampled_from([0.0, C / 2, 3 * C]))
def test_only_the_first_stage_waits_for_results_before_it_runs(stages: int, patches: int, steps: int, warmup: int,
                                                               result: float) -> None:
    made = simulated(stages, patches, steps, warmup, result=result)
    runs = [{(b.step, b.unit): b for b in made.bars if (b.stage, b.kind) == (s, "run")} for s in range(stages)]
    for before, here in pairwise(runs):
        free = 0.0
        for unit, bar in here.items():
            assert bar.start == max(free, before[unit].end)
            free = bar.end


def test_a_slow_stage_sets_the_pace() -> None:
    steps, patches = 5, 4
    made = simulated(3, patches, steps, 0, runs={1: 1.0})
    assert made.seconds == C + steps * patches * 1.0 + C
    assert made.busy() == (5.0 / 20.5, 20 / 20.5, 5.0 / 20.5)


def test_shares_count_what_ran_in_the_window() -> None:
    bars = (Bar(0, "run", 0, 0, 10.0, 12.0), Bar(0, "recv", 0, 0, 12.0, 13.0), Bar(0, "run", 1, 0, 13.0, 15.0),
            Bar(1, "run", 0, 0, 12.0, 14.0), Bar(1, "run", 1, 0, 15.0, 17.0), Bar(0, "recv", 1, 0, 15.0, 18.0))
    made = Timeline(bars, 2)
    assert made.seconds == 8.0
    assert made.busy() == (4 / 7, 4 / 7)
    assert made.busy(0, 0) == (3 / 4, 2 / 4), "the first second of the next step is within the window of this one"
    assert made.busy(1) == (2 / 4, 3 / 4)
    assert made.bubble(0, 0) == 1 - 5 / 8
    with pytest.raises(ScheduleError, match="no stage ran from step 2 to the last"):
        made.bubble(2)
    with pytest.raises(ScheduleError, match="no stage ran from step 0 to step 0"):
        Timeline((), 2).bubble(0, 0)
    assert Timeline((), 2).seconds == 0.0
    for start in (-1.5, 0.0, 10.0):
        told = Timeline(tuple(b.since(start) for b in bars), 2)
        assert [(b.start + start, b.end + start) for b in told.bars] == [(b.start, b.end) for b in bars]
        assert told.busy(1) == made.busy(1) and told.seconds == made.seconds


def two() -> dict[str, Timeline]:
    return {"predicted": simulated(3, 4, 3, 1), "measured <$x_1$> & more": simulated(2, 4, 3, 1, hidden=0.1)}


def test_a_picture_has_lanes_titles_and_one_time_axis(tmp_path: Path) -> None:
    path = tmp_path / "timeline.svg"
    draw(two(), path)
    root = ET.parse(path).getroot()
    loops = [g for g in root.iter(f"{SVG}g") if re.fullmatch(r"timeline-\d-stage-\d", g.get("id", ""))]
    assert [g.get("id") for g in loops] == [
        "timeline-0-stage-0", "timeline-0-stage-1", "timeline-0-stage-2", "timeline-1-stage-0", "timeline-1-stage-1"]
    assert [len(list(g.iter(f"{SVG}path")) or list(g.iter(f"{SVG}use"))) for g in loops] == [9] * 5, "a bar for a run"
    text = [t.text for t in root.iter(f"{SVG}text")]
    predicted, measured = two().values()
    assert f"predicted: {predicted.seconds:.4g} s, bubble {predicted.bubble():.1%}" in text
    assert f"measured <$x_1$> & more: {measured.seconds:.4g} s, bubble {measured.bubble():.1%}" in text
    assert text.count("time (s)") == 1
    assert text.count("stage 0") == 2 and text.count("stage 2") == 1
    assert {"whole", "patch 0", "patch 3", "waiting"} <= set(text) and "patch 4" not in text


def test_step_numbers_stand_where_there_is_room(tmp_path: Path) -> None:
    def numbers(steps: int) -> list[str | None]:
        draw({"": simulated(1, 1, steps, 0)}, tmp_path / "x.svg")
        # The ticks of the axis are in a group of their own.
        root = ET.parse(tmp_path / "x.svg").getroot()
        ticks = {id(t) for g in root.iter(f"{SVG}g") if "axis" in g.get("id", "") for t in g.iter(f"{SVG}text")}
        return [t.text for t in root.iter(f"{SVG}text") if id(t) not in ticks and (t.text or "").isdigit()]

    assert numbers(12) == [str(n) for n in range(12)]
    assert numbers(2000) == []


@pytest.mark.parametrize(("scale", "unit"), [(1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")])
def test_a_short_time_has_its_unit(tmp_path: Path, scale: float, unit: str) -> None:
    draw({"a": simulated(1, 2, 2, 0, runs={0: 2 * scale})}, tmp_path / "x.svg")
    assert f"a: 8 {unit}, bubble 0.0%" in (tmp_path / "x.svg").read_text()


def test_a_picture_is_the_same_each_time_whatever_the_settings(tmp_path: Path) -> None:
    import matplotlib

    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    draw(two(), first)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.facecolor": "red"}):
        draw(two(), second)
    assert first.read_bytes() == second.read_bytes()
    draw({"other": simulated(1, 1, 1, 0)}, first)
    assert first.read_bytes() != second.read_bytes(), "an old picture is replaced"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.svg", "second.svg"]


def test_without_matplotlib_a_picture_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(XditError, match=r"needs matplotlib.*pip install 'xdit-compile\[plots\]'"):
        draw(two(), tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_for_a_picture_only() -> None:
    code = "import sys, xdit_compile.diagnostics.timeline_plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(XditError, match=r"there is no folder .*missing$"):
        draw(two(), tmp_path / "missing" / "x.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(XditError, match=r"cannot be written to .*folder"):
        draw(two(), tmp_path / "folder.svg")
    (tmp_path / "folder.svg").rmdir()

    def fails(self: object, path: Path, **_: object) -> None:
        Path(path).write_text("<svg")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(XditError, match="no space left"):
        draw(two(), tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []


def test_nothing_makes_no_picture(tmp_path: Path) -> None:
    with pytest.raises(XditError, match="no timeline"):
        draw({}, tmp_path / "x.svg")
    with pytest.raises(XditError, match="no stage ran"):
        draw({"a": Timeline((), 2)}, tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []
