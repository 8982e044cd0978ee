"""Starting the ranks of a job: `launch` on this machine, `init_from_env` under torchrun."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import pickle
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from xdit_compile.errors import LaunchError, RankFailure, XditError
from xdit_compile.progress import patience, progress, say
from xdit_compile.runtime.control.abort import is_peer_loss
from xdit_compile.runtime.control.secret import VARIABLE
from xdit_compile.runtime.control.store import LOOPBACK, attempt, listening_store, never_wait_long, stay_on_loopback
from xdit_compile.runtime.uncaught import told_once

# Seconds that the other ranks get to end by themselves once one rank has failed.
GRACE = 5.0

# What a rank is called, and how it ends when the script that it imports calls launch().
_NAME = "xdit-rank"
_UNGUARDED = 79

_PR_SET_PDEATHSIG = 1
# Of the jobs that this process starts, unless the user has one.
_secret = secrets.token_hex(16)


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
    results travel through files without a name; tensors among the results come back on CPU. All that
    listens does so on loopback only, and a secret of the job signs what ranks tell each other of themselves.

    `timeout` limits the whole run, in seconds. Raises `LaunchError` when a rank fails (with its traceback,
    and the exception itself as ``__cause__`` where it can be pickled), is killed by a signal, when the time
    is over, when `fn` cannot be sent, or when this process is itself a rank.
    """
    if already_a_rank():
        raise LaunchError(
            "launch() starts ranks, but this process already is one: it has a process group, or RANK and "
            "WORLD_SIZE are set (torchrun, or another launch()). Call the function directly instead."
        )
    if multiprocessing.current_process().name.startswith(_NAME):
        os._exit(_UNGUARDED)  # while it imports the script, before it is a rank; its parent says what is wrong
    if world_size < 1:
        raise LaunchError(f"world_size must be at least 1, got {world_size}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and there < world_size:
        raise LaunchError(f"device cuda was asked for, with a GPU for each of {world_size} ranks, but {_gpus(there)}")
    device = device or kind_for(world_size)
    payload = pack_call(fn, args, kwargs)
    # Hosted here, on whatever port is free: no race for a port, and it outlives every rank.
    store = listening_store()
    context = multiprocessing.get_context("spawn")
    with ExitStack() as files:
        call = files.enter_context(Nameless())
        call.write(payload)
        said = [Said(*(files.enter_context(Nameless()) for _ in Said._fields)) for _ in range(world_size)]
        ranks: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                env = rank_environment(rank, world_size, store.port)
                ranks.append(context.Process(target=_rank_main, args=(call, said[rank], env, device, threads),
                                             name=f"{_NAME}-{rank}"))
            with progress(f"starting {world_size} process{'es' if world_size > 1 else ''}"):
                for process in ranks:
                    process.start()
                _wait_for_start(ranks, said, timeout)
            overdue = _join(ranks, timeout)
        finally:
            kill(ranks)
        if failure := _culprit(ranks, said, overdue, timeout):
            raise LaunchError(failure.text) from failure.error
        return [torch.load(one.result.opened(), map_location="cpu", weights_only=False) for one in said]


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
    told_once()
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = torch.device(kind)
    if local.type == "cuda":
        if not torch.cuda.is_available() and not torch.cuda.device_count():
            raise LaunchError(f"device {kind} was asked for, but {_gpus(0)}")
        if local.index is None:
            local = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device()))
        if local.index >= (there := torch.cuda.device_count()):
            raise LaunchError(
                f"rank {os.environ.get('RANK', 0)} is to use {local}, but this process sees {there} GPUs. Start as "
                "many ranks as there are GPUs, or show each its own by CUDA_VISIBLE_DEVICES and set LOCAL_RANK=0")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        _join_job("nccl" if local.type == "cuda" else "gloo", timeout)
        told_once()  # PyTorch puts its own hook before ours
    return local


