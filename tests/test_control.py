"""The control plane, on real processes: agreeing, and failing together in every way a rank can fail."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import calls
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from marks import whole
from pool import Pool, RemoteError
from torch.distributed import PrefixStore

from xdit_compile.api import parallelize
from xdit_compile.errors import RankFailure, RankMismatch
from xdit_compile.runtime.control.abort import Connections, _between, _packed, abort
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.heartbeat import BEAT
from xdit_compile.runtime.control.secret import VARIABLE
from xdit_compile.runtime.control.tensor_digest import digest, digests
from xdit_compile.runtime.launch import launch


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Workers of its own: what fails here on purpose must not reach other tests."""
    workers = Pool(world=4)
    yield workers
    workers.close()

RANKS = (0, 1, 2, 3)
TIMEOUT = 2.0
# A wake-up takes milliseconds, or 2 s where silence has to tell; the rest is for a busy machine. The timeout
# of the data groups themselves, which would end every wait too, is half an hour.
SLACK = 8.0


def exchange(group: dist.ProcessGroup) -> None:
    """A collective as captured programs run it; blocks until all ranks call it."""
    ones = [1] * group.size()
    funcol.wait_tensor(funcol.all_to_all_single(torch.arange(float(group.size())), ones, ones, group))


def test_digest_sees_every_difference() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64, torch.uint8):
        one = torch.arange(24).to(dtype).view(2, 3, 4)
        swapped = one.clone()
        swapped[0, 0, 1], swapped[1, 2, 3] = one[1, 2, 3], one[0, 0, 1]
        assert digest(one) == digest(one.clone())
        assert digest(one) == digest(one.transpose(0, 2).contiguous().transpose(0, 2))
        assert digest(one) != digest(swapped)
        for bit in range(8 * one.element_size()):
            flipped = one.clone()
            flipped.view(torch.uint8)[1, 1, bit // 8] ^= 1 << bit % 8
            assert digest(one) != digest(flipped)
    assert digest(torch.zeros(2, 3)).startswith("float32[2,3] ")
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))
    assert digest(torch.zeros(6)) != digest(torch.zeros(6, dtype=torch.int32))


