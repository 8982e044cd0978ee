"""The planner: machines that are read and checked, counts that are those of programs, plans whose words go."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import planner_runs
import pytest
import torch
import zoo
from cases import made
from diffusers import DiTTransformer2DModel
from marks import whole
from planner_runs import TOML
from pool import Pool

import xdit_compile
from xdit_compile.cli.main import main
from xdit_compile.errors import SpecError
from xdit_compile.ir.beside import Beside, EncoderBytes
from xdit_compile.ir.layout import SEQUENCE, TENSOR, Dim, Layout, Segment
from xdit_compile.ir.program import Program
from xdit_compile.passes import localize, plan
from xdit_compile.passes.interpreter import FunctionInterpreter, ProgramInterpreter
from xdit_compile.passes.pipefusion import localize_stage, plan_pipeline, stage_costs
from xdit_compile.passes.sharded_value import Value
from xdit_compile.planner.auto import Auto
from xdit_compile.planner.calibrate import write, written
from xdit_compile.planner.candidates import approximate, candidates
from xdit_compile.planner.costs import Loop, loop_seconds
from xdit_compile.planner.device_memory import COMING, MARGIN, ROOM, beside_coming, beside_held, counted_memory
from xdit_compile.planner.machine import FOLDER, Link, Machine, Rates, machine, networks, read, shipped
from xdit_compile.planner.plan import Planner, Question
from xdit_compile.planner.work import Staged, Work, WorkCounter
from xdit_compile.report.costs import costs_of
from xdit_compile.runtime.pipefusion.schedule import WHOLE
from xdit_compile.spec import ShardingSpec


def simple(devices: int = 4, bandwidth: float = 1e9, latency: float = 0.0, **changes: object) -> Machine:
    """A machine whose figures are easily reckoned with."""
    made = Machine("simple", devices, 10**12, {"float32": Rates(1e12, 1e12)}, 1e18, 0.0, 1.0, True, 0.0, 0.0, 1e12,
                   (Link(0, 0, "any", latency, bandwidth),))
    return replace(made, **changes)  # type: ignore[arg-type]


@functools.cache
def counter(name: str, batch: int = 1) -> WorkCounter:
    case = zoo.CASES[name]
    return WorkCounter(xdit_compile.capture(made(case), case.inputs(batch, False)))


@functools.cache
def planner_of(name: str, batch: int = 1) -> Planner:
    return Planner(counter(name, batch).captured)


# Machines


@pytest.mark.parametrize("name", shipped())
def test_shipped_machines_are_sound_and_say_where_figures_are_from(name: str) -> None:
    found = machine(f"{name}")
    text = (FOLDER / f"{name}.toml").read_text()
    assert "data sheet" in text or "white paper" in text
    assert all("#" in line for line in text.splitlines() if line.startswith(("memory_gb", "element_wise", "products")))
    for rates in found.rates.values():
        assert rates.products >= rates.attention
    for ranks in range(2, found.devices + 1):
        assert found.link(range(ranks), "all_to_all").bandwidth > 0


def test_nodes_are_joined_by_a_network() -> None:
    two = machine("2x8xl40-pcie+ethernet-100g")
    assert (two.world_size, two.nodes) == (16, 2)
    assert two.link([0, 8], "ring").shared and not two.link([0, 7], "ring").shared
    assert two.link([0, 1], "all_to_all").bandwidth > two.link([0, 3], "all_to_all").bandwidth
    assert machine("8xl40-pcie", 16).nodes == 2 and machine("h100", 4).world_size == 4
    assert set(networks()) >= {"ethernet-100g", "infiniband-400g"}


@pytest.mark.parametrize(("change", "complaint"), [
    (("devices = 2", ""), "lacks devices"),
    (("devices = 2", "devices = 0"), "devices is a whole number of at least 1, got 0"),
    (("memory_gb = 8", "memory_gb = -1"), "memory_gb is a number above 0, got -1"),
    (("memory_gb = 8", "memory_gb = 'much'"), "memory_gb is a number above 0, got 'much'"),
    (("launch_us = 5", "launch_us = nan"), "launch_us is a number of at least 0, got nan"),
    (("launch_us = 5", "launch_us = 5\\nfans = 3"), "has fans, which means nothing there"),
    (("[rates.float32]", "[rates.int3]"), "[rates] has int3; dtypes are"),
    (("[[links]]", "[[link]]"), "lacks links"),
    (("gb_per_s = 1.0", "gb_per_s = 1.0\\npattern = 'gossip'"), "pattern is one of any"),
    (("[device]", "[device"), "is no TOML"),
])
def test_a_wrong_file_is_refused_with_the_place(change: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace(change[0], change[1].replace("\\n", "\n")))
    with pytest.raises(SpecError) as error:
        read(path)
    assert complaint in str(error.value) and "mine.toml" in str(error.value)


@pytest.mark.parametrize(("text", "complaint"), [
    ("8xunknown", "there is no machine '8xunknown'"), ("2x8xh100+carrier-pigeon", "there is no network"),
    ("absent.toml", "cannot be read"), ("", "there is no machine"),
])
def test_a_machine_that_is_not_there_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint.replace("+", r"\+")):
        machine(text)


def test_a_machine_is_written_as_it_is_read(tmp_path: Path) -> None:
    found = machine("2x8xa100-pcie+ethernet-100g")
    write(found, tmp_path / "deep" / "a.toml")
    again = read(tmp_path / "deep" / "a.toml")
    assert written(again).splitlines()[1:] == written(found).splitlines()[1:] and again.world_size == 16
    for one, other in zip(again.links, found.links, strict=True):
        assert (one.devices, one.ranks, one.pattern, one.shared) == (
            other.devices, other.ranks, other.pattern, other.shared)
        assert math.isclose(one.bandwidth, other.bandwidth, rel_tol=1e-3)
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "a.toml"]


def test_a_machine_is_measured_alike_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    made = pool.run(planner_runs.measured, timeout=240)
    (toml, seconds), ranks = made[0], len(made)
    (tmp_path / "here.toml").write_text(toml)
    found = read(tmp_path / "here.toml")
    assert {other for other, _ in made} == {toml} and found.world_size == ranks
    product = 2 * 512**3 / found.rates["float32"].products + 4 * 512**2 / found.packing
    assert 1 / 40 < product / seconds < 40, "a busy machine is slower at times"
    assert found.moved > 1e8 and found.functions > 1e7 and 0 <= found.launch < 1e-2
    for pattern in ("all_to_all", "ring"):
        link = found.link(range(ranks), pattern)
        assert 0 < link.latency < 1 and link.bandwidth > 1e6


# Counts


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=2", "ulysses=2,ring=2", "tensor=2", "tensor=2,ulysses=2", "cfg=2"])
@pytest.mark.parametrize("name", ["flux"])
def test_what_is_counted_without_programs_is_what_programs_do(name: str, spec: str) -> None:
    found, parsed = counter(name, 2), ShardingSpec.parse(spec)
    work = found.exact(parsed)
    whole, seeds = plan(found.captured, parsed)
    costs = costs_of(localize(whole, seeds, 0))
    assert isinstance(work, Work)
    # Of equal nodes a program has one; the busiest rank may be another.
    assert work.flops == pytest.approx(costs.flops, rel=0.01)
    assert work.sent == pytest.approx(costs.sent, rel=0.05)
    assert sum(x.count for x in work.exchanges if x.nbytes) == pytest.approx(
        sum(c.times for c in costs.collectives if c.size), rel=0.1)
    assert found.exact(parsed) == WorkCounter(found.captured).exact(parsed), "what is remembered changes nothing"


@pytest.mark.parametrize(("name", "spec"), [
    *((name, f"pipefusion=2,ulysses=2,{rest}") for name in ("flux", "hunyuan_dit")
      for rest in ("patches=1", "tensor=2,patches=2")),
    *((name, f"pipefusion=2,patches={n}") for name, n in (("flux", 4), ("sana", 7), ("hunyuan_dit", 5)))])
def test_what_is_counted_of_stages_is_what_their_programs_do(name: str, spec: str) -> None:
    pipeline = plan_pipeline(counter(name).captured, ShardingSpec.parse(spec))
    for stage, (once, units) in enumerate(stage_costs(pipeline)):
        local = localize_stage(pipeline, stage * ShardingSpec.parse(spec).ranks_per_stage)
        for cost, program in [(once, local.once), *((c, local.units[unit]) for unit, c in units.items())]:
            wanted, sent = costs_of(program), sum(n for (what, *_), n in cost.traffic.items() if what == "bytes")
            assert (cost.flops, sent) == (wanted.flops, wanted.sent)


def test_of_each_stage_the_rank_with_most_to_do_is_counted() -> None:
    """Four heads of three ranks: the first has two of them."""
    for patches in (1, 2):
        staged = counter("flux").exact(ShardingSpec(pipefusion_degree=2, ulysses_degree=3, num_patches=patches))
        assert isinstance(staged, Staged)
        first, second = ({unit: work.attention for unit, work in units.items()} for units in staged.units)
        assert first == second


def test_nothing_is_sent_that_every_rank_has() -> None:
    """Joined tokens that were cut as one, and the same cut as text and image, are laid out alike."""
    for spec in ("tensor=2,ulysses=2", "tensor=2,ring=2"):
        work = counter("flux").exact(ShardingSpec.parse(spec))
        assert isinstance(work, Work) and all(x.nbytes for x in work.exchanges)
    joined, apart = Dim.of([Segment((0, 6, 12), SEQUENCE)]), Dim.of(
        [Segment((0, 4, 4), SEQUENCE), Segment((0, 2, 8), SEQUENCE)])
    program = replace(counter("flux").captured, spec=ShardingSpec(ulysses_degree=2))
    sizes = {SEQUENCE: 2, TENSOR: 1}
    interpreter = FunctionInterpreter(ProgramInterpreter(program, {}, {SEQUENCE: 0}, sizes), None, "main")
    laid = interpreter.lay(Value(None, Layout((joined,)), torch.float32), 0, apart)
    assert laid.dims == (apart,) and not interpreter.cost.traffic
    other = Dim.of([Segment((0, 5, 12), SEQUENCE)])
    assert interpreter.lay(laid, 0, other).dims == (other,) and interpreter.cost.traffic


def test_functions_that_take_a_processor_long_are_counted_by_their_values() -> None:
    found, spec = counter("dit"), ShardingSpec()
    work = found.exact(spec)
    assert isinstance(work, Work) and 0 < work.functions < work.moved
    slow = simple(functions=1e3)
    assert loop_seconds(work, found.whole, spec, slow, Loop(1)).total == pytest.approx(work.functions / 1e3, rel=1e-3)


def test_weights_are_packed_for_each_product_however_few_rows_it_has() -> None:
    case, packed = zoo.CASES["dit"], 0

    def count(module: torch.nn.Module, *_: object) -> None:
        nonlocal packed
        packed += module.weight.nbytes  # type: ignore[operator]

    model = made(case)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(count)
    model(**case.inputs(1, False))
    found, slow = counter("dit"), simple(packing=1e3)
    assert packed == found.whole.work.packed
    for text, share in (("ulysses=1", 1.0), ("ulysses=4", 1.0), ("tensor=4", 0.25)):
        spec = ShardingSpec.parse(text)
        seconds = loop_seconds(found.exact(spec), found.whole, spec, slow, Loop(3)).total
        assert seconds == pytest.approx(3 * share * packed / 1e3, rel=1e-3), text
    for work in (counter("flux").exact(ShardingSpec(pipefusion_degree=2, num_patches=4)),
                 counter("flux").quick(ShardingSpec(pipefusion_degree=2, num_patches=4))):
        assert isinstance(work, Staged)
        assert all(unit.packed == stage[WHOLE].packed for stage in work.units for unit in stage.values())
    staged = counter("flux").exact(ShardingSpec(pipefusion_degree=2, num_patches=4))
    assert isinstance(staged, Staged)
    assert sum(stage[WHOLE].packed for stage in staged.units) == pytest.approx(counter("flux").whole.work.packed)


def test_an_estimate_is_close_to_the_count() -> None:
    found = counter("flux")
    for spec in ("ulysses=2,ring=2", "ring=2,tensor=2", "pipefusion=2,patches=2", "pipefusion=2,patches=4"):
        parsed, here = ShardingSpec.parse(spec), simple(bandwidth=1e8)
        exact, quick = (loop_seconds(count(parsed), found.whole, parsed, here, Loop(8)).total
                        for count in (found.exact, found.quick))
        assert quick == pytest.approx(exact, rel=0.35), spec


# Seconds


def test_seconds_of_a_forward_are_operations_over_rates_and_bytes_over_links() -> None:
    found = counter("dit")
    spec = ShardingSpec(ulysses_degree=4)
    work = found.exact(spec)
    assert isinstance(work, Work)
    seconds = loop_seconds(work, found.whole, spec, simple(), Loop(5))
    assert seconds.products + seconds.attention == pytest.approx(5 * work.flops / 1e12)
    assert sum(seconds.links.values()) == pytest.approx(5 * work.sent / 1e9)
    slow = loop_seconds(work, found.whole, spec, simple(latency=1.0), Loop(5))
    assert slow.total - seconds.total == pytest.approx(5 * sum(x.count for x in work.exchanges), rel=1e-3)


def test_a_host_that_is_slower_than_its_device_decides() -> None:
    found, spec = counter("dit"), ShardingSpec()
    work = found.exact(spec)
    assert isinstance(work, Work)
    for asynchronous in (True, False):
        here = simple(launch=1.0, asynchronous=asynchronous)
        total = loop_seconds(work, found.whole, spec, here, Loop(1)).total
        assert total == pytest.approx(work.launches, rel=1e-6)


def test_a_ring_hides_behind_attention_what_ulysses_does_not() -> None:
    found, here = counter("dit"), simple(bandwidth=1e10, overlap=0.9, rates={"float32": Rates(1e12, 1e6)})
    ring, ulysses = (sum(loop_seconds(found.exact(s), found.whole, s, here, Loop(1)).links.values()) / max(
        sum(x.nbytes for x in found.exact(s).exchanges), 1) for s in (  # type: ignore[union-attr]
            ShardingSpec(ring_degree=4), ShardingSpec(ulysses_degree=4)))
    assert ring < 0.5 * ulysses


def test_stages_take_the_time_of_their_schedule() -> None:
    found, spec = counter("flux"), ShardingSpec(pipefusion_degree=2, num_patches=4)
    work = found.exact(spec)
    assert isinstance(work, Staged)
    many, few = (loop_seconds(work, found.whole, spec, simple(bandwidth=1e15), Loop(n)).total for n in (21, 11))
    alone = sum(w.flops for w in (*work.once, *(u for us in work.units for i, u in us.items() if i >= 0))) / 1e12
    # Two stages that are always busy, and no more than that.
    assert alone / 2 <= (many - few) / 10 <= 1.4 * alone / 2


def test_one_adapter_for_a_node_is_shared_by_its_devices() -> None:
    found, spec = counter("dit"), ShardingSpec(ulysses_degree=4)
    apart, shared = (sum(loop_seconds(found.exact(spec), found.whole, spec, replace(
        simple(devices=2, nodes=2), links=(Link(0, 0, "any", 0.0, 1e9, how),)), Loop(1)).links.values())
        for how in (False, True))
    # Two ranks of a node send two thirds of what they send to the other node.
    assert shared == pytest.approx(apart * 4 / 3, rel=1e-6)


# Plans


def test_all_ways_to_share_eight_devices_are_candidates() -> None:
    found = {str(s) for s in candidates(ShardingSpec(), 8, Loop(calls=2), False)}
    assert {"ulysses=8", "ring=8", "tensor=8", "ulysses=4,cfg=2", "ulysses=2,ring=2,tensor=2",
            "pipefusion=8,patches=16", "ulysses=2,cfg=2,pipefusion=2,patches=2"} <= found
    assert all(ShardingSpec.parse(s).world_size == 8 for s in found)
    assert not any("ring" in s and "pipefusion" in s for s in found)
    assert {str(s) for s in candidates(ShardingSpec(), 6, Loop(), True)} >= {"ulysses=3,ring=2", "ulysses=2,ring=3"}


def test_slow_links_and_fast_links_have_other_plans() -> None:
    planner = planner_of("flux")
    fast = planner.plan(Question(simple(2, bandwidth=1e15), 2, Loop(20)))
    slow = planner.plan(Question(simple(2, bandwidth=1e6), 2, Loop(20)))
    assert fast.best.spec.pipefusion_degree == 1, "stages wait in exact steps"
    assert slow.best.spec.pipefusion_degree == 2, "it sends least"
    exact = planner.plan(Question(simple(2, bandwidth=1e6), 2, Loop(20), exact=True))
    assert not any(approximate(o.spec) for o in exact.options)
    assert any("approximate" in r.reason for r in exact.refused)


@pytest.mark.parametrize(("name", "world", "bandwidth"), [
    whole("flux", 4, 1e7), ("flux", 4, 1e11), ("sana", 4, 1e8), whole("sd3", 6, 1e9)])
def test_the_pick_is_that_of_counting_all(name: str, world: int, bandwidth: float) -> None:
    planner = planner_of(name, 2)
    here = simple(world, bandwidth=bandwidth, latency=2e-5, launch=3e-5, rates={"float32": Rates(1e11, 1e11)})
    question = Question(here, world, Loop(10, calls=1, batch=2))
    found, costs = planner.plan(question), {}
    assert [o.cost for o in found.options] == sorted(o.cost for o in found.options)
    for spec in candidates(ShardingSpec(), world, question.loop, False):
        with contextlib.suppress(SpecError):
            costs[spec] = planner.option(spec, question).cost
    assert len(costs) > 5 and found.best.cost == pytest.approx(min(costs.values()), rel=1e-9)


def test_memory_that_is_too_small_leads_to_shares_of_weights_or_to_a_refusal() -> None:
    planner = Planner(counter("dit").captured)
    whole = planner.counter.whole
    tight = planner.plan(Question(simple(2), 2, Loop(4), exact=True, memory=int(0.9 * whole.parameters)))
    assert all(o.memory <= 0.9 * whole.parameters for o in (*tight.options, *tight.estimated))
    assert all(o.spec.parts or o.spec.pipefusion_degree > 1 for o in (*tight.options, *tight.estimated))
    with pytest.raises(SpecError, match=r"does not fit: a rank takes .*, a device has 1\.00 kB"):
        planner.plan(Question(simple(2), 2, Loop(4), memory=1000))


def test_encoders_are_shared_out_before_weights_that_each_step_needs() -> None:
    planner = Planner(counter("dit").captured)
    weights = planner.counter.whole.parameters
    encoders = (EncoderBytes(4 * weights, 4 * weights, 0, 6, 2), EncoderBytes(weights, weights, 0, 1, 1))
    beside = Beside(encoders=encoders, others=weights)
    question = Question(simple(2), 2, Loop(4), exact=True, beside=beside)
    many = planner.plan(question)
    few = planner.plan(replace(question, memory=int(many.best.memory - weights)))
    assert many.best.spec.encoders == "everywhere" and "exchanges (encoders)" not in many.best.seconds.parts()
    assert replace(few.best.spec, encoders="everywhere") == many.best.spec and few.best.spec.encoders == "shard"
    # A rank is sent half of them, of the one in each of two calls.
    assert few.best.seconds.total - many.best.seconds.total == pytest.approx(4.5 * weights / 1e9, rel=1e-6)
    less, more = (planner.quick(replace(few.best.spec, encoders=e), question).memory for e in ("shard", "everywhere"))
    assert less == pytest.approx(more - 2.5 * weights)
    with pytest.raises(SpecError, match=r"a rank takes .*, .* of it other components of the pipeline, a device has"):
        planner.plan(replace(question, memory=int(1.9 * weights)))
    said = planner.plan(replace(question, base=ShardingSpec(encoders="spread")))
    assert said.best.memory == pytest.approx(many.best.memory - weights)
    with pytest.raises(SpecError, match="of it other components"):
        planner.plan(replace(question, beside=beside.uncut(), memory=int(6 * weights)))


@functools.cache
def large_values(batch: int) -> Program:
    """A model whose values take more than its weights."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=4,
                                      sample_size=64, num_embeds_ada_norm=10).eval()
    return xdit_compile.capture(model, {
        "hidden_states": torch.empty(batch, 4, 64, 64, device="meta"), "timestep": torch.zeros(batch),
        "class_labels": torch.ones(batch, dtype=torch.long)})


