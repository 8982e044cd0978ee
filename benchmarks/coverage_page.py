"""The coverage page, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.coverage_measures import DEGREES, SHARD, SPECS, STAGES, TENSOR, Record
from xdit_compile.report.units import plural, size, work

Sections = dict[str, dict[str, Record]]

NEAR, FAR = 1.05, 1.25
"""Operations of all ranks over those of one device."""

ROUNDING = 1.5
"""How many times the yardstick a difference in bfloat16 may be."""

HEAD = """\
# Coverage

Made by `{command}` ({versions}).

Two things are measured. *Numbers*: every test case, a small model with random weights, runs at batch 2 and odd sizes
on 2 processes with `ulysses=2` and on 3 with `ring=3` (gloo, CPU), and is compared with plain PyTorch: all outputs,
and all arguments that the model writes into; one case of each model also in bfloat16. Weights that ranks share out
({tensor}) are compared with plain PyTorch too, and shares of them ({shard}) with the same spec without
shares, to the bit, all ranks by turns in one process. *Work*: every published size is
captured on the meta device, batch 1, and planned for {degrees} ranks; nothing of it is run.
"""

CLASSES = """\
One row for each class of model.

- *exact*: cases whose difference is within their tolerance, which is 1e-5 unless the model rounds to bfloat16 inside,
  or answers another last bit of its inputs with more than that.
- *largest error*: largest difference over largest value, the worst of all cases.
- *attention*: how it is distributed under the two specs; *as it is* where every rank attends for itself.
- *tensor*: the same with weights shared out, the worst of all specs; *not shared* where no cut of a weight saves work.
- *shard*: cases whose bits are those without shares, of those whose batch or tokens can be cut.
- *bfloat16*: see below; one case of a model.
- *FLOPs*: operations of rank 0 times N over those of one device, the worst of N = {degrees} and of all published
  sizes. 1.000 is ideal. Where a class has no published size, it is that of a test case, marked *test size*: there
  ratios mean little, as a few dozen tokens are not shared evenly and parts that do not grow with tokens weigh much.
"""

SIZES = """\
With as much of Ulysses as attention heads allow and share evenly, a ring beyond. Three figures are those for
N = {degrees}; one stands for all three.

- *spec*: at N = {most}. *FLOPs*: as above.
- *sent*: bytes that rank 0 gives to others in one forward.
- *collectives*: per forward; *in blocks*: those inside blocks; *gathers*: all-gathers inside blocks.
- *largest replicated*: at N = {most}, the operator that costs most of those that every rank computes whole, and its
  share of the operations of one device.
- *capture s*, *plan s*: CPU seconds, planning at N = {most}.
"""

HALVES = """\
Root mean square differences over the root mean square of the results in float32, batch 1.

- *ulysses=2*: between one process and two, both in bfloat16.
- *kernels*: in bfloat16 on one process, between attention with PyTorch's flash kernel and with its math kernel.
- *rounding*: on one process, between bfloat16 and float32.
- *of the yardstick*: the first over *kernels*, or over *rounding* where a model does not run with both kernels or
  does not use them. It may be at most {limit}.
"""

EXCEPTIONS = """\
Published sizes with more than {near} times the operations of one device. *Repeated* is the part of the excess that
comes from operators which every rank computes whole; the rest are uneven shares and borders computed twice.
"""

NOTHING = """\
Cases that are not split: every rank computes everything, and users are warned. The reason is the report's.
"""

CASES = """\
Errors as above; *capture s* are CPU seconds of rank 0, in a process that has captured before.
"""


SHARING = """\
# Weights that ranks share out

Made by `{command}` ({versions}).

Test cases, small models with random weights at batch 2 and odd sizes, all ranks by turns in one process against plain
PyTorch: the largest difference over the largest value under

{specs}

or *not shared*, where no cut of a weight saves work, or there are too few blocks for stages. *bits*: under how many of
{shard} results have the bits of the same spec without shares, of those that fit.

