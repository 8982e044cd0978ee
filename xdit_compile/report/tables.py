"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xdit_compile.report.units import plural, size, work

if TYPE_CHECKING:
    from xdit_compile.cli.run import Run
    from xdit_compile.diagnostics.explain import Explanation, Row
    from xdit_compile.diagnostics.verify import Verification

def table(title: str, *columns: str) -> Table:
    """An empty table; a column whose name begins with ``>`` holds numbers."""
    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False,
                 header_style="dim", padding=(0, 2, 0, 0), expand=False)
    for column in columns:
        number = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if number else "left", no_wrap=number,
                        overflow="fold")
    return made


def sections(*parts: RenderableType | None) -> RenderableType:
    """The parts that are there, an empty line between them."""
    return Group(*(Padding(p, (0, 0, 1, 0)) for p in parts if p is not None))


def place(module: str, source: str) -> str:
    """Module path and source line, one under the other."""
    return "\n".join(filter(None, (module, source)))


def name(function: str, node: str) -> str:
    """A node, and the block function it stands in if it does."""
    return node if function == "main" else f"{node}\nin {function}"


def summary_of_explanation(e: Explanation) -> str:
    ranks = e.spec.world_size
    missing = (f"{plural(len(e.fallbacks), 'operator')} computed whole for want of a rule" if e.fallbacks
               else "a rule for every operator")
    staged = f"{size(e.stages.sent(e.rank))} to later stages; " if e.stages else ""
    kept = f"{e.kept}; " if e.kept else ""
    return (f"{e.model} under {e.spec}: {work(e.local.flops)} per rank, {e.work_ratio:.3f}/{ranks} of one "
            f"device; {plural(e.local.collective_count, 'collective')} sending {size(e.local.sent)}; {staged}"
            f"activations {size(e.local.activations)} of {size(e.whole.activations)}; {kept}{missing}")


def explanation_table(e: Explanation) -> RenderableType:
    """All of an explanation."""
    ranks = e.spec.world_size
    head = Text.assemble((e.model, "bold"), f" under {e.spec}, rank {e.rank} of {ranks}")
    nodes = sum(e.operators.values())
    blocks = ", ".join(f"{f} x{times}" for f, times in e.functions.items())
    captured = Text(f"Captured {plural(nodes, 'node')} of {plural(len(e.operators), 'operator')} in "
                    f"{e.capture_seconds:.1f} s, passes {e.passes_seconds:.1f} s. Functions: {blocks}")
    return sections(
        Group(head, captured), _costs(e), _kept(e), e.stages,
        _rows("Where the token axes start", e.seeds, e),
        _rows("Attention", e.attentions, e, sent=True),
        _rows("Convolutions", e.convolutions, e, sent=True),
        _collectives(e),
        _rows("Computed whole, for want of a rule", e.fallbacks, e),
        _replicated(e))


def _costs(e: Explanation) -> Table:
    made = table("One forward", "", ">one device", ">this rank", ">ratio x ranks")
    ratio = e.local.activations * e.spec.world_size / max(e.whole.activations, 1)
    made.add_row("operations", work(e.whole.flops), work(e.local.flops), f"{e.work_ratio:.3f}")
    made.add_row("peak activations", size(e.whole.activations), size(e.local.activations), f"{ratio:.3f}")
    made.add_row("bytes sent", "", size(e.local.sent), "")
    if e.stages:
        made.add_row("bytes to later stages", "", size(e.stages.sent(e.rank)), "")
    made.add_row("collectives", "", f"{e.local.collective_count:,}", "")
    return made


def _kept(e: Explanation) -> Text | None:
    if e.kept is None:
        return None
    said = str(e.kept)
    return Text(f"{said[0].upper()}{said[1:]} for each prompt; what changes: {', '.join(e.kept.changes)}")


def _rows(title: str, rows: Iterable[Row], e: Explanation, sent: bool = False) -> Table | None:
    made = table(title, "node", "where", "what", ">times", *([">sent"] if sent else []))
    for row in rows:
        made.add_row(name(row.function, row.node), place(row.module, row.source), row.text, str(row.times),
                     *([size(row.sent)] if sent else []))
    return made if made.row_count else None