@pytest.mark.parametrize(("spec", "batch", "turn"), [
    ("ulysses=2", 1, "ulysses=2"), ("cfg=2", 1, ""), ("cfg=2", 2, "cfg=2"), ("cfg=2,ulysses=2", 1, "ulysses=2"),
    ("cfg=2,data=2", 1, ""), ("cfg=4", 1, ""), ("cfg=2,data=2,ulysses=2", 2, "ulysses=2")])
def test_memory_is_not_estimated_too_low(spec: str, batch: int, turn: str) -> None:
    """Also of groups that take turns, each of which makes whole calls."""
    planner, parsed = Planner(large_values(batch)), ShardingSpec.parse(spec)
    question = Question(simple(parsed.world_size), parsed.world_size, Loop(4, calls=2, batch=batch), "throughput")
    found = planner.quick(parsed, question).memory
    counted = counted_memory(planner.program, ShardingSpec.parse(turn), ())
    assert counted / MARGIN < found < counted * ROOM


@pytest.mark.parametrize(("calls", "encoder"), [(1, 0.0), (2, 0.0), (1, 1.0), (2, 2.0)])
def test_more_memory_is_never_worse(calls: int, encoder: float) -> None:
    """From a size on there is a plan, and none that is slower than for a smaller one; all that are proposed fit."""
    planner = Planner(large_values(1))
    nbytes = int(encoder * planner.counter.whole.activations)
    beside = Beside(encoders=(EncoderBytes(nbytes, nbytes, nbytes // 8, 3, 1),) if nbytes else ())
    question = Question(simple(4, bandwidth=1e8), 4, Loop(4, calls=calls), exact=True, beside=beside)
    most, costs = planner.plan(question).best.memory, []
    for share in range(2, 15):
        limit = int(most * share / 12)
        with contextlib.suppress(SpecError):
            best = planner.plan(replace(question, memory=limit)).best
            assert best.memory <= limit
            costs.append((share, best.cost))
    assert [share for share, _ in costs] == [*range(costs[0][0], 15)] and costs[0][0] < 10
    assert all(b <= a * 1.001 for (_, a), (_, b) in pairwise(costs))


@pytest.mark.parametrize(("spec", "held"), [
    ("ulysses=4", 7 + 5 + 32), ("ulysses=4,encoders=spread", 7 + 5 + 20), ("tensor=2,ulysses=2", 3.5 + 5 + 32),
    ("pipefusion=4,encoders=spread", 1.75 + 5 + 20), ("ulysses=4,shard=4", 1.75 + 7 * COMING + 5 + 32),
    ("ulysses=4,offload=block", 7 * COMING + 5 + 32), ("ulysses=4,encoders=shard", 7 + 5 + 4 + 16 / 4 + 12)])
def test_what_a_pipeline_keeps_beside_the_model(spec: str, held: float) -> None:
    """An encoder is shared out but for what cannot be, one not at all: it is never called by itself."""
    encoders = (EncoderBytes(20, 16, 3, 1, 1), EncoderBytes(10), EncoderBytes(1), EncoderBytes(1))
    beside = Beside(denoisers=7, encoders=encoders, others=5)
    assert beside_held(beside, parsed := ShardingSpec.parse(spec)) == pytest.approx(held)
    assert beside_coming(beside, parsed) == (3 if "encoders=shard" in spec else 0)


def test_ranks_that_plan_alike_choose_alike() -> None:
    captured = counter("flux", 2).captured
    found = [Planner(captured).plan(Question(simple(), 4, Loop(8, batch=2))) for _ in range(2)]
    assert found[0].to_dict() | {"planning_seconds": 0} == found[1].to_dict() | {"planning_seconds": 0}


QUICK = ["dit", "sana"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.whole) for n in zoo.CASES])
def test_no_plan_proposes_what_parallelize_refuses(name: str, request: pytest.FixtureRequest) -> None:
    """Some numbers of devices for each model, all from 2 to 16 over the whole zoo; one sample or two, for models in
    one of their modes both."""
    case = zoo.CASES[name]
    whole = request.config.getoption("--whole")
    place = list(zoo.CASES).index(name)
    for batch in (1, 2) if name in zoo.BASIC else (1 + place % 2,):
        model, inputs = made(case), case.inputs(batch, batch == 2)
        planner = Planner(xdit_compile.capture(model, inputs))
        for world in range(2 + (place + batch) % 5, 17, 5) if whole else (2, 6):
            here = simple(world, bandwidth=10.0 ** (6 + place % 5), latency=2e-5, launch=5e-6)
            question = Question(here, world, Loop(4, batch=batch), exact=world % 2 == 1)
            try:
                found = planner.plan(question)
            except SpecError as error:
                assert "no spec for" in str(error)
                continue
            for option in found.options:
                # Raises what parallelize would at the first call.
                xdit_compile.explain(model, option.spec, inputs, rank=world - 1)


# What people see


def test_a_plan_says_why(tmp_path: Path) -> None:
    found = Planner(counter("flux").captured, model="Mine").plan(Question(simple(bandwidth=1e7), 4, Loop(10)))
    text = "\n".join(found.reasons())
    assert f"Best: {found.best.spec}." in text and "Next: " in text
    assert "With links of 4 times the bandwidth it would take" in text
    assert "Guidance first, then Ulysses (ulysses=4): takes" in text and "more of exchanges (ulysses)" in text
    assert found.line().startswith(f"auto: {found.best.spec} for Mine on simple: ") and "\n" not in found.line()


MODEL = '''
import torch
from diffusers import DiTTransformer2DModel
def example():
    with torch.device("meta"):
        model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=4,
                                      sample_size=16, num_embeds_ada_norm=10).eval()
    return model, dict(hidden_states=torch.empty(2, 4, 16, 16, device="meta"), timestep=torch.tensor([1, 1]),
                       class_labels=torch.tensor([1, 2]))
'''


def test_plan_as_json_and_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "two.toml").write_text(TOML)
    arguments = ["plan", f"{tmp_path}/model.py:example", "--machine", f"{tmp_path}/two.toml", "--steps", "5"]
    assert main([*arguments, "--json", "--plot", f"{tmp_path}/plan.svg"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"][0]["checked"] and report["steps"] == 5 and report["world_size"] == 2
    svg = (tmp_path / "plan.svg").read_text()
    assert "best mix" in svg and "ulysses" in svg and "devices" in svg
    assert main([*arguments, "--exact"]) == 0
    assert "Best: " in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--machine", "8xnothing"], "there is no machine"), (["--machine", "two.toml", "--world", "0"], "--world is a"),
    (["--machine", "h100", "--device-memory", "much"], "cannot read 'much' as a size"),
])
def test_a_user_s_mistake_is_one_line(arguments: list[str], complaint: str, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "two.toml").write_text(TOML)
    assert main(["plan", "model.py:example", *arguments]) == 2
    said = capsys.readouterr().err
    assert complaint in said and "Traceback" not in said


