"""An explanation as one page for a browser: everything in one file, which asks for nothing from anywhere else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from xdit_compile.diagnostics.block_boxes import OUTSIDE, BlockBox
from xdit_compile.diagnostics.html_timeline import timeline_svg
from xdit_compile.errors import XditError
from xdit_compile.report.units import size, work

if TYPE_CHECKING:
    from xdit_compile.diagnostics.explanation import Explanation, Row

KINDS = {"weights": ("weights", "#4c78a8"), "gathered": ("weights of blocks in flight", "#9ecae9"),
         "activations": ("values being computed", "#f58518"), "exchanged": ("buffers of exchanges", "#ffbf79"),
         "kept": ("kept from step to step", "#54a24b"), "arguments": ("arguments of the call", "#b8b8b8")}
"""Of memory, in the order of the bars: what it is called, and its colour."""
COMPUTING, SENDING = "#4c78a8", "#e45756"

STYLE = """
:root { color-scheme: light; } * { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 22px; margin: 0 0 6px; } h2 { font-size: 17px; margin: 34px 0 6px; }
.verdict { font-size: 18px; } .note, figcaption { color: #57606a; font-size: 13.5px; }
.card { background: white; border: 1px solid #d8dee4; border-radius: 8px; padding: 14px 16px; margin: 10px 0; }
.figures { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.figures div { background: white; border: 1px solid #d8dee4; border-radius: 8px; padding: 10px 16px; min-width: 150px; }
.figures b { display: block; font-size: 20px; }
.bar { display: flex; height: 18px; background: #eef0f3; border-radius: 3px; overflow: hidden; flex: 1; }
.rank { display: flex; gap: 10px; align-items: center; margin: 4px 0; }
.rank span.who { width: 60px; } .rank span.sum { width: 90px; text-align: right; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 5px 0 12px; }
.block { border: 1px solid #d8dee4; border-left: 6px solid #4c78a8; border-radius: 6px; background: white;
         padding: 9px 14px; }
.block.between { border-left-color: #b8b8b8; } .block h3 { margin: 0; font-size: 15px; }
.block h3 small { color: #57606a; font-weight: normal; }
.arrow { text-align: center; color: #57606a; font-size: 13px; margin: 3px 0; }
code { font: 13px ui-monospace, monospace; background: #eef0f3; border-radius: 4px; padding: 1px 5px;
       white-space: nowrap; }
.chip { display: inline-block; background: #fdecec; border: 1px solid #f4c4c5; border-radius: 10px; padding: 0 9px;
        font-size: 13px; margin: 4px 6px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } th { text-align: left; color: #57606a; }
th, td { padding: 3px 14px 3px 0; vertical-align: top; border-bottom: 1px solid #eef0f3; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg text { font: 11px system-ui, sans-serif; }
"""


def write_page(explained: Explanation, path: str | Path, flops_per_second: float, bytes_per_second: float,
               steps: int) -> None:
    """Write ``explained`` as a page. The file is there whole or not at all.

    Raises:
        XditError: the file cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as drafts:
            draft = Path(drafts) / "page.html"
            draft.write_text(page(explained, flops_per_second, bytes_per_second, steps), encoding="utf-8")
            draft.replace(path)
    except OSError as error:
        raise XditError(f"the page cannot be written to {path}: {error.strerror}") from error


def page(e: Explanation, flops_per_second: float, bytes_per_second: float, steps: int) -> str:
    """The page's text."""
    title = f"{e.model} under {e.spec}"
    parts = [f"<h1>{escape(title)}</h1><p class='verdict'>{escape(e.verdict())}.</p>", _figures(e), _reading(e),
             *_ranks(e, flops_per_second, bytes_per_second), *_blocks(e), *_collectives(e),
             *_stages(e, flops_per_second, bytes_per_second, steps), *_whole(e),
             *_rows("How each attention is done", e.attentions)]
    return (f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
            f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n")


def _figures(e: Explanation) -> str:
    shown = [("devices", str(e.spec.world_size)), ("work of one device", work(e.whole.flops)),
             (f"work of device {e.rank}", work(e.local.flops)), ("sent by it", size(e.figures.sent)),
             ("exchanges", f"{e.local.collective_count:,}"), ("memory it takes", size(e.memory.device))]
    return f"<div class='figures'>{''.join(f'<div><b>{b}</b>{a}</div>' for a, b in shown)}</div>"


def _reading(e: Explanation) -> str:
    patches = (" In a pipeline of stages <code>576@1</code> are 576 tokens of patch 1, which follows patch 0 through "
               "the stages; blocks below are those of this device's stage.") if e.stages else ""
    return (
        "<div class='card note'><b>How to read this.</b> A diffusion transformer works on a list of "
        "<i>tokens</i>, small pieces of the picture or film and of the text. Devices (<i>ranks</i>, numbered from "
        "0) share out the tokens; in attention, where every token looks at every other, they exchange what they "
        "need. This page is one call of the model, which is one step of denoising. A layout like <code>[1, "
        "4096/8, 3072]</code> is a tensor of 1 x 4096 x 3072 numbers whose 4096 tokens are cut into 8 shares, one "
        "for each device; <code>512/8 + 4096/8</code> are two kinds of tokens one after the other, each cut in 8. "
        f"What has no slash is whole on every device. All of it was counted from the program, for device {e.rank}; "
        f"nothing was run.{patches}</div>")


def _ranks(e: Explanation, flops_per_second: float, bytes_per_second: float) -> Iterator[str]:
    ranks = e.ranks or (e.figures,)
    most = max(r.memory.device for r in ranks) or 1
    yield "<h2>Memory of each device, at the worst moment</h2><div class='card'>"
    for r in ranks:
        bars = [(100 * n / most, KINDS[kind][1], f"{KINDS[kind][0]}: {size(n)}")
                for kind, n in asdict(r.memory).items() if kind in KINDS and n]
        yield _bar(f"rank {r.rank}", bars, size(r.memory.device))
    used = [k for k in KINDS if any(asdict(r.memory)[k] for r in ranks)]
    yield _keys((KINDS[k][1], KINDS[k][0]) for k in used) + "</div>"
    times = [(r, r.flops / flops_per_second, r.sent / bytes_per_second) for r in ranks]
    longest = max(a + b for _, a, b in times) or 1
    yield ("<h2>Time of each device, one call</h2><p class='note'>Estimated: "
           f"{flops_per_second / 1e12:g} · 10<sup>12</sup> operations and {bytes_per_second / 1e9:g} · 10<sup>9</sup> "
           "bytes a second, one after the other. Exchanges that go on while a device computes make it shorter. One "
           f"device alone would take {_seconds(e.whole.flops / flops_per_second)}.</p><div class='card'>")
    for r, computing, sending in times:
        yield _bar(f"rank {r.rank}", [(100 * computing / longest, COMPUTING, f"computing: {_seconds(computing)}"),
                                      (100 * sending / longest, SENDING, f"sending: {_seconds(sending)}")],
                   _seconds(computing + sending))
    yield _keys([(COMPUTING, "computing"), (SENDING, "sending to others")]) + "</div>"


def _blocks(e: Explanation) -> Iterator[str]:
    yield ("<h2>The model, from its inputs to its result</h2><p class='note'>Each box is a kind of block and how many "
           "of them follow each other, with the layouts of what comes in and goes out, and what a device sends to the "
           "others inside of it.</p>")
    total = max(sum(b.flops for b in e.blocks), 1)
    for i, box in enumerate(e.blocks):
        if i:
            yield "<div class='arrow'>&#8595;</div>"
        yield _box(box, box.flops / total)


def _box(box: BlockBox, share: float) -> str:
    between = box.function == OUTSIDE
    where = box.first if box.first == box.last else f"{box.first} … {box.last}"
    name = "outside of blocks" if between else f"{box.function} &times; {box.times}"
    layouts = [f"{what} {' and '.join(f'<code>{escape(x)}</code>' for x in dict.fromkeys(its))}"
               for what, its in (("in", box.takes), ("out", box.gives)) if its]
    chips = "".join(f"<span class='chip'>{escape(what)}: {n:,} &times;, {size(nbytes)}</span>"
                    for what, n, nbytes in box.sent)
    return (f"<div class='block{' between' if between else ''}'><h3>{name} <small>{escape(where)} &middot; {share:.1%} "
            f"of the work</small></h3><div>{' &rarr; '.join(layouts)}</div>{chips}</div>")


def _collectives(e: Explanation) -> Iterator[str]:
    if not e.traffic:
        return
    most = max(t.sent for t in e.traffic) or 1
    rows = [(escape(t.kind), f"{escape(t.axis)} of {t.ranks}", escape(t.why), f"{t.count:,}", size(t.sent),
             f"<div class='bar' style='width:140px'><div style='width:{100 * t.sent / most:.1f}%;background:{SENDING}'>"
             "</div></div>") for t in e.traffic]
    yield "<h2>Exchanges, in one call</h2><div class='card'>" + _table(
        ("kind", "between", "for", ">how often", ">sent by this device", ""), rows) + "</div>"


def _stages(e: Explanation, flops_per_second: float, bytes_per_second: float, steps: int) -> Iterator[str]:
    if e.stages is None:
        return
    rows = [(str(i), f"{s.blocks[0]} … {s.blocks[-1]} ({len(s.blocks)})", size(s.parameters), work(s.flops),
             size(e.stages.sent(i * e.spec.ranks_per_stage))) for i, s in enumerate(e.stages.stages)]
    yield ("<h2>Stages</h2><p class='note'>Each stage holds a part of the blocks; patches of the picture follow each "
           "other through the stages.</p><div class='card'>" + _table(
               ("stage", "blocks", ">weights", ">work of a step", ">sent on"), rows) + "</div>")
    yield (f"<h2>{steps} steps of the stages, over time</h2><div class='card'>"
           f"{timeline_svg(e.stages.timeline(steps, flops_per_second, bytes_per_second))}</div>")


def _whole(e: Explanation) -> Iterator[str]:
    yield from _rows("Computed whole, for want of a rule", e.fallbacks)
    if e.replicated:
        share = e.replicated_flops / max(e.local.flops, 1)
        yield from _rows(f"Computed whole by every device: {share:.1%} of its work, the largest first", e.replicated)


def _rows(title: str, rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        yield f"<h2>{escape(title)}</h2><div class='card'>" + _table(
            ("operator", "where", "what", ">times"),
            [(f"<code>{escape(r.node)}</code>", escape(f"{r.module} {r.source}"), escape(r.text), str(r.times))
             for r in rows]) + "</div>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    kinds = [" class='number'" if c.startswith(">") else "" for c in columns]
    head = "".join(f"<th{k}>{c.removeprefix('>')}</th>" for k, c in zip(kinds, columns, strict=True))
    body = "".join(f"<tr>{''.join(f'<td{k}>{cell}</td>' for k, cell in zip(kinds, row, strict=True))}</tr>"
                   for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _bar(who: str, parts: Iterable[tuple[float, str, str]], total: str) -> str:
    inside = "".join(f"<div style='width:{percent:.2f}%;background:{colour}' title='{escape(text)}'></div>"
                     for percent, colour, text in parts)
    return (f"<div class='rank'><span class='who'>{who}</span><div class='bar'>{inside}</div>"
            f"<span class='sum'>{total}</span></div>")


def _keys(keys: Iterable[tuple[str, str]]) -> str:
    return "<div class='note'>" + "".join(
        f"<span class='key' style='background:{colour}'></span>{text}" for colour, text in keys) + "</div>"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else (
        f"{seconds * 1e6:.3g} µs")


