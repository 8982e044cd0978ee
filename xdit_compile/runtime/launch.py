"""Starting the ranks of a job: `launch` on this machine, `init_from_env` under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from xdit_compile.errors import LaunchError, RankFailure
from xdit_compile.runtime.control.abort import is_peer_loss

# Seconds that the other ranks get to end by themselves once one rank has failed.
GRACE = 5.0


def launch(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int,
    device: str | None = None,
    threads: int = 1,
    timeout: float | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run ``fn(*args, **kwargs)`` in `world_size` processes of this machine; its results, by rank.

    Every process is one rank of an initialised default group: nccl on one GPU per rank where this machine
    has enough of them (or `device` is "cuda"), else gloo on CPU with `threads` threads each. Arguments and
    results travel through temporary files; tensors among the results come back on CPU.

    `timeout` limits the whole run, in seconds. Raises `LaunchError` when a rank fails (with its traceback,
    and the exception itself as ``__cause__`` where it can be pickled), is killed by a signal, when the time
    is over, when `fn` cannot be sent, or when this process is itself a rank.
    """
    if dist.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise LaunchError(
            "launch() starts ranks, but this process already is one: it has a process group, or RANK and "
            "WORLD_SIZE are set (torchrun, or another launch()). Call the function directly instead."
        )
    if world_size < 1:
        raise LaunchError(f"world_size must be at least 1, got {world_size}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= world_size else "cpu"
    payload = pack_call(fn, args, kwargs)
    # Hosted here, on whatever port is free: no race for a port, and it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="xdit-launch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "call").write_bytes(payload)
        ranks: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                env = rank_environment(rank, world_size, store.port)
                ranks.append(context.Process(target=_rank_main, args=(name, env, device, threads)))
                ranks[-1].start()
            overdue = _join(ranks, timeout)
        finally:
            kill(ranks)
        if failure := _culprit(ranks, folder, overdue, timeout):
            raise LaunchError(failure.text) from failure.error
        return [
            torch.load(folder / f"result{rank}", map_location="cpu", weights_only=False)
            for rank in range(world_size)
        ]


def init_from_env(device: str | None = None, timeout: float = 600.0) -> torch.device:
    """Join the job that torchrun (or `launch`) started this process for; the device of this rank.

    Initialises the default process group unless it exists: nccl for `device` "cuda" (the default where a GPU
    is there, chosen by LOCAL_RANK), gloo for "cpu". `timeout` is that group's, in seconds. Raises
    `LaunchError` when there is neither a group nor the variables to make one.
    """
    if not dist.is_initialized() and (missing := {"RANK", "WORLD_SIZE", "MASTER_ADDR"} - os.environ.keys()):
        raise LaunchError(
            f"this process is not part of a parallel job ({', '.join(sorted(missing))} not set). Either "
            "start the script with `torchrun --nproc-per-node N script.py`, or call "
            "xdit_compile.launch(fn, ..., world_size=N) from an ordinary process."
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = torch.device(kind)
    if local.type == "cuda":
        if local.index is None:
            local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "nccl" if local.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return local


def place_of(world_size: int, device: str | None) -> torch.device:
    """The device of this process, be it a rank of a job (which it joins) or, for a world of one, alone."""
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if world_size > 1:
        return init_from_env(device)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class Failure(NamedTuple):
    """What one failed rank left behind."""

    when: float
    consequence: bool  # it only suffered from another rank
    text: str
    error: BaseException | None = None


def pack_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """The call as bytes for a spawned process; raises `LaunchError` when that could not import `fn`."""
    name = getattr(fn, "__qualname__", repr(fn))
    script = getattr(sys.modules["__main__"], "__file__", None)
    if getattr(fn, "__module__", None) == "__main__" and not (script and os.path.exists(script)):
        why = "it lives in __main__ of a notebook or an interactive session"
    else:
        try:
            pickle.dumps(fn)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            why = str(error)
        else:
            try:
                return pickle.dumps((fn, args, dict(kwargs)))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise LaunchError(f"the arguments of {name} cannot be pickled: {error}") from error
    raise LaunchError(
        f"{name} cannot be sent to another process: {why}. Every rank imports the function by name: define "
        "it at the top level of a .py file and import it from there; no lambda, no function in a function."
    )


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The launcher variables of one rank whose rendezvous store the parent hosts at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torch's own way to say that the launcher, not rank 0, hosts the store.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def become_rank(env: Mapping[str, str], device: str, threads: int) -> None:
    """Make this freshly spawned process the rank that `env` describes, tied to the life of its parent."""
    os.environ.update(env)
    # Ctrl-C reaches the whole terminal group; the parent alone decides, without a traceback from every rank.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device == "cpu":
        torch.set_num_threads(threads)
    init_from_env(device)


def failure_of(error: BaseException) -> Failure:
    """How this rank reports `error`."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions of user code may break in any way here; the text still says it all
        sendable = None
    else:
        sendable = error
    text = "".join(traceback.format_exception(error))
    return Failure(time.time(), isinstance(error, RankFailure) or is_peer_loss(error), text, sendable)


def kill(processes: list[BaseProcess]) -> None:
    """End those that still run, without ceremony: they may be stuck in a collective."""
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _rank_main(folder: str, env: Mapping[str, str], device: str, threads: int) -> None:
    try:
        become_rank(env, device, threads)
        fn, args, kwargs = pickle.loads(Path(folder, "call").read_bytes())
        torch.save(fn(*args, **kwargs), Path(folder, f"result{env['RANK']}"))
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        Path(folder, f"failure{env['RANK']}").write_bytes(pickle.dumps(failure_of(error)))
        # The parent shows the traceback; the group is left alone, as destroying it may wait for dead peers.
        sys.exit(1)
    dist.destroy_process_group()


def _join(ranks: list[BaseProcess], timeout: float | None) -> list[int]:
    """Wait until all have ended, or one has failed and the grace is over; the ranks that still run."""
    overall = time.monotonic() + (timeout if timeout is not None else float("inf"))
    deadline = overall
    while running := [process for process in ranks if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        wait([process.sentinel for process in running], timeout=min(left, 3600))
        if deadline == overall and any(process.exitcode for process in ranks):
            deadline = min(overall, time.monotonic() + GRACE)
    return [rank for rank, process in enumerate(ranks) if process.exitcode is None]


def _culprit(
    ranks: list[BaseProcess], folder: Path, overdue: list[int], timeout: float | None
) -> Failure | None:
    """The failure to report: the first that is not the consequence of another one."""
    failures = []
    for rank, process in enumerate(ranks):
        report = folder / f"failure{rank}"
        if report.exists():
            found: Failure = pickle.loads(report.read_bytes())
            failures.append(found._replace(text=f"rank {rank} failed:\n{found.text}"))
        elif rank in overdue:
            continue
        elif process.exitcode and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            failures.append(Failure(0.0, False, f"rank {rank} was killed by signal {name}"))
        elif process.exitcode or not (folder / f"result{rank}").exists():
            text = f"rank {rank} ended with exit code {process.exitcode} and without a result; see its output"
            if process.exitcode == 1:
                text += ". A script that calls launch() must do so under `if __name__ == '__main__':`"
            failures.append(Failure(float("inf"), False, text))
    if failures:
        return min(failures, key=lambda failure: (failure.consequence, failure.when))
    if overdue:
        return Failure(0.0, False, f"ranks {overdue} had not ended after {timeout} s and were killed")
    return None