def _gpus(there: int) -> str:
    """What is there of GPUs, and what to do."""
    build = "" if torch.version.cuda or torch.version.hip else f" (PyTorch {torch.__version__} is built without CUDA)"
    return f"PyTorch sees {there or 'no'} GPU{'s' * (there > 1)} here{build}; leave device out, or say cpu"


def _join_job(backend: str, timeout: float) -> None:
    """Initialise the default group from the launcher's variables, on loopback where all ranks are on this machine.

    Raises `RankFailure` naming the ranks that do not come within `timeout` seconds.
    """
    rank, size, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    port, limit = int(os.environ.get("MASTER_PORT", "29500")), timedelta(seconds=timeout)
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if address in ("localhost", LOOPBACK) or os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        stay_on_loopback()
    try:
        if hosts and address in ("localhost", LOOPBACK):
            store = listening_store(port, timeout=timeout)
        else:
            store = dist.TCPStore(address, port, is_master=hosts, wait_for_workers=False, timeout=limit)
    except (RuntimeError, OSError) as error:
        raise LaunchError(f"the store of this job at {address}:{port} cannot be {'served' if hosts else 'reached'}: "
                          f"{str(error).splitlines()[0]}") from error
    never_wait_long(store)
    name = f"xdit/job{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    joined = dist.PrefixStore(f"{name}/{attempt(store, name, rank)}", store)
    _wait_for_all(joined, rank, size, timeout)
    dist.init_process_group(backend, store=joined, rank=rank, world_size=size, timeout=limit)


def _wait_for_all(store: dist.Store, rank: int, size: int, timeout: float) -> None:
    """Wait until every rank has come. Whoever gives up first says so in the store, and all raise alike."""
    start, look, patient = time.monotonic(), 0.01, patience() if rank == 0 else None
    deadline = start + timeout
    try:
        store.set(f"here{rank}", "")
        while absent := _missing(store, "here", range(size)):
            if patient is not None and time.monotonic() - start > patient:
                patient *= 2
                say(f"waiting for rank {', '.join(map(str, absent))} to join the job, since "
                    f"{time.monotonic() - start:.0f} s")
            if time.monotonic() > deadline:
                store.compare_set("absent", "", ",".join(map(str, absent)))
            if store.check(["absent"]):
                first, *others = map(int, store.get("absent").decode().split(","))
                _say_good_bye(store, rank, sorted(set(range(size)) - {first, *others}))
                more = f"; nor did ranks {', '.join(map(str, others))}" if others else ""
                raise RankFailure(first, f"did not join the job within {timeout:g} s{more}")
            time.sleep(look)
            look = min(2 * look, 0.5)
    except XditError:
        raise
    except RuntimeError as error:
        raise RankFailure(-1, "the process that hosts the store of this job (rank 0 or the launcher) gives no answer "
                          "while ranks join") from error


def _missing(store: dist.Store, key: str, ranks: Iterable[int]) -> list[int]:
    return [r for r in ranks if not store.check([f"{key}{r}"])]


def _say_good_bye(store: dist.Store, rank: int, present: Sequence[int]) -> None:
    """Rank 0 may host the store, which ends with it: it goes when the others know."""
    store.set(f"told{rank}", "")
    deadline = time.monotonic() + GRACE
    while rank == 0 and _missing(store, "told", present) and time.monotonic() < deadline:
        time.sleep(0.05)


