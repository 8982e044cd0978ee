"""Process groups that were made, to be given out again for the same name and ranks, until one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store
from torch.distributed.distributed_c10d import _get_default_store

_made: dict[tuple[ProcessGroup, str, tuple[int, ...], int], ProcessGroup] = {}


def cached(name: str, ranks: tuple[int, ...], make: Callable[[Store, str], ProcessGroup]) -> ProcessGroup:
    """The group of this name and ranks, or one by ``make(store, unique name)`` where there is none that can be used."""
    world = dist.group.WORLD
    assert world is not None
    store = _get_default_store()
    generation = store.add(_generation_key(name, ranks), 0)
    key = (world, name, ranks, generation)
    if key not in _made:
        _made[key] = make(store, f"{_generation_key(name, ranks)}.{generation}")
    return _made[key]


def give_up(groups: Iterable[ProcessGroup], store: Store) -> None:
    """Never give out these groups again: a collective on them failed, and nobody knows what is still in flight. Told in
    ``store``, the job's own, because some ranks may not have noticed; whoever tells it later tells nothing new."""
    failed = set(groups)
    for (world, name, ranks, generation), group in list(_made.items()):
        if group in failed and _made.pop((world, name, ranks, generation), None) is not None:
            with suppress(dist.DistError):  # a lost store: there is no job left to make groups in
                store.compare_set(_generation_key(name, ranks), str(generation), str(generation + 1))


def _generation_key(name: str, ranks: tuple[int, ...]) -> str:
    """Where the store counts how often the group had to be given up."""
    return f"{name}.{'-'.join(map(str, ranks))}"
