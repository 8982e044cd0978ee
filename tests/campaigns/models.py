"""Random models under random specs, all ranks in lock-step in one process, against plain PyTorch.

    python tests/campaigns/models.py --count 2000 --seed 0

A case passes if its results are those of one device (1e-5 of the largest value, in float32) or it is refused with one
of the package's own errors; whatever else happens is a failure, printed with the seed that repeats it
(``--count 1 --seed SEED``). Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulation import together
from random_models import Plan, drawn

from xdit_compile.errors import XditError
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.pytree import flatten
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5

SPECS = ("ulysses=2", "ulysses=2", "ring=2", "ring=2", "ulysses=3", "ring=3", "ulysses=4", "ring=4", "ulysses=2,ring=2",
         "cfg=2", "data=2", "data=3", "cfg=2,ulysses=2", "data=2,ulysses=2", "data=2,ring=2", "cfg=2,data=2",
         "tensor=2", "tensor=2", "tensor=3", "tensor=4", "tensor=2,ulysses=2", "tensor=2,ring=2", "tensor=2,cfg=2")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``exact``, ``refused`` or ``failed``, and why."""

    seed: int
    spec: str
    what: str
    text: str = ""
    plan: str = ""


def spec_for(plan: Plan, rng: random.Random) -> str:
    """Mostly one that asks for no more heads and samples than there are."""
    fits = [s for s in SPECS if ShardingSpec.parse(s).ulysses_degree <= plan.heads
            and plan.batch % ShardingSpec.parse(s).batch_degree == 0]
    return rng.choice(SPECS if rng.random() < 0.1 else fits)


@torch.no_grad()
def attempt(seed: int) -> Outcome:
    """The case of this seed."""
    plan, model, inputs = drawn(seed)
    spec = spec_for(plan, random.Random(seed * 7919 + 1))
    try:
        arguments = call_arguments(model, inputs)
        left = copy.deepcopy(arguments)
        result = model(*left[0], **left[1])
        found = together(model, arguments, flatten((result, left))[0], capture(model, *arguments), spec)
    except XditError as error:
        return Outcome(seed, spec, "refused", f"{type(error).__name__}: {error}", str(plan))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Outcome(seed, spec, "failed", f"{type(error).__name__} at {where}: {error}", str(plan))
    if found.error <= EXACT:
        return Outcome(seed, spec, "exact", "", str(plan))
    return Outcome(seed, spec, "failed", f"differs by {found.error:.2g}", str(plan))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for seed in tqdm(range(given.seed, given.seed + given.count), unit="case", mininterval=5):
        outcome = attempt(seed)
        counts[outcome.what] += 1
        if outcome.what == "refused":
            reasons[outcome.text.splitlines()[0][:100]] += 1
        elif outcome.what == "failed":
            print(f"seed {seed}, {outcome.spec}: {outcome.text.splitlines()[0][:300]}\n    {outcome.plan}", flush=True)
    print(f"{given.count} cases from seed {given.seed}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    for text, n in reasons.most_common():
        print(f"    refused {n} times: {text}")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
