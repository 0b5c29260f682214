"""Charts as inline SVG, coloured by the page's CSS (classes s0, s1, ... for series; axis, grid, mark)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 36


@dataclass(frozen=True)
class Line:
    """A curve; `style` is its CSS class."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "s0"
    filled: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x, with a tooltip."""

    x: float
    title: str
    style: str = "mark"


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; logarithmic or linear."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float) -> list[float]:
    """Four to eight round values."""
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade; only the decades where there are many; evenly spaced values where there is hardly one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    inside = [m * 10.0**d for d in decades for m in steps if low * 0.999 <= m * 10.0**d <= high * 1.001]
    return inside if len(inside) > 1 else linear_ticks(low, high)


def short(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    log_x: bool = False,
    y_max: float | None = None,
    x_max: float | None = None,
) -> str:
    """Curves over shared axes; y starts at 0. A chart without points says so."""
    xs = [v for line in lines for v in line.x]
    if not xs:
        return '<p class="none">no samples</p>'
    ys = [v for line in lines for v in line.y]
    positive = [v for v in xs if v > 0] or [1.0]
    low = min(positive) if log_x else 0.0
    high = x_max or max(xs + [m.x for m in marks])
    if log_x:
        low, high = low / 1.03, max(high * 1.03, low * 1.5)
    x = Axis(low, high or 1.0, LEFT, WIDTH - RIGHT, log_x)
    y = Axis(0.0, y_max or (max(ys) * 1.06 or 1.0), HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{short(tick)}</text>'
        )
    for mark in marks:
        at = x.at(mark.x)
        title = f"<title>{escape(mark.title)}</title>"
        edge = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line class="{mark.style}" x1="{at:.1f}" x2="{at:.1f}" {edge}>{title}</line>')
    for line in lines:
        points = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(line.x, line.y, strict=True))
        if line.filled:
            floor = f"{HEIGHT - BOTTOM:.1f}"
            outline = f"{x.at(line.x[0]):.1f},{floor} {points} {x.at(line.x[-1]):.1f},{floor}"
            parts.append(f'<polygon class="fill {line.style}" points="{outline}"/>')
        parts.append(
            f'<polyline class="line {line.style}" points="{points}"><title>{escape(line.label)}</title></polyline>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    turn = f'transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text class="label" {turn} text-anchor="middle">{escape(y_label)}</text></svg>')
    return "".join(parts)


def bars(rows: Sequence[tuple[str, float, float | None, str]], unit: str, full: float | None = None) -> str:
    """Horizontal bars: (name, length, whisker's end or None, text at the right). `full` is the scale's end."""
    if not rows:
        return '<p class="none">no samples</p>'
    top = full or max(max(value, whisker or 0.0) for _, value, whisker, _ in rows) or 1.0
    left, right, step = 140, 100, 22
    height = step * len(rows) + 24
    x = Axis(0.0, top, left, WIDTH - right)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(unit)} by adapter">']
    for i, (name, value, whisker, text) in enumerate(rows):
        y = i * step + 4
        shown = name if len(name) <= 18 else f"{name[:12]}…{name[-5:]}"
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(shown)}')
        parts.append(f"<title>{escape(name)}</title></text>")
        parts.append(
            f'<rect class="bar" x="{left}" y="{y}" width="{x.at(value) - left:.1f}" height="{step - 6}" rx="2"/>'
        )
        if whisker is not None:
            parts.append(
                f'<line class="whisker" x1="{x.at(value):.1f}" x2="{x.at(whisker):.1f}" y1="{y + 8}" y2="{y + 8}"/>'
            )
            parts.append(
                f'<line class="whisker" x1="{x.at(whisker):.1f}" x2="{x.at(whisker):.1f}" y1="{y + 3}" y2="{y + 13}"/>'
            )
        parts.append(f'<text class="value" x="{WIDTH - right + 8}" y="{y + 12}">{escape(text)}</text>')
    parts.append(f'<text class="label" x="{left}" y="{height - 4}">{escape(unit)}</text></svg>')
    return "".join(parts)