def _collectives(e: Explanation) -> Table | None:
    made = table("Collectives, per forward", "kind", "over", "where", "for", ">count", ">sent")
    for t in e.traffic:
        made.add_row(t.kind, f"{t.axis} of {t.ranks}", place(t.module or t.function, t.source), t.why,
                     f"{t.count:,}", size(t.sent))
    return made if made.row_count else None


def _replicated(e: Explanation) -> Table | None:
    share = e.replicated_flops / max(e.local.flops, 1)
    made = table(f"Computed whole by every rank: {share:.1%} of this rank's operations, the largest first",
                 "node", "where", "what", ">times", ">share")
    for row in e.replicated:
        made.add_row(name(row.function, row.node), place(row.module, row.source), row.text, str(row.times),
                     f"{row.flops / max(e.local.flops, 1):.2%}")
    return made if made.row_count else None


def summary_of_verification(v: Verification) -> str:
    where = f"{v.model} under {v.spec} on {plural(v.spec.world_size, 'rank')}"
    if v.ok:
        return (f"{where}: {plural(len(v.outputs), 'output')} equal to one device's within {v.tolerance:g} "
                f"(largest relative difference {v.worst:.2g})")
    return f"{where}: DIFFERS by {v.worst:.2g} (tolerance {v.tolerance:g}). {_blame(v)}"


def verification_table(v: Verification) -> RenderableType:
    """All of a verification."""
    outputs = table("Outputs", "output", "type", ">absolute", ">relative")
    for o in v.outputs:
        outputs.add_row(str(o.index), f"{o.dtype} {list(o.shape)}", f"{o.absolute:.3g}", f"{o.relative:.3g}")
    nodes = table("The first values that differ, in order", "node", "where", "layout", "ranks", ">absolute",
                  ">relative")
    for n in v.nodes:
        nodes.add_row(name(n.function, f"{n.node} = {n.operator}"), place(n.module, n.source), n.layout,
                      ",".join(map(str, n.ranks)), f"{n.absolute:.3g}", f"{n.relative:.3g}")
    return sections(Text(summary_of_verification(v)), outputs, nodes if v.nodes else None)


def run_table(r: Run) -> RenderableType:
    """What a run took and made."""
    each = f", {r.seconds_per_step:.3g} s for each of {plural(r.steps, 'step')}" if r.seconds_per_step else ""
    first = "" if r.warmup_calls else ", capturing the models included"
    head = Text.assemble((r.pipeline, "bold"), f" under {r.spec} on {plural(r.processes, 'process', 'processes')} "
                         f"({r.device}, {r.dtype}): {r.seconds:.2f} s{each}{first}; loaded in {r.load_seconds:.2f} s")
    memory = table("Peak memory", "rank", ">bytes")
    for rank, peak in enumerate(r.peak_memory):
        memory.add_row(str(rank), size(peak))
    files, notes = table("Written", "file"), table("To be noted", "")
    for made, lines in ((files, r.files), (notes, r.notes)):
        for line in lines:
            made.add_row(Text(line))
    return sections(head, *(made for made in (memory, files, notes) if made.row_count))


def _blame(v: Verification) -> str:
    if v.cause == "capture":
        return ("The captured program already differs from the model on one device: its forward depends on "
                "something that is no input, such as a Python value that changes between calls, or draws "
                "random numbers.")
    if v.cause == "stages":
        return ("No rank has all parameters any more, so that the first operator that differs cannot be named; verify "
                "the model under ulysses=2, which names it.")
    if v.cause == "execution":
        return f"Run node by node every value is right: the difference is made by backend={v.spec.backend}."
    first = v.nodes[0]
    ranks = f"rank{'' if len(first.ranks) == 1 else 's'} {','.join(map(str, first.ranks))}"
    where = ", ".join(filter(None, (first.module, first.source, ranks)))
    return f"First at {first.function}.{first.node} ({first.operator}): {where}."
