"""All that can be measured on one GPU, in one command of at most nine minutes: is it right there, and how fast?

    python benchmarks/gpu.py --output gpu.json                            # on a machine with one GPU
    python benchmarks/gpu.py --read gpu.json --write docs/performance.md  # its section of the page, on any machine
    python benchmarks/gpu.py --device cpu --tiny                          # a rehearsal of the same code
    python benchmarks/gpu.py --parts checks ranks

Needed are PyTorch, numpy, rich, tqdm and safetensors; FLUX and Wan are those of diffusers where it is installed, else
models of the same sizes that come with this program. The report is written after each part, so that a campaign that is
ended leaves what it has. A part that fails says why, and the next one is run. Parts:

"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The package of this checkout, which need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_parts import page
from gpu_parts.campaign import PARTS, Options, campaign

HURRY = 8.0
"""Seconds before the end of the budget at which whatever still runs is ended."""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.read:
        report = json.loads(options.read.read_text())
    else:
        deadline = time.time() + 60 * options.minutes - HURRY

        def keep(report: dict[str, Any]) -> None:
            if options.output:
                write(options.output, json.dumps(report, indent=1) + "\n")

        parts = {name: PARTS[name] for name in options.parts}
        report = campaign(parts, Options(options.device, options.tiny, options.own, deadline), keep)
    text = page.section(report)
    if options.write:
        write(options.write, page.replaced(options.write.read_text(), text))
    else:
        print(text)
    return 1 if any(part["status"] == "error" for part in report["parts"].values()) else 0


def write(path: Path, text: str) -> None:
    """The file, whole or as it was."""
    with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, delete=False) as draft:
        draft.write(text)
    os.chmod(draft.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
    os.replace(draft.name, path)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    about = "".join(f"  {name:10} {part.about}\n" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__ + about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and two steps: whether it runs, not how fast")
    parser.add_argument("--own", action="store_true", help="leave diffusers alone though it is there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it has ended (default 9)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the report")
    parser.add_argument("--read", type=Path, metavar="FILE.json", help="run nothing, show this report")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="put the section there, between its two comments")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not options.read and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny rehearses the campaign without one")
    return options


if __name__ == "__main__":
    sys.exit(main())
