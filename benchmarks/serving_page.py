"""The page of what `serving.py` measured."""

from __future__ import annotations

from typing import Any

HEAD = """\
# Serving, measured

Made by `python benchmarks/serving.py --output docs/serving.md`, on CPUs: two processes of one thread, gloo, a tiny
pipeline of diffusers whose picture takes a fraction of a second. Seconds are those of a machine of two
cores that may have had other work; what is compared is compared within one run. How to serve: [README](../README.md).

![The page at /](serving/page.png)

"""


def page(found: dict[str, Any]) -> str:
    """Markdown of all parts that were measured."""
    return HEAD + "\n".join(section(found[name]) for name, section in SECTIONS.items() if name in found)


def _load(of: dict[str, Any]) -> str:
    off, rate = of["largest difference from diffusers alone, of 255"], of["images per second"]
    return f"""## Many clients

{of["requests"]} requests from {of["clients"]} clients at once, of 20 kinds; each picture is compared with that of its
own single run.

| requests | answered | equal to their single run | p50 | p95 | images a second |
|---|---|---|---|---|---|
| {of["requests"]} | {of["answered"]} | {of["equal"]} | {of["p50"]:.2f} s | {of["p95"]:.2f} s | {rate:.1f} |

Against diffusers alone in one process, pixels differ by at most {off} of 255. A request waits for those before it: p50
is mostly the queue.
"""


def _death(of: dict[str, Any]) -> str:
    return f"""## A rank that is killed

The request that ran got {of["status"]}: "{of["said"]}".
Of {of["later"]} requests sent right after, {of["equal"]} got their picture.
"""


def _malformed(of: dict[str, Any]) -> str:
    statuses = ", ".join(f"{count} times {status}" for status, count in of["statuses"].items())
    return f"""## Malformed requests

{of["requests"]} of them, drawn at random: {statuses}.
{"The server answers as before." if of["lives"] else "The server did not live."}
"""


def _memory(of: dict[str, Any]) -> str:
    few, many = of["after"]
    return f"""## Memory

Server and ranks have {of["bytes"][0] / 1e6:.0f} MB to themselves after {few} requests and
{of["bytes"][1] / 1e6:.0f} MB after {many}: {100 * of["growth"]:+.1f}%.
"""


def _overhead(of: dict[str, Any]) -> str:
    return f"""## What it adds to an image

Images of {of["steps"]} steps that take rank 0 {of["seconds"]:.1f} s; medians of {of["rounds"]} calls. Each is compared
with the time of that very call on rank 0, without what telling of steps took there.

The work is that of the processor: in the caller's process, a client of HTTP included, and on rank 0 for telling.

| | time added to an image | work added | that is of 2 s |
|---|---|---|---|
| handle, progress told | {100 * of["handle"]:.1f}% | {1000 * of["work"]["handle"]:.0f} ms | \
{50 * of["work"]["handle"]:.1f}% |
| HTTP | {100 * of["HTTP"]:.1f}% | {1000 * of["work"]["HTTP"]:.0f} ms | {50 * of["work"]["HTTP"]:.1f}% |
"""


def _start(of: dict[str, Any]) -> str:
    often = f"medians of {of['rounds']}" if of["rounds"] > 1 else "one of each"
    rows = "\n".join(f"| {name} | {seconds:.1f} s | {of['work'][name]:.1f} s | {_times(of['seconds'], name)} | "
                     f"{_times(of['work'], name)} |" for name, seconds in of["seconds"].items())
    return f"""## From start to the first answer

Processes, imports, weights, capture, compilation and a call of two steps (of an artifact alone: of its model), in
turns; {often}. The pipeline is 28 blocks deep, as DiT-XL/2, and narrow: imports, capture and
compilation take what they take for a model of full width, weights do not.

| started from | seconds | of the processor, both ranks | times as fast | by the processor |
|---|---|---|---|---|
{rows}

Artifacts are compared with the pipeline that does the same: eager ones with it as it is, native ones with it compiled
the first time. Later starts find what inductor has kept, where it is the same machine. What a pipeline takes
beside its artifact is the import of diffusers; an artifact alone needs none of it.
"""


def _times(found: dict[str, float], name: str) -> str:
    """How many times as fast as the pipeline that does the same."""
    if "artifact" not in name:
        return ""
    first = next(n for n in found if n.startswith("compiled" if "native" in name else "pipeline"))
    return f"{found[first] / found[name]:.1f}"


SECTIONS = {"load": _load, "death": _death, "malformed": _malformed, "memory": _memory, "overhead": _overhead,
            "start": _start}
