"""Starting ranks on this machine: results, and every way in which a rank can fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import calls
import psutil
import pytest
import torch
import torch.distributed as dist
from pool import Pool, RemoteError

from xdit_compile.api import parallelize
from xdit_compile.errors import LaunchError, RankFailure
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.launch import init_from_env, kill, launch


def everything(size: int, *, scale: float) -> dict[str, object]:
    device = init_from_env()  # the group exists already: this only tells the device
    total = torch.full((size,), scale * dist.get_rank())
    dist.all_reduce(total)
    try:
        launch(everything, 1, scale=1.0, world_size=2)
    except LaunchError as error:
        nested = str(error)
    return {
        "rank": int(os.environ["RANK"]),
        "local": int(os.environ["LOCAL_RANK"]),
        "world": dist.get_world_size(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "total": total,
        "nested": nested,
    }


def test_results_come_back_by_rank() -> None:
    size = 5_000_000
    answers = launch(everything, size, scale=2.0, world_size=3, device="cpu", threads=1)
    for rank, answer in enumerate(answers):
        total = answer.pop("total")
        assert torch.equal(total, torch.full((size,), 6.0))
        assert "already is one" in answer.pop("nested")
        assert answer == {"rank": rank, "local": rank, "world": 3, "device": "cpu", "threads": 1}


def one_raises() -> None:
    if dist.get_rank() == 1:
        time.sleep(0.5)
        raise ValueError("bad weather")
    if dist.get_rank() == 2:
        # Fails first, but only because of another rank.
        raise RankFailure(1, "failed: ValueError")
    dist.barrier()


def test_the_culprit_is_named_with_its_traceback() -> None:
    with pytest.raises(LaunchError) as caught:
        launch(one_raises, world_size=3, device="cpu")
    assert str(caught.value).startswith("rank 1 failed:\nTraceback")
    assert "in one_raises" in str(caught.value) and "ValueError: bad weather" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def one_is_killed() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def test_a_killed_rank_is_named_with_its_signal() -> None:
    with pytest.raises(LaunchError, match="rank 0 was killed by signal SIGSEGV"):
        launch(one_is_killed, world_size=2, device="cpu")


def one_hangs() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def test_the_time_limit_names_who_still_runs() -> None:
    with pytest.raises(LaunchError, match=r"ranks \[0\] had not ended after 2 s"):
        launch(one_hangs, world_size=1, device="cpu", timeout=2)


def test_what_cannot_be_sent_is_explained() -> None:
    def inner() -> None: ...

    for fn in (inner, lambda: None):
        with pytest.raises(LaunchError, match=r"cannot be sent to another process.*top level of a .py file"):
            launch(fn, world_size=2)
    with pytest.raises(LaunchError, match="arguments of everything cannot be pickled"):
        launch(everything, lambda: None, world_size=2)
    with pytest.raises(LaunchError, match="world_size must be at least 1"):
        launch(everything, world_size=0)


def python(code: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **keywords)  # type: ignore[call-overload, no-any-return]


def test_a_function_of_an_interactive_session_is_explained() -> None:
    ran = python("from xdit_compile.runtime.launch import launch\ndef f(): pass\nlaunch(f, world_size=2)")
    assert "it lives in __main__ of a notebook or an interactive session" in ran.stderr


def test_no_job_is_explained() -> None:
    with pytest.raises(LaunchError, match=r"torchrun.*launch\("):
        init_from_env()


INTERRUPTED = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
from test_launch import one_hangs
from xdit_compile.runtime.launch import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background
threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    launch(one_hangs, world_size=2, device="cpu")
except KeyboardInterrupt:
    import multiprocessing
    print("interrupted with", len(multiprocessing.active_children()), "children")
"""


