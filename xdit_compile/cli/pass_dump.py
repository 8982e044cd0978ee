"""What ``--dump`` writes: the program after each pass, and what each pass did."""

from __future__ import annotations

import json
from pathlib import Path

from xdit_compile.ir.program import Program


class PassDump:
    """Writes the program after each pass, as ``00-canonicalize.py``, and ``passes.jsonl``: a line for each pass, with
    its name, the hash of its source, its seconds, nodes before and after, and what it matched. A file is there whole
    or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, program: Program) -> None:
        self._write(f"{self.count:02}-{name}.py", program.print_readable(print_output=False))
        self._write("passes.jsonl", "".join(f"{json.dumps(record.to_dict())}\n" for record in program.history))
        self.count += 1

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)
