"""Starting ranks on this machine: results, and every way in which a rank can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RemoteError

from xdit_compile.errors import LaunchError, RankFailure
from xdit_compile.runtime.launch import init_from_env, launch


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