# auto


def test_words_of_auto() -> None:
    found = Auto.parse("auto,goal=throughput,exact=no,device_memory=24GB,backend=inductor,vae=2,machine=8xh100")
    assert found == Auto("throughput", False, 24 * 10**9, "8xh100", vae=2, base=ShardingSpec(backend="inductor"))
    assert Auto.parse("auto") == Auto() and Auto().exact, "nothing is approximated that nobody asked for"
    assert Auto.parse("ulysses=2") is None and Auto.parse({"ulysses": 2}) is None


@pytest.mark.parametrize(("text", "complaint"), [
    ("auto,ulysses=2", "ulysses is for auto to choose"), ("auto,exact=maybe", "exact is yes or no"),
    ("auto,goal=fun", "goal is latency or throughput"), ("auto,colour=red", "unknown word 'colour'"),
    ("auto,exact=yes,exact=no", "exact is given twice"), ("auto,world=none", "world is a whole number"),
])
def test_words_that_auto_does_not_know_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        Auto.parse(text)


def test_auto_chooses_alike_on_all_ranks_and_gives_the_plain_numbers(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(TOML)
    for name, spec in (("dit", f"auto,machine={tmp_path}/two.toml"),
                       ("flux", f"auto,exact=yes,machine={tmp_path}/two.toml")):
        found = pool.run(planner_runs.chosen, name, spec, ranks=range(2), timeout=240)
        assert found[0]["spec"] == found[1]["spec"] and max(f["error"] for f in found) <= 1e-5
        assert ShardingSpec.parse(found[0]["spec"]).world_size == 2


def test_auto_looks_at_a_pipeline_s_first_call(pool: Pool, tmp_path: Path) -> None:
    import pipelines

    (tmp_path / "two.toml").write_text(TOML)
    pipelines.folder("dit", tmp_path)
    found = pool.run(planner_runs.pipeline, "dit", str(tmp_path), f"auto,machine={tmp_path}/two.toml", ranks=range(2),
                     timeout=240)
    assert found[0] == found[1] | {"error": found[0]["error"]}
    assert found[0]["kind"] == "DiTPipeline" and max(f["error"] for f in found) <= 1e-4


def test_what_stands_in_the_way_of_auto_is_told_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(TOML)
    for spec, complaint in (("auto,machine=absent.toml", "cannot be read"),
                            (f"auto,device_memory=1kB,machine={tmp_path}/two.toml", "does not fit")):
        for said in pool.run(planner_runs.refused, spec, ranks=range(2), timeout=120):
            assert said.startswith("SpecError") and complaint in said