def test_ctrl_c_ends_the_ranks() -> None:
    ran = python(INTERRUPTED.format(tests=os.path.dirname(__file__)), timeout=120)
    assert ran.stdout == "interrupted with 0 children\n", ran.stderr


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_launch import stops
from xdit_compile.runtime.launch import launch
launch(stops, {folder!r}, world_size=2, device="cpu")
"""


def stops(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped process does not learn of its parent's end")
def test_a_killed_launcher_leaves_no_ranks_and_no_files(tmp_path: Path) -> None:
    seen, temporary = tmp_path / "seen", tmp_path / "temporary"
    seen.mkdir()
    temporary.mkdir()
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(seen))
    launcher = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(temporary)})
    soon(lambda: len(list(seen.iterdir())) == 2, 90)
    soon(lambda: any(psutil.Process(int(f.name)).status() == psutil.STATUS_STOPPED for f in seen.iterdir()), 30)
    launcher.kill()
    launcher.wait()
    soon(lambda: not any(psutil.pid_exists(int(f.name)) and psutil.Process(int(f.name)).status() !=
                         psutil.STATUS_ZOMBIE for f in seen.iterdir()), 30)
    assert list(temporary.glob("xdit*")) == []


def soon(what: Callable[[], bool], seconds: float) -> None:
    """Wait until something is true; it must be so in time."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listening() -> list[str]:
    """The addresses that this process and its parent accept connections on, with groups of all kinds made."""
    torch.manual_seed(0)
    parallel = parallelize(calls.Tiny().eval(), "ulysses=2", timeout=60)
    with torch.no_grad():
        parallel(**calls.inputs())
    processes = psutil.Process(), psutil.Process().parent()
    return [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]


def test_all_that_listens_does_so_on_loopback() -> None:
    for addresses in launch(listening, world_size=2, device="cpu"):
        assert addresses and set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses


def by_hand(rank: int, size: int, port: int, folder: str) -> None:
    """A rank that no launcher started: rank 0 hosts the store. What it saw of ``init_from_env`` and after."""
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(variables)
    # Starting takes longer than some of the waits below.
    Path(folder, f"started{rank}").touch()
    soon(lambda: Path(folder, "started0").exists() and Path(folder, "started1").exists(), 90)
    start, said = time.monotonic(), "right"
    try:
        init_from_env("cpu", timeout=3.0 if size > 2 else 60.0)
        control = ControlPlane(range(size), timeout=4.0)
        control.agree("before", {})
        addresses = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
        said = f"listens {set(addresses) <= {'127.0.0.1'}}; "
        Path(folder, f"ready{rank}").touch()
        if rank == 0:
            soon(lambda: Path(folder, "ready1").exists(), 30)
            os.kill(os.getpid(), signal.SIGSTOP)
        start = time.monotonic()
        control.agree("after", {})
    except Exception as error:
        said = said.removeprefix("right") + f"{type(error).__name__}: {error}"
    draft = Path(folder, f"draft{rank}")
    draft.write_text(f"{time.monotonic() - start:.1f}|{said}")
    draft.rename(Path(folder, f"said{rank}"))  # whoever waits for it finds it whole


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match=r"rank 3 is to use cuda:3, but this process sees 2 GPUs"):
        init_from_env("cuda")


def started_by_hand(size: int, ranks: Sequence[int], folder: Path) -> list[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    made = [context.Process(target=by_hand, args=(rank, size, port, str(folder)), daemon=True) for rank in ranks]
    for process in made:
        process.start()
    return made


def test_a_stopped_host_of_the_store_is_named(tmp_path: Path) -> None:
    made = started_by_hand(2, (0, 1), tmp_path)
    try:
        soon(lambda: (tmp_path / "said1").exists(), 120)
    finally:
        kill(made)
    seconds, said = (tmp_path / "said1").read_text().split("|")
    assert said.startswith("listens True; RankFailure: rank 0 stopped responding"), said
    assert float(seconds) < 30


def test_a_rank_that_never_joins_is_named(tmp_path: Path) -> None:
    made = started_by_hand(3, (0, 1), tmp_path)
    try:
        soon(lambda: all((tmp_path / f"said{r}").exists() for r in (0, 1)), 120)
    finally:
        kill(made)
    for rank in (0, 1):
        assert "RankFailure: rank 2 did not join the job within 3 s" in (tmp_path / f"said{rank}").read_text()


def rank_and(value: int) -> tuple[int, int]:
    return dist.get_rank(), value


def test_pool_runs_on_chosen_ranks(pool: Pool) -> None:
    assert pool.run(rank_and, 5, ranks=(2, 0)) == [(2, 5), (0, 5)]
    assert pool.run(rank_and, value=6) == [(0, 6), (1, 6), (2, 6), (3, 6)]


def fails_alone() -> None:
    if dist.get_rank() == 1:
        raise KeyError("remote")


def test_pool_raises_what_failed_and_survives(pool: Pool) -> None:
    before = pool.run(os.getpid)
    with pytest.raises(RemoteError, match=r"on rank 1:[\s\S]*in fails_alone") as caught:
        pool.run(fails_alone)
    assert isinstance(caught.value.__cause__, KeyError)
    assert pool.run(os.getpid) == before
