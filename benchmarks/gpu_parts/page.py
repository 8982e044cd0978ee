"""The section of docs/performance.md that a report gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

BEGIN = "<!-- benchmarks/gpu.py writes from here -->"
END = "<!-- to here -->"

WAYS = {"ours": "ours", "eager": "ours, not compiled", "whole": "`torch.compile(model, fullgraph=True)`",
        "plain": "the model as it is"}


def replaced(page: str, section: str) -> str:
    """``page`` with ``section`` between its two comments.

    Raises:
        ValueError: they are not there, once each and in this order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page has no place for the section: {BEGIN} and {END}, once each and on own lines")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{rest.partition(END)[2]}"


def section(report: Mapping[str, Any]) -> str:
    """All of a report, as Markdown."""
    return "\n".join(_lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    if report["rehearsal"]:
        yield "A rehearsal, whose times mean nothing: no GPU, or tiny models."
        yield ""
    versions = [f"{name} {machine[name]}" for name in ("torch", "cuda", "python", "diffusers") if machine.get(name)]
    yield f"{machine.get('name', 'No machine')}; {', '.join(versions)}; {report.get('seconds', 0):.0f} s in all."
    if why := machine.get("without_diffusers"):
        yield f"Without diffusers: {why}."
    yield ""
    yield from _table(("part", "what", "", "seconds"), (
        (name, part["about"], _said(part), f"{part['seconds']:.0f}") for name, part in report["parts"].items()))
    shown = {"checks": _pairs, "ranks": _pairs, "compiling": _pairs, "flux": _steps, "wan": _steps, "graphs": _steps,
             "local": _local, "rings": _local}
    for name, part in report["parts"].items():
        if part["figures"]:
            yield f"**{name}**: {part['about']}"
            yield ""
            yield from shown.get(name, _pairs)(part["figures"])


def _said(part: Mapping[str, Any]) -> str:
    return part["status"] + "".join(f": {_flat(part[key])}" for key in ("reason", "error") if key in part)


def _pairs(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(("", ""), ((name, _value(value)) for name, value in figures.items()))


def _steps(figures: Mapping[str, Any]) -> Iterator[str]:
    """Ways to run one model: rows of what ``timed`` found."""
    rows, others = [], {}
    for name, found in figures.items():
        if isinstance(found, dict) and "step_ms" in found:
            rows.append((WAYS.get(name, name), *_times(found), _size(found.get("peak_bytes"))))
        else:
            others[name] = found
    if rows:
        yield from _table(("", "ms a step", "ms alone", "host, ms", "host's share", "first call, s", "peak, GB"), rows)
    yield from _pairs(others)


def _times(found: Mapping[str, Any]) -> tuple[str, ...]:
    share = found["host_share"]
    return (f"**{found['step_ms']:.1f}**", f"{found['alone_ms']:.1f}", f"{found['host_ms']:.1f}",
            "-" if share is None else f"{share:.0%}", f"{found['first_call_s']:.1f}")


def _local(figures: Mapping[str, Any]) -> Iterator[str]:
    rows, others = [], {}
    for name, found in figures.items():
        if isinstance(found, dict) and "step_ms" in found:
            ideal = found["of_ideal"]
            rows.append((f"`{name}`", str(found["ranks"]), f"**{found['step_ms']:.1f}**",
                         "-" if ideal is None else f"{ideal:.3f}", f"{found['flops'] / 1e12:.2f}",
                         str(found["collectives"]), f"{found['bytes_sent'] / 1e6:.1f}", f"{found['host_ms']:.1f}"))
        else:
            others[name] = found
    if rows:
        yield from _table(("", "ranks", "ms a step", "over 1/N", "TFLOP", "collectives", "MB sent", "host, ms"), rows)
    yield from _pairs(others)


def _table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    made = list(rows)
    if not made:
        return
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in made:
        yield f"| {' | '.join(row)} |"
    yield ""


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_value(v)}" for key, v in value.items() if key != "traceback") or "-"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "; ".join(dict.fromkeys(map(_value, value))) or "none" if isinstance(value, list) else _flat(value)


def _flat(text: Any) -> str:
    """On one line of a table."""
    return " ".join(str(text).replace("|", "/").split())[:300]


def _size(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"
