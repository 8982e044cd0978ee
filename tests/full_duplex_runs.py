"""What ranks do in the tests of exchanges in both directions at once; run as a script, on machines with slow links."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

import xdit_compile
from xdit_compile.runtime.control.full_duplex import full_duplex
from xdit_compile.runtime.control.process_groups import make_group

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64)


def block(seed: int, source: int, target: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """What ``source`` sends to ``target``: known to everybody."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * source + target)
    return (torch.rand(rows, width, generator=generator) * 100).to(dtype)


def made(ranks: Iterable[int]) -> dist.ProcessGroup:
    """A group of some of the pool's workers, which need not have made as many groups before."""
    control: Any = SimpleNamespace(timeout=60.0, patiently=lambda what, make: make())
    return make_group("test.full_duplex", tuple(ranks), control)


def exchanged(seed: int, ranks: int) -> bool:
    """Whether each rank gets what is for it, of any number of rows, some of them none, in two exchanges at once."""
    draw = random.Random(seed)
    members = sorted(draw.sample(range(ranks), draw.randint(2, ranks)))
    dtype, width, equal = draw.choice(DTYPES), draw.randint(1, 40), draw.random() < 0.3
    rows = {(s, t): 3 if equal else draw.choice((0, 1, 7, 3000)) for s in members for t in members}
    me = dist.get_rank()
    if me not in members:
        return True
    group = made(members)
    both, works, wanted = full_duplex(group), [], []
    for one in (seed, seed + 1):
        given = torch.cat([block(one, me, t, rows[me, t], width, dtype) for t in members])
        wanted.append(torch.cat([block(one, s, me, rows[s, me], width, dtype) for s in members]))
        output = torch.empty_like(wanted[-1])
        sizes = ([], []) if equal else ([rows[s, me] for s in members], [rows[me, t] for t in members])
        works.append((both.alltoall_base(output, given, *sizes), output))
    for work, _ in works:
        work.wait()
    same = all(torch.equal(w.view(torch.uint8), o.view(torch.uint8))
               for w, (_, o) in zip(wanted, works, strict=True))
    total = collectives.wait_tensor(collectives.all_reduce(torch.ones(3) * me, "sum", both))
    held = collectives.wait_tensor(collectives.all_gather_tensor(torch.ones(2) * me, 0, both))
    return same and total.tolist() == [sum(members)] * 3 and held.tolist() == [float(m) for m in members for _ in "ab"]


def busy(times: int) -> bool:
    """Whether many collectives of all kinds, one after the other, come to an end."""
    group = made(range(dist.get_world_size()))
    both, ranks = full_duplex(group), group.size()
    for _ in range(times):
        total = collectives.wait_tensor(collectives.all_reduce(torch.ones(8, 3).reshape(4, 6) * 1.0, "sum", both))
        held = collectives.wait_tensor(collectives.all_gather_tensor(torch.ones(4, 6).reshape(3, 8) * 2.0, 0, both))
        sent = collectives.wait_tensor(collectives.all_to_all_single(held + 1.0, None, None, both))
    return bool((total == ranks).all() and (sent == 3.0).all())


def late(job: Path) -> None:
    """Ranks exchange so many bytes, the second comes late; writes how long it then takes."""
    kind, nbytes, times = json.loads(job.read_text())
    xdit_compile.init_from_env()
    group = full_duplex(dist.new_group([0, 1]))
    x, found = torch.zeros(nbytes, dtype=torch.uint8), []
    both = torch.cat([x, x])

    def exchange() -> dist.Work:
        if kind == "all_to_all":
            return group.alltoall_base(torch.empty_like(both), both, [], [])
        return group.allgather_into_tensor_coalesced([torch.empty_like(both)], [x])

    for _ in range(times):
        dist.barrier()
        time.sleep(0.1 * dist.get_rank())
        start = time.perf_counter()
        exchange().wait()
        found.append(time.perf_counter() - start)
    if dist.get_rank() == 1:
        job.with_suffix(".found").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    late(Path(sys.argv[1]))