def test_digest_of_odd_tensors() -> None:
    odd = {
        "nan": torch.tensor([float("nan"), 1.0]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "conj": torch.tensor([1 + 2j]).conj(),
        "expanded": torch.ones(1, 3).expand(2, 3),
        "float8": torch.ones(5).to(torch.float8_e4m3fn),
        "grad": torch.ones(2, requires_grad=True),
        "unaligned": torch.ones(9, dtype=torch.uint8)[1:],
    }
    assert digests(odd) == digests({name: tensor.detach().clone() for name, tensor in odd.items()})
    assert len({text.split()[1] for text in digests(odd).values()}) >= len(odd) - 1
    assert digest(torch.tensor([1 + 2j]).conj()) == digest(torch.tensor([1 - 2j]))


def test_device_sum_sees_every_difference() -> None:
    from xdit_compile.runtime.control.tensor_digest import _sum, _words

    for base in (torch.randn(64), torch.randn(64).double(), torch.randn(64).bfloat16()):
        words = _words(base)
        plain = int(_sum(words))
        for bit in range(8 * words.element_size()):
            flipped = words.clone()
            flipped.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            assert int(_sum(flipped)) != plain
        opposite = base.clone()
        opposite[5], opposite[6] = -base[5], -base[6]
        assert int(_sum(_words(opposite))) != plain
        assert int(_sum(_words(base.flip(0)))) != plain
    assert int(_sum(_words(torch.empty(0)))) == 0


def single() -> None:
    control = ControlPlane([dist.get_rank()])
    control.agree("forward", {"x": str(dist.get_rank())})
    with control.guard("forward"):
        pass
    control.close()


def test_a_group_of_one_needs_nothing(pool: Pool) -> None:
    single_rank = ControlPlane([0])
    single_rank.agree("forward", {"x": "1"})
    with pytest.raises(ValueError, match="own"), single_rank.guard("forward"):
        raise ValueError("own")
    pool.run(single)


def mismatches() -> tuple[list[str], int]:
    rank = dist.get_rank()
    everyone, some = ControlPlane(RANKS, TIMEOUT), ControlPlane((0, 2), TIMEOUT) if rank in (0, 2) else None
    said = []
    everyone.agree("forward", {"x": "same", "y": "same"})
    for mine in ({"x": f"value{rank == 1}", "y": "same"}, {"x": "same", **({"z": "1"} if rank == 2 else {})}):
        try:
            everyone.agree("forward", mine)
        except RankMismatch as error:
            said.append(str(error))
    # Nothing is broken by a mismatch.
    everyone.agree("forward", {"x": "same"})
    if some:
        some.agree("forward", {"x": "long" * 1000})
        some.close()
    everyone.close()
    return said, sum(thread.name == "xdit-heartbeat" for thread in threading.enumerate())


def test_mismatch_names_keys_and_ranks_on_every_rank(pool: Pool) -> None:
    answers = pool.run(mismatches)
    for (values, keys), threads in answers:
        assert "ranks do not agree on forward" in values
        assert "x: ranks 0,2,3 have valueFalse; ranks 1 have valueTrue" in values
        assert "y" not in values.splitlines()[1]
        assert "z: ranks 0,1,3 do not have it; ranks 2 have 1" in keys
        assert threads == 0


def overhead() -> tuple[float, float]:
    control = ControlPlane((0, 1), TIMEOUT)

    def guarded() -> None:
        with control.guard("forward", (dist.group.WORLD,)):
            pass

    def best(call: object) -> float:
        times = []
        for _ in range(300):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return sorted(times)[30]

    mine = {"hidden_states": "float32[1,15,8] 0123456789abcdef", "timestep": "float32[1] 0123456789abcdef"}
    seconds = best(lambda: control.agree("forward", mine)), best(guarded)
    control.close()
    return seconds


def test_a_call_costs_little(pool: Pool) -> None:
    agree, guard = pool.run(overhead, ranks=(0, 1))[0]
    assert agree < 2e-3 and guard < 2e-4, (agree, guard)


def failing(how: str) -> tuple[float, RankFailure, str, RankFailure]:
    """Rank 1 fails as `how` says; what the others see: after how long, which error, from what, and again."""
    control = ControlPlane(RANKS, TIMEOUT)
    group = dist.new_group()
    with control.guard("warm-up", (group,)):
        exchange(group)
    rank = dist.get_rank()
    start = time.monotonic()
    if how == "absent" and rank == 1:
        time.sleep(TIMEOUT + 2)
    elif how == "left" and rank == 1:
        control.close()
        time.sleep(1)
    try:
        if how != "left" or rank != 1:
            control.agree("forward", {"x": "1"})
        with control.guard("forward", (group,)):
            if rank == 1:
                time.sleep(0.5)
                if how == "raises":
                    raise ValueError("bad weather")
                if how == "exits":
                    raise SystemExit(3)
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
            exchange(group)
    except BaseException as error:
        first, seconds = error, time.monotonic() - start
    try:
        control.agree("again", {})
    except Exception as error:
        again = error
    control.close()
    return seconds, first, type(first.__cause__).__name__, again


def observed(how: str, folder: str) -> None:
    """`failing`, leaving what this rank saw in a file: the pool reports only that rank 1 is lost."""
    Path(folder, f"pid{dist.get_rank()}").write_text(str(os.getpid()))
    seconds, first, cause, again = failing(how)
    text = f"{seconds:.2f}|{type(first).__name__}|{getattr(first, 'rank', '')}|{first}|{cause}|{again}"
    Path(folder, str(dist.get_rank())).write_text(text)
    if how == "stops" and all(Path(folder, name).exists() for name in "023"):
        os.kill(int(Path(folder, "pid1").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "own", "reason"),
    [
        ("raises", "ValueError", "rank 1 failed: ValueError: bad weather"),
        ("exits", "SystemExit", "rank 1 failed: SystemExit: 3"),
        ("absent", "RankFailure", "rank 1 did not come to forward; no answer for 2.0 s"),
        ("left", "XditError", "rank 1 left (process ended, or Control closed) before forward"),
    ],
)
def test_peers_of_a_failed_rank_wake_and_name_it(pool: Pool, how: str, own: str, reason: str) -> None:
    answers = pool.run(failing, how)
    assert type(answers[1][1]).__name__ == own
    for rank in (0, 2, 3):
        seconds, first, cause, again = answers[rank]
        assert isinstance(first, RankFailure) and first.rank == 1
        assert str(first).startswith(reason) and cause == "RuntimeError"
        assert seconds < (TIMEOUT + SLACK if how == "absent" else SLACK)
        assert isinstance(again, RankFailure) and str(again) == str(first)


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_peers_of_a_lost_process_wake_and_name_it(pool: Pool, how: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"the worker died \(exit code -9\)"):
        pool.run(observed, how, str(tmp_path), timeout=60)
    for rank in (0, 2, 3):
        seconds, kind, culprit, text, cause, _ = (tmp_path / str(rank)).read_text().split("|")
        assert (kind, culprit, cause) == ("RankFailure", "1", "RuntimeError")
        assert text.startswith("rank 1 stopped responding (process gone?) during forward; no answer for ")
        assert float(seconds) < TIMEOUT + SLACK


def constructs_late() -> str:
    if dist.get_rank() == 1:
        time.sleep(2)
        return ""
    try:
        ControlPlane(RANKS, 1.0)
    except RankFailure as error:
        return str(error)
    return "constructed"


def test_a_rank_that_never_constructs_is_named(pool: Pool) -> None:
    for text in pool.run(constructs_late)[::2]:
        assert text.startswith("rank 1 did not construct its Control")


def with_store_on_rank_0(folder: str) -> None:
    """`observed` in a job whose rank 0 hosts the store, and dies."""
    rank = dist.get_rank()
    launcher = dist.distributed_c10d._get_default_store()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    if store:
        launcher.set("port", str(store.port))
    port = int(launcher.get("port"))
    dist.destroy_process_group()
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    mine = store or dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=mine, rank=rank, world_size=3)
    control = ControlPlane(range(3), TIMEOUT)
    group = dist.new_group()
    with control.guard("warm-up", (group,)):
        exchange(group)
    control.agree("forward", {})
    start = time.monotonic()
    try:
        with control.guard("forward", (group,)):
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            exchange(group)
    except RankFailure as error:
        Path(folder, str(rank)).write_text(f"{time.monotonic() - start:.2f}|{error}")