{cases} cases, {exact} exact (within 1e-5, unless the model rounds to bfloat16 inside, as SANA-WM does, or answers
another last bit of its inputs with more than that, as Kandinsky 5 does); weights are shared out in {cut}.
"""


def page(found: Sections, command: str, versions: str) -> str:
    """The whole document."""
    degrees = f"{', '.join(map(str, DEGREES[:-1]))} and {DEGREES[-1]}"
    words = {"command": command, "versions": versions, "degrees": degrees, "most": DEGREES[-1]}
    words |= {"limit": ROUNDING, "near": NEAR, "tensor": ", ".join(f"`{s}`" for s in (*TENSOR, STAGES))}
    words["shard"] = ", ".join(f"`{s}`" for s in SHARD)
    parts = [f"{HEAD.format(**words)}\n{_summary(found)}"]
    for title, text, columns, rows in (
        ("Classes", CLASSES, "class, cases:, exact:, largest error:, attention, tensor:, shard:, bfloat16:, "
                             "FLOPs:", _classes),
        ("Sizes", SIZES, "class, size, spec, FLOPs:, sent:, collectives:, in blocks:, gathers:, "
                         "largest replicated, capture s:, plan s:", _sizes),
        ("bfloat16", HALVES, "case, ulysses=2:, kernels:, rounding:, of the yardstick:", _halves),
        ("Exceptions", EXCEPTIONS, "size, N:, FLOPs:, repeated:, operator, source, share:", _exceptions),
        ("Nothing to gain", NOTHING, "class, cases, reason", _nothing),
        ("Cases", CASES, "case, class, ulysses=2:, ring=3:, tensor:, shard, capture s:", _cases),
    ):  # fmt: skip
        table = _table(columns.split(", "), rows(found))
        if table:
            parts.append(f"## {title}\n\n{text.format(**words)}\n{table}")
    return "\n".join(parts)


def sharing_page(found: Sections, command: str, versions: str) -> str:
    """Of weights that are shared out alone."""
    records, specs = found["shared"], (*TENSOR, STAGES)
    columns = "case, class, " + ", ".join(f"{i + 1}:" for i in range(len(specs))) + ", bits"
    rows = [(n, f"failed: {r['problem']}") if "problem" in r else (
        n, _class(r["class"]), *(_shared(r, s) for s in specs), _alike(r)) for n, r in records.items()]
    measured = [r for r in records.values() if "problem" not in r]
    words = {"command": command, "versions": versions,
             "specs": "\n".join(f"{i + 1}. `{s}`" for i, s in enumerate(specs)),
             "shard": " and ".join(f"`{s}`" for s in SHARD), "cases": len(records),
             "exact": sum(map(_shared_exact, measured)), "cut": sum(bool(_shared_errors(r)) for r in measured)}
    return f"{SHARING.format(**words)}\n{_table(columns.split(', '), rows)}"


def failures(found: Sections) -> dict[str, str]:
    """What failed or is inexact, and how."""
    bad = {}
    for section, records in found.items():
        for name, record in records.items():
            said = {"bfloat16": "in bfloat16", "test_sizes": "planned", "shared": "with weights shared out"}
            what = f"{name} {said[section]}" if section in said else name
            if "problem" in record:
                bad[what] = record["problem"]
            elif section == "cases" and not _exact(record):
                bad[what] = f"errors {_joined(_errors(record))}, tolerance {record['tolerance']:.0e}"
            elif section == "shared" and not _shared_exact(record):
                bad[what] = f"error {_small(_shared_error(record))}, bits alike {_alike(record)}"
            elif section == "bfloat16" and "misfit" not in record and not _yardstick(record) <= ROUNDING:
                bad[what] = f"{_yardstick(record):.2f} times the yardstick"
            elif section == "published" and (
                misfits := [r["misfit"] for r in record["rows"] if "misfit" in r]
            ):
                bad[what] = misfits[0]
    return bad


# --------------------------------------------------------------------------------------------------
# Sections


def _summary(found: Sections) -> str:
    cases, published = found["cases"], found["published"]
    lines = []
    if cases:
        exact = sum(map(_exact, cases.values()))
        classes, whole = len(_by_class(cases)), sum(map(_idle, cases.values()))
        lines.append(f"Numbers: {plural(len(cases), 'case')} of {classes} classes, {exact} exact.")
        lines.append(f"Not split, as nothing is gained: {plural(whole, 'case')}.")
    shared = [r for r in found["shared"].values() if "problem" not in r]
    if shared:
        cut = [r for r in shared if _shared_errors(r)]
        exact = sum(_shared_error(r) <= r["tolerance"] for r in cut)
        lines.append(f"Weights shared out: {plural(len(cut), 'case')} of {len(shared)}, {exact} exact.")
        alike = [_alike(r) for r in shared if _alike(r)]
        same = sum(a.partition(" of ")[0] == a.partition(" of ")[2] for a in alike)
        lines.append(f"Shares of parameters: {plural(len(alike), 'case')}, {same} the same to the bit.")
    halves = [r for r in found["bfloat16"].values() if "rounding" in r]
    if halves:
        within = sum(_yardstick(r) <= ROUNDING for r in halves)
        lines.append(f"bfloat16: {plural(len(halves), 'case')}, {within} within the yardstick.")
    if published:
        worst = [_worst(record) for record in published.values()]
        near, far = (sum(w <= limit for w in worst) for limit in (NEAR, FAR))
        sizes = plural(len(published), "published size")
        lines.append(f"Work: {sizes}, at every N within 5% of that of one device {near}, within 25% {far}.")
    return "".join(f"- {line}\n" for line in lines)


def _classes(found: Sections) -> Iterator[Sequence[Any]]:
    measured = _by_class(found["cases"])
    published, tests = _by_class(found["published"]), _by_class(found["test_sizes"])
    for name in sorted({*measured, *published}, key=str.lower):
        cases = measured.get(name, {})
        errors = [e for r in cases.values() for e in _errors(r)]
        methods = {m for r in cases.values() for s in r["specs"].values() for m in s.get("methods", ())}
        halves = [
            _yardstick(found["bfloat16"][n]) for n in cases if "rounding" in found["bfloat16"].get(n, {})
        ]
        shared = [r for n in cases if "problem" not in (r := found["shared"].get(n, {"problem": ""}))]
        apart = [_shared_error(r) for r in shared if _shared_errors(r)]
        bits = [s["same"] for r in shared for s in r["shard"].values() if "same" in s]
        sizes = [w for r in published.get(name, {}).values() if (w := _worst(r)) < math.inf]
        small = [w for r in tests.get(name, {}).values() if (w := _worst(r)) < math.inf]
        flops = f"{max(sizes):.3f}" if sizes else f"{max(small):.3f}, test size" if small else ""
        exact = f"{sum(map(_exact, cases.values()))} of {len(cases)}" if cases else ""
        yield (
            _class(name),
            len(cases),
            exact,
            _small(max(errors)) if errors else "",
            ", ".join(sorted(methods, reverse=True)) or ("as it is" if errors else ""),
            _small(max(apart)) if apart else "not shared" if shared else "",
            f"{sum(bits)} of {len(bits)}" if bits else "",
            f"{max(halves):.2f}" if halves else "",
            flops,
        )


def _sizes(found: Sections) -> Iterator[Sequence[Any]]:
    records = [(r, n) for n, r in found["published"].items()]
    for name, record in found["test_sizes"].items():
        seconds = found["cases"][name].get("capture_seconds", math.nan)  # captured once for both
        records.append((record | {"capture_seconds": seconds}, f"{name}, test size"))
    for record, name in sorted(records, key=lambda one: one[0].get("class", "").lower()):
        if "problem" in record:
            yield "", name, f"failed: {record['problem']}"
            continue
        rows = record["rows"]
        last, first = rows[-1], next(iter(rows[-1].get("replicated", ())), None)
        columns = (
            ("ratio", "{:.3f}".format),
            ("sent", size),
            ("collectives", str),
            ("inside", str),
            ("gathers", str),
        )
        yield (
            _class(record["class"]),
            name,
            last.get("spec", last.get("misfit")),
            *(_joined(say(r[key]) if key in r else "-" for r in rows) for key, say in columns),
            f"{_operator(first)}, {work(first['flops'])}, {first['share']:.2%}" if first else "nothing",
            f"{record['capture_seconds']:.1f}",
            f"{record['plan_seconds']:.1f}" if "plan_seconds" in record else "",
        )


def _halves(found: Sections) -> Iterator[Sequence[Any]]:
    for name, record in found["bfloat16"].items():
        if "rounding" in record:
            columns = (SPECS[0], "kernels", "rounding")
            yield (
                name,
                *(_small(record[c]) if c in record else "none" for c in columns),
                f"{_yardstick(record):.2f}",
            )
        else:
            yield name, record.get("misfit") or f"failed: {record['problem']}"


def _exceptions(found: Sections) -> Iterator[Sequence[Any]]:
    for name, record in found["published"].items():
        for row in record.get("rows", ()):
            if row.get("ratio", 0) > NEAR:
                first = next(iter(row["replicated"]), None)
                cause = (
                    (_operator(first), first["source"], f"{first['share']:.2%}")
                    if first
                    else ("none", "", "")
                )
                yield name, row["ranks"], f"{row['ratio']:.3f}", f"{row['repeated']:.3f}", *cause


def _nothing(found: Sections) -> Iterator[Sequence[Any]]:
    for name, cases in sorted(_by_class(found["cases"]).items()):
        reasons: dict[str, list[str]] = {}
        for case, record in cases.items():
            if _idle(record):
                reasons.setdefault(next(iter(record["specs"].values()))["reason"], []).append(case)
        for reason, names in reasons.items():
            yield _class(name), ", ".join(names), reason


def _cases(found: Sections) -> Iterator[Sequence[Any]]:
    for name, record in found["cases"].items():
        if "problem" in record:
            yield name, _class(record["class"]), f"failed: {record['problem']}"
        else:
            seconds = f"{record['capture_seconds']:.1f}" if "capture_seconds" in record else ""
            shared = found["shared"].get(name, {})
            both = ("", "")
            if "tensor" in shared:
                tensor = _small(_shared_error(shared)) if _shared_errors(shared) else "not shared"
                both = (tensor if _shared_error(shared) <= shared["tolerance"] else f"{tensor} **inexact**",
                        _alike(shared))
            yield name, _class(record["class"]), *(_error(record, spec) for spec in SPECS), *both, seconds


# --------------------------------------------------------------------------------------------------
# Of one record


def _errors(record: Record) -> list[float]:
    return [s["error"] for s in record["specs"].values() if "error" in s]


def _error(record: Record, spec: str) -> str:
    one = record["specs"][spec]
    if "misfit" in one:
        return f"does not fit: {one['misfit']}"
    return _small(one["error"]) + ("" if one["error"] <= record["tolerance"] else " **inexact**")


def _shared_errors(record: Record) -> list[float]:
    """Of those specs of tensor parallelism that fit."""
    return [s["error"] for s in record["tensor"].values() if "error" in s]


def _shared(record: Record, spec: str) -> str:
    one = record["tensor"].get(spec, {})
    if "error" not in one:
        return "not shared" if one else ""
    return _small(one["error"]) + ("" if one["error"] <= record["tolerance"] else " **inexact**")


def _shared_error(record: Record) -> float:
    return max(_shared_errors(record), default=0.0)


def _alike(record: Record) -> str:
    """Under how many specs shares change no bit; nothing where none fits."""
    same = [s["same"] for s in record["shard"].values() if "same" in s]
    return f"{sum(same)} of {len(same)}" if same else ""


def _shared_exact(record: Record) -> bool:
    return _shared_error(record) <= record["tolerance"] and all(
        s.get("same", True) for s in record["shard"].values())


def _exact(record: Record) -> bool:
    """At every spec that fits."""
    return "problem" not in record and all(e <= record["tolerance"] for e in _errors(record))


def _idle(record: Record) -> bool:
    """Whether no spec splits anything."""
    found = [s for s in record["specs"].values() if "error" in s]
    return bool(found) and all(s["reason"] for s in found)


def _yardstick(record: Record) -> float:
    return record[SPECS[0]] / (record.get("kernels") or record["rounding"] or 1.0)


def _worst(record: Record) -> float:
    """The ratio of operations at the worst number of ranks; infinite without figures."""
    return max((row["ratio"] for row in record.get("rows", ()) if "ratio" in row), default=math.inf)


def _operator(row: Record) -> str:
    return f"`{row['module'] or row['node']}`"


def _class(name: str) -> str:
    return f"`{name}`" if name else "not known"


def _by_class(records: dict[str, Record]) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for name, record in records.items():
        if "class" in record:
            found.setdefault(record["class"], {})[name] = record
    return found


# --------------------------------------------------------------------------------------------------
# Markdown


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns whose name ends in a colon are numbers. Nothing where there are no rows."""
    lines = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    head = [[c.removesuffix(":") for c in columns], ["---:" if c.endswith(":") else "---" for c in columns]]
    return "".join(map(_line, [*head, *lines])) if lines else ""


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def _joined(cells: Iterable[Any]) -> str:
    """One where all are equal."""
    texts = [_small(c) if isinstance(c, float) else str(c) for c in cells]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _small(error: float) -> str:
    return f"{error:.1e}" if error else "0"
