"""What stages do over time, as a picture inside of a page."""

from __future__ import annotations

from xdit_compile.runtime.pipefusion.schedule import WHOLE, Timeline

WIDE, LANE, LEFT = 1000, 26, 62
PATCHES = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d")
EXACT = "#b8b8b8"


def timeline_svg(timeline: Timeline) -> str:
    """A lane for each stage, in which runs are boxes coloured by patch, with the number of their step."""
    runs = [b for b in timeline.bars if b.kind == "run"]
    scale = (WIDE - LEFT) / max(timeline.seconds, 1e-12)
    zero = min((b.start for b in timeline.bars), default=0.0)
    parts = []
    for stage in range(timeline.stages):
        parts.append(f"<text x='0' y='{stage * LANE + 17}'>stage {stage}</text>")
    for b in runs:
        x, width = LEFT + (b.start - zero) * scale, (b.end - b.start) * scale
        colour = EXACT if b.unit == WHOLE else PATCHES[b.unit % len(PATCHES)]
        what = "whole, exact" if b.unit == WHOLE else f"patch {b.unit}"
        parts.append(f"<rect x='{x:.2f}' y='{b.stage * LANE + 3}' width='{max(width - 0.5, 0.3):.2f}' "
                     f"height='{LANE - 6}' fill='{colour}'><title>step {b.step}, {what}</title></rect>")
        if width > 16:
            parts.append(f"<text x='{x + width / 2:.2f}' y='{b.stage * LANE + 17}' text-anchor='middle' "
                         f"fill='white'>{b.step}</text>")
    units = sorted({b.unit for b in runs if b.unit != WHOLE})
    keys = "".join(f"<span class='key' style='background:{PATCHES[u % len(PATCHES)]}'></span>patch {u}" for u in units)
    if any(b.unit == WHOLE for b in runs):
        keys = f"<span class='key' style='background:{EXACT}'></span>whole, exact" + keys
    return (f"<svg viewBox='0 0 {WIDE} {timeline.stages * LANE}' width='100%' role='img'>{''.join(parts)}</svg>"
            f"<div class='note'>{keys} &middot; numbers are steps; blank is waiting, {timeline.bubble():.1%} of "
            f"the time; in all {timeline.seconds:.3g} s</div>")
