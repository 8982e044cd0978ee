"""Ranks as actors of a Ray cluster, on one node or several, in a placement group of their own."""

from __future__ import annotations

import os
import secrets
import sys
from collections import deque
from contextlib import suppress
from importlib import import_module
from typing import Any

from xdit_compile.engine.ranks import SILENT, Event, Said
from xdit_compile.engine.values import packed, unpacked
from xdit_compile.errors import LaunchError, XditError
from xdit_compile.runtime.control.secret import VARIABLE
from xdit_compile.runtime.control.store import LOOPBACK


class RayRanks:
    """The actors of one engine; they end with the driver's job.

    Args:
        seconds: for the cluster to find room.
    """

    def __init__(self, size: int, device: str, threads: int, seconds: float) -> None:
        self.size = size
        self._ray = ray = ray_library()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, configure_logging=False)
        self._actors: list[Any] = []
        self._said: deque[Said] = deque()
        room = {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": 1}
        self._placement = ray.util.placement_group([room] * size, strategy="PACK")
        try:
            self._start(room, device, threads, seconds)
        except BaseException:
            self.end(0)
            raise

    def _start(self, room: dict[str, int], device: str, threads: int, seconds: float) -> None:
        ray = self._ray
        if not self._placement.wait(seconds):
            raise LaunchError(f"the Ray cluster has no room for {self.size} ranks with {room} each within {seconds:g} "
                              f"s; it has {ray.cluster_resources()}")
        strategies = import_module("ray.util.scheduling_strategies")
        # Its module needs Ray to be imported, which is an extra.
        hosted = import_module("xdit_compile.engine.ray_actor").RankActor
        actor = ray.remote(concurrency_groups={"take": 1, "next": 1})(hosted)
        # What can be imported here can be there, on this machine.
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        for rank in range(self.size):
            self._actors.append(actor.options(
                num_cpus=room["CPU"], num_gpus=room.get("GPU", 0),
                runtime_env={"env_vars": {**SILENT, "PYTHONPATH": path}},
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=rank)).remote())
        places = ray.get([a.place.remote() for a in self._actors], timeout=seconds)
        nodes = [node for node, _, _ in places]
        alone = len(set(nodes)) == 1
        common = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": LOOPBACK if alone else places[0][1],
                  "MASTER_PORT": str(places[0][2]), VARIABLE: os.environ.get(VARIABLE) or secrets.token_hex(16)}
        for rank, one in enumerate(self._actors):
            # Ray shows each actor its own GPU alone.
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(nodes.count(nodes[rank]))}
            one.join.remote(common | own, device, threads)
        self._asked = {one.next.remote(): rank for rank, one in enumerate(self._actors)}

    def send(self, message: Event) -> None:
        held = self._ray.put(packed(message))
        for one in self._actors:
            one.take.remote(held)

    def next(self, timeout: float) -> Said | None:
        if not self._said:
            done, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=max(timeout, 0))
            for asked in done:
                self._heard(asked, self._asked.pop(asked))
        return self._said.popleft() if self._said else None

    def _heard(self, asked: Any, rank: int) -> None:
        try:
            self._said.extend(Said(rank, unpacked(one)) for one in self._ray.get(asked))
        except self._ray.exceptions.RayError as error:
            reason = f"is gone (its Ray actor: {str(error).strip().splitlines()[0]})"
            self._said.append(Said(rank, {"event": "gone", "reason": reason}))
            return
        self._asked[self._actors[rank].next.remote()] = rank

    def end(self, seconds: float) -> None:
        for one in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(one)
        with suppress(self._ray.exceptions.RayError):
            self._ray.util.remove_placement_group(self._placement)


def ray_library() -> Any:
    """Ray.

    Raises:
        XditError: it is not installed.
    """
    try:
        import_module("ray.util")
        return import_module("ray")
    except ImportError as error:
        raise XditError(f"executor='ray' needs Ray, which cannot be imported ({error}); "
                        "pip install 'xdit-compile[ray]'") from error
