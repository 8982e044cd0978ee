"""How the commonest operators are followed: the table in docs/operators.md.

Each call of ``tests/operators.py`` is made between two blocks of attention, on two ranks in lock-step, and compared
with plain PyTorch. Takes a few minutes.

    python benchmarks/operators.py --output docs/operators.md

Exit code 1 if a result is not that of one device.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from operator_runs import Found, calls, kind_of, measure

EXACT = 1e-5

HEAD = """# Operators

Calls as a forward may make them, of tokens that two ranks share, between two blocks of attention: what they became in
the canonical program, and what they met. Composite operators without a rule are taken apart into those listed. Made by
`python benchmarks/operators.py --output docs/operators.md`; all results are those of plain PyTorch (1e-5, float32).

"""


def page(found: dict[str, list[Found]]) -> str:
    """The tables, with a summary before them."""
    kinds = {op: kind_of(op) for records in found.values() for f in records for op in f.operators}
    counts = Counter(kinds.values())
    whole = {text.partition(" computed")[0] for records in found.values() for f in records for text in f.fallbacks}
    constant = sum(kind == "none" and op not in whole for op, kind in kinds.items())
    total = sum(map(len, found.values()))
    lines = [HEAD + f"{total} calls become {len(kinds)} operators: {counts['rule']} have a rule, "
             f"{counts['element-wise']} are element-wise by PyTorch's own tag, {counts['none'] - constant} have "
             f"neither and are computed whole where they meet shared tokens, and {constant} never do (they make "
             "constants).", ""]
    lines += ["Computed whole by some call: " + ", ".join(f"`{op}`" for op in sorted(whole)) + ".", ""]
    for family, records in found.items():
        lines += [f"## {family.capitalize()}", "", "| call | became | on two ranks |", "|---|---|---|"]
        for f in records:
            shown = ", ".join(op.removeprefix("aten.").removesuffix(".default") for op in f.operators)
            lines.append(f"| `{f.text.replace('|', chr(92) + '|')}` | {shown} | {f.how} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {family: [measure(text) for text in texts] for family, texts in calls().items()}
    given.output.write_text(page(found))
    wrong = [f.text for records in found.values() for f in records if f.error > EXACT]
    print(f"{given.output}: {sum(map(len, found.values()))} calls", *(f"wrong: {text}" for text in wrong), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
