"""What the stages of a pipeline did over time, as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xdit_compile.errors import XditError
from xdit_compile.report.picture import figure
from xdit_compile.runtime.pipefusion.schedule import WHOLE, Bar, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES_PER_BAR = 0.2
"""Enough for a step number of two digits, as long as the picture does not become wider than ``WIDEST``."""

NARROWEST, WIDEST = 9.0, 24.0
LANE, HEAD = 0.42, 0.75
"""Inches: the height of a stage, and that of a title with the space above and below it."""

FONT = 7.0
"""The size of step numbers, in points; a digit is about 0.65 times as wide."""

GREY = "#b8b8b8"

def draw(timelines: Mapping[str, Timeline], path: str | os.PathLike[str]) -> None:
    """Write a picture, SVG, PNG or PDF by the name of the file: below each other the timelines, each moved to start at
    zero, with a lane for each stage.

    Bars are runs, coloured by patch, with the number of their step; blank is waiting. The file is there whole or not
    at all, and the same for the same timelines.

    Raises:
        XditError: there is nothing to draw, matplotlib cannot be imported, or the file cannot be written.
    """
    if not timelines:
        raise XditError("no timeline to draw")
    units = sorted({b.unit for t in timelines.values() for b in _runs(t)})
    longest = max(t.seconds for t in timelines.values())
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")) if longest * f >= 1), (1e9, "ns"))
    crowd = max((sum(b.stage == s for b in _runs(t)) for t in timelines.values() for s in range(t.stages)), default=0)
    width = min(max(INCHES_PER_BAR * crowd, NARROWEST), WIDEST)
    heights = [HEAD + LANE * t.stages for t in timelines.values()]
    with figure(width, sum(heights) + 2 * HEAD, Path(path), "the timeline") as made:
        import matplotlib
        from matplotlib.patches import Patch

        shades, last = matplotlib.colormaps["viridis"], max(units[-1], 1) if units else 1
        colours = {u: GREY if u == WHOLE else matplotlib.colors.to_hex(shades(0.15 + 0.8 * u / last)) for u in units}
        parts = made.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for at, (axes, (name, timeline)) in enumerate(zip(parts, timelines.items(), strict=True)):
            _lanes(axes, timeline, colours, factor, at, FONT * 0.65 / 72 * (longest * factor) / width)
            axes.set_title(f"{name}: {timeline.seconds * factor:.4g} {unit}, bubble {timeline.bubble():.1%}",
                           loc="left", fontsize=10, parse_math=False)
        parts[-1].set_xlim(0, longest * factor)
        parts[-1].set_xlabel(f"time ({unit})")
        keys = [Patch(color=c, label="whole" if u == WHOLE else f"patch {u}") for u, c in colours.items()]
        keys.append(Patch(facecolor="white", edgecolor=GREY, label="waiting"))
        made.legend(handles=keys, loc="outside lower left", ncols=10, frameon=False, fontsize=8)


def _runs(timeline: Timeline) -> Iterator[Bar]:
    return (b for b in timeline.bars if b.kind == "run")


def _lanes(axes: Axes, timeline: Timeline, colours: Mapping[int, str], factor: float, at: int, digit: float) -> None:
    """One timeline; ``digit`` is the width of a digit on its time axis."""
    zero = min((b.start for b in timeline.bars), default=0.0)
    for stage in range(timeline.stages):
        bars = [b for b in _runs(timeline) if b.stage == stage]
        spans = [((b.start - zero) * factor, (b.end - b.start) * factor) for b in bars]
        lane = axes.broken_barh(spans, (stage - 0.4, 0.8), facecolors=[colours[b.unit] for b in bars],
                                edgecolors="white", linewidths=0.4)
        lane.set_gid(f"timeline-{at}-stage-{stage}")
        for bar, (start, length) in zip(bars, spans, strict=True):
            if digit * (len(str(bar.step)) + 0.5) <= length:
                axes.text(start + length / 2, stage, str(bar.step), ha="center", va="center", fontsize=FONT,
                          color=_ink(colours[bar.unit]), clip_on=True)
    axes.set_yticks(range(timeline.stages), [f"stage {s}" for s in range(timeline.stages)], fontsize=8)
    axes.set_ylim(timeline.stages - 0.5, -0.5)
    axes.tick_params(axis="x", labelbottom=True, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _ink(colour: str) -> str:
    """Black on light colours, white on dark ones (luma of Rec. 601)."""
    red, green, blue = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
