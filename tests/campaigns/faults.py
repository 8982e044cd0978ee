"""Fault injection over ranks and moments: nobody hangs, the culprit is named, and what all ranks give up goes on.

    python tests/campaigns/faults.py --count 300 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from campaigns.faulty import ERRORS, MISMATCHES, SLOW, TIMEOUT, Case, Seen, scene
from pool import Pool

from xdit_compile.runtime.launch import Failure
from xdit_compile.spec import ShardingSpec

SPECS = ("ulysses=2", "ring=2", "cfg=2", "ulysses=2,vae=2", "pipefusion=2,patches=2", "ulysses=3", "ring=3",
         "pipefusion=3,patches=4")
MOMENTS = ("joining", "parallelize", "capture", "collective", "scheduler", "callback", "decode", "between",
           "steady call", "closing")
LOST = ("kill", "stop")
RAISED = ("exception", "memory", "interrupt", "cancelled", "exit")

SLACK = 25.0
"""Seconds that a busy machine may take beside the waits themselves."""


def drawn(count: int, seed: int) -> list[Case]:
    """Cases by weight: the rarest combinations come too."""
    random_source = random.Random(seed)
    made = []
    for _ in range(count):
        spec = random_source.choice(SPECS)
        size = ShardingSpec.parse(spec).world_size
        fault = random_source.choice((*LOST, *RAISED, "slow", "mismatch", "together"))
        moment = random_source.choice(MISMATCHES if fault == "mismatch" else MOMENTS)
        ranks: Sequence[int] = (random_source.randrange(size),)
        if fault == "together":
            fault, moment, ranks = "cancelled", random_source.choice(("capture", "scheduler", "callback",
                                                                      "steady call")), range(size)
        made.append(Case(spec, fault, moment, tuple(ranks)))
    return made


def happened(pool: Pool, case: Case) -> list[str]:
    """What went wrong with a case; empty if it ended as it should."""
    size = ShardingSpec.parse(case.spec).world_size
    gone = case.ranks if case.fault in ("kill", "stop") else ()
    limit = TIMEOUT + SLACK
    answers = pool.answers(scene, case, ranks=range(size), without=gone, timeout=3 * limit)
    wrong = []
    for rank in set(range(size)) - set(gone):
        seen = answers.get(rank)
        if not isinstance(seen, Seen):
            wrong.append(f"rank {rank} " + (seen.text[-800:] if isinstance(seen, Failure) else "hangs"))
            continue
        wrong += [f"rank {rank}: {text}" for text in _judged(case, rank, seen, size)]
        wrong += [f"rank {rank}: {what} took {seconds:.1f} s" for what, _, seconds in seen.doings if seconds > limit]
    return wrong


def _judged(case: Case, rank: int, seen: Seen, size: int) -> Iterable[str]:
    said = {what: text for what, text, _ in seen.doings}
    errors = {what: text for what, text in said.items() if text != "right"}
    if any("WRONG" in text for text in errors.values()):
        yield f"a wrong result: {said}"
    elif case.fault == "slow":
        if errors:
            yield f"being {SLOW} s late is an error: {errors}"
    elif len(case.ranks) == size > 1:
        if [text for text in errors.values() if "Cancelled" not in text] or not errors:
            yield f"all gave up alike, and then: {said}"
        if said.get("third call") != "right":
            yield f"the next call does not work: {said}"
    elif case.fault == "mismatch":
        if not errors or not all(text.startswith(ERRORS[1]) for text in errors.values()):
            yield f"a mismatch of {case.moment} is seen so: {said}"
        elif said.get("third call") != "right" and case.moment != "weights":
            yield f"the next call does not work: {said}"
    elif rank not in case.ranks and case.moment == "between" and case.fault not in LOST:
        if errors:
            yield f"what a rank does between calls is its own affair: {errors}"
    elif rank not in case.ranks and case.moment != "closing":
        named = [text for text in errors.values() if text.startswith(ERRORS)]
        culprit = rf"\branks? {case.ranks[0]}\b"
        if not named or not re.search(culprit, named[0]):
            yield f"rank {case.ranks[0]} is not named: {said}"


def report(cases: Sequence[Case], pool: Pool) -> list[str]:
    """Run all; one line for each that failed."""
    failures = []
    for i, case in enumerate(cases):
        start = time.monotonic()
        wrong = happened(pool, case)
        took = time.monotonic() - start
        print(f"{i + 1}/{len(cases)} {'FAILED' if wrong else 'ok':6} {took:5.1f} s  {case}", flush=True)
        for text in wrong:
            print(f"       {text}", flush=True)
        failures += [f"{case}: {text}" for text in wrong[:1]]
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="cases whose text holds this")
    options = parser.parse_args()
    cases = [c for c in drawn(options.count, options.seed) if not options.only or options.only in str(c)]
    pool = Pool(world=3)
    try:
        failures = report(cases, pool)
    finally:
        pool.close()
    kinds = Counter(f"{case.fault} at {case.moment}" for case in cases)
    print(f"{len(cases)} faults of {len(kinds)} kinds, {len(failures)} of them not as they should be")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