def test_the_host_of_the_store_dies(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 was killed by signal SIGKILL"):
        launch(with_store_on_rank_0, str(tmp_path), world_size=3, timeout=120)
    for rank in (1, 2):
        seconds, text = (tmp_path / str(rank)).read_text().split("|")
        assert text.startswith("rank 0 stopped responding (process gone?) during forward")
        assert float(seconds) < SLACK


def test_a_port_that_is_given_to_another_group_is_left_alone() -> None:
    """Aborting ends the connections a group had, not those that came to its address afterwards."""
    group = Connections.__new__(Connections)
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = socket.create_connection(server.getsockname()), server.accept()[0]
        group.nccl, group.gloo = [], _between([_packed(server.getsockname())])
        second = socket.create_connection(server.getsockname()), server.accept()[0]
        abort([group])
        assert first[0].recv(1) == first[1].recv(1) == b""
        second[0].sendall(b"alive")
        assert second[1].recv(5) == b"alive"
        for end in (*first, *second):
            end.close()


def attacked(secret_of_1: str) -> tuple[list[str], str]:
    """A stranger, who can write to the store, speaks for rank 1 and pronounces a verdict; then one is pronounced."""
    rank, before = dist.get_rank(), os.environ[VARIABLE]
    os.environ[VARIABLE] = secret_of_1 if rank == 1 else "ours"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            control = ControlPlane((0, 1), TIMEOUT)
            control.agree("before", {})
            if rank == 0:
                store = PrefixStore(control._heart._name, dist.distributed_c10d._get_default_store())
                store.set("verdict", json.dumps([0, "was ended by a stranger"]))
                store.set("beat1", json.dumps([10**6, 9, "nowhere", True, 0, -1, None, True]))
            time.sleep(3 * BEAT)
            control.agree("after", {})
            with control.guard("the end"):
                if rank == 1:
                    raise ValueError("bad weather")
                control.agree("more", {})
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    os.environ[VARIABLE] = before
    return [str(w.message) for w in caught], said


def test_strangers_are_not_heeded(pool: Pool) -> None:
    (warned, said), (_, own) = pool.run(attacked, "ours", ranks=(0, 1))
    assert said == "RankFailure: rank 1 failed: ValueError: bad weather" and own == "ValueError: bad weather"
    assert any("verdict is not signed with this rank's XDIT_COMPILE_SECRET" in text for text in warned), warned


def test_ranks_with_different_secrets_say_so(pool: Pool) -> None:
    said = [text for _, text in pool.run(attacked, "another", ranks=(0, 1))]
    assert any("beat1 is not signed with this rank's XDIT_COMPILE_SECRET" in text for text in said), said


def given_up(kinds: tuple[type[Exception], type[Exception]], waits: float) -> list[str]:
    """Ranks 0 and 1 raise in a body that fails together, rank 1 later; then all of it again."""
    control, rank, said = ControlPlane((0, 1), 5.0), dist.get_rank(), []
    for _ in range(2):
        try:
            control.agree("before", {})
            with control.guard("a request"):
                time.sleep(waits * rank)
                raise kinds[rank]("cancelled")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    control.close()
    return said


def test_what_all_ranks_raise_ends_nothing(pool: Pool) -> None:
    assert pool.run(given_up, (ValueError, ValueError), 1.5, ranks=(0, 1)) == [["ValueError: cancelled"] * 2] * 2


def test_ranks_that_raise_different_errors_fail(pool: Pool) -> None:
    for _, again in pool.run(given_up, (ValueError, KeyError), 0.0, ranks=(0, 1)):
        assert again.startswith("RankFailure: rank "), again


def controls_out_of_step() -> str:
    """Rank 1 is not there for the first Control, and both for the second."""
    if dist.get_rank() == 0:
        with pytest.raises(RankFailure, match="rank 1 did not construct"):
            ControlPlane((0, 1), 0.5)
        ControlPlane((0, 1), 20.0).agree("together", {})
        return "together"
    time.sleep(1.5)
    try:
        ControlPlane((0, 1), 20.0).agree("together", {})
    except RankFailure as error:  # it came late for the first one, which says so
        assert "rank 1 did not construct" in str(error)
        ControlPlane((0, 1), 20.0).agree("together", {})
    return "together"


def test_ranks_that_missed_a_control_are_in_step_again(pool: Pool) -> None:
    assert pool.run(controls_out_of_step, ranks=(0, 1)) == ["together"] * 2


def together_after(missing: int) -> str:
    """That rank does not come the first time, and nobody makes another Control before all of them come."""
    if dist.get_rank() != missing:
        with pytest.raises(RankFailure, match=f"rank {missing} did not construct its Control"):
            ControlPlane([0, 1], 1.0)
    dist.barrier(dist.new_group([0, 1], use_local_synchronization=True))
    ControlPlane([0, 1], 5.0).agree("after", {})
    return "together"


@pytest.mark.parametrize("missing", [0, 1])
def test_an_attempt_that_has_failed_is_not_joined_later(pool: Pool, missing: int) -> None:
    assert pool.run(together_after, missing, ranks=(0, 1)) == ["together"] * 2


def resources(cycles: int) -> list[tuple[int, int, int]]:
    """Threads, open files and process groups after each of so many times of making a model parallel, calling it and
    letting go of it."""
    torch.set_grad_enabled(False)
    found = []
    for _ in range(cycles):
        torch.manual_seed(0)
        model = calls.Tiny().eval()
        parallelize(model, "ulysses=2", timeout=20, ranks=[0, 1])(**calls.inputs())
        del model
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
        found.append((threading.active_count(), descriptors, len(dist.distributed_c10d._world.pg_map)))
    return found


@pytest.mark.parametrize("cycles", [8, whole(50)])
def test_nothing_is_left_of_models_that_are_let_go(pool: Pool, cycles: int) -> None:
    for found in pool.run(resources, cycles, ranks=(0, 1), timeout=600):
        early, late = found[cycles // 2], found[-1]
        assert all(after <= before for before, after in zip(early, late, strict=True)), found


def used_in_cache_contexts() -> int:
    """How many of three models that were called in ``cache_context`` are alive when nobody has them."""
    from diffusers import FluxTransformer2DModel

    def used() -> weakref.ref[torch.nn.Module]:
        torch.manual_seed(0)
        model = FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
                                       num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
                                       axes_dims_rope=(2, 2, 4)).eval()
        parallel = parallelize(model, "ulysses=2", timeout=20, ranks=[0, 1])
        with torch.no_grad(), parallel.cache_context("cond"):
            parallel(hidden_states=torch.ones(1, 12, 4), encoder_hidden_states=torch.ones(1, 3, 8),
                     pooled_projections=torch.ones(1, 8), timestep=torch.tensor([0.5]), img_ids=torch.zeros(12, 3),
                     txt_ids=torch.zeros(3, 3))
        return weakref.ref(model)

    models = [used() for _ in range(3)]
    gc.collect()
    return sum(model() is not None for model in models)


def test_models_that_were_called_in_a_cache_context_are_freed(pool: Pool) -> None:
    assert pool.run(used_in_cache_contexts, ranks=(0, 1)) == [0, 0]