def already_a_rank() -> bool:
    """Whether this process was started as a rank of a job, or has joined one."""
    return dist.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def kind_for(world_size: int) -> str:
    """The kind of device of as many ranks on this machine: cuda where each has a GPU."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= world_size else "cpu"


def place_of(world_size: int, device: str | None) -> torch.device:
    """The device of this process, be it a rank of a job (which it joins) or, for a world of one, alone."""
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if world_size > 1:
        return init_from_env(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise LaunchError(f"device cuda was asked for, but {_gpus(0)}")
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
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # torch's own way to say that the launcher, not rank 0, hosts the store.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        VARIABLE: os.environ.get(VARIABLE) or _secret,
    }


def become_rank(env: Mapping[str, str], device: str, threads: int) -> torch.device:
    """Make this freshly spawned process the rank that `env` describes, tied to the life of its parent; its device."""
    os.environ.update(env)
    # Ctrl-C reaches the whole terminal group; the parent alone decides, without a traceback from every rank.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # By the kernel: a process that is stopped ends too.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device == "cpu":
        torch.set_num_threads(threads)
    return init_from_env(device)


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
    begun = [process for process in processes if process.pid is not None]
    for process in begun:
        if process.is_alive():
            process.kill()
    for process in begun:
        process.join()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Nameless:
    """A file without a name, for this process and those that are handed it: whoever is killed leaves nothing behind."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._file: Any = os.fdopen(_unnamed() if descriptor is None else descriptor, "r+b")

    def __enter__(self) -> Nameless:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __reduce__(self) -> tuple[Callable[[Any], Nameless], tuple[Any]]:
        return _handed, (reduction.DupFd(self._file.fileno()),)

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()

    def opened(self) -> Any:
        """The file, to be written, or read from its beginning by the only one who does."""
        self._file.seek(0)
        return self._file

    def read(self) -> bytes:
        """All of it, wherever another process that was handed it is in it; empty if nothing was written."""
        if not self.written:
            return b""
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return mapped[:]

    @property
    def written(self) -> bool:
        return os.fstat(self._file.fileno()).st_size > 0


def _unnamed() -> int:
    with tempfile.TemporaryFile() as made:
        return os.dup(made.fileno())


def _handed(duplicate: Any) -> Nameless:
    return Nameless(duplicate.detach())


class Said(NamedTuple):
    """Where a rank leaves what it has to say: in the end, one of the first two."""

    result: Nameless
    failure: Nameless
    started: Nameless
    """Something as soon as it has joined."""


def _rank_main(call: Nameless, said: Said, env: Mapping[str, str], device: str, threads: int) -> None:
    try:
        become_rank(env, device, threads)
        said.started.write(b"1")
        fn, args, kwargs = pickle.loads(call.read())
        result = fn(*args, **kwargs)
        torch.save(result, said.result.opened())
        said.result.opened().flush()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        said.failure.write(pickle.dumps(failure_of(error)))
        # The parent shows the traceback; the group is left alone, as destroying it may wait for dead peers.
        sys.exit(1)
    dist.destroy_process_group()


def _wait_for_start(ranks: list[BaseProcess], said: list[Said], timeout: float | None) -> None:
    """Wait until all ranks have joined, or one has ended."""
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    while not all(one.started.written for one in said) and time.monotonic() < deadline:
        if wait([process.sentinel for process in ranks], timeout=0.05):
            return


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
    ranks: list[BaseProcess], said: list[Said], overdue: list[int], timeout: float | None
) -> Failure | None:
    """The failure to report: the first that is not the consequence of another one."""
    failures = []
    for rank, process in enumerate(ranks):
        if report := said[rank].failure.read():
            found: Failure = pickle.loads(report)
            failures.append(found._replace(text=f"rank {rank} failed:\n{found.text}"))
        elif rank in overdue:
            continue
        elif process.exitcode and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            failures.append(Failure(0.0, False, f"rank {rank} was killed by signal {name}"))
        elif process.exitcode or not said[rank].result.written:
            text = f"rank {rank} ended with exit code {process.exitcode} and without a result; see its output"
            if process.exitcode == _UNGUARDED:
                text = ("every rank imports the script that calls launch(), which calls launch() again. Call it under "
                        "`if __name__ == '__main__':`")
            failures.append(Failure(float("inf"), False, text))
    if failures:
        return min(failures, key=lambda failure: (failure.consequence, failure.when))
    if overdue:
        return Failure(0.0, False, f"ranks {overdue} had not ended after {timeout} s and were killed")
    return None
