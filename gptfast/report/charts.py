"""Charts as SVG text. Colours are CSS variables with values of their own, so that a chart fits the
page that it stands in, light or dark, and is whole as a file, too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from gptfast.report.spelling import count

WIDTH, HEIGHT = 440, 270
# Of charts with a row for each name.
_WIDE = 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 24, 38
# Points of a line: as many as can be told apart at this width.
_POINTS = 300
# Of the smoothed line over a noisy one: as many points are averaged, weighted exponentially.
_SMOOTHING = 0.92

# A page defines the variables; a file that stands alone takes these.
_STANDALONE = (
    "svg{--ink:#1c1d21;--card:#fff;--muted:#6d7078;--line:#e3e2dc;--ours:#0f766e;--theirs:#b45309}"
    "@media(prefers-color-scheme:dark){svg{--ink:#ececea;--card:#1b1d22;--muted:#9a9da6;--line:#33353c;"
    "--ours:#2dd4bf;--theirs:#fbbf24}}"
)
# How the parts of a chart look; the variables are the page's.
CHART_STYLE = (
    ".chart text{font:11px ui-sans-serif,system-ui,sans-serif;fill:var(--muted);"
    "font-variant-numeric:tabular-nums}"
    ".chart .grid{stroke:var(--line)}.chart .label,.chart .value{fill:var(--ink)}"
    ".chart .curve,.chart .faint{fill:none;stroke:var(--ours);stroke-width:1.8;"
    "stroke-linejoin:round}.chart .faint{stroke-width:.8;opacity:.35}"
    ".chart .dot,.chart circle.end{fill:var(--ours)}"
    ".chart text.end{fill:var(--ink);font-weight:600}"
    ".chart.read text.end:not(.reading){display:none}"
    ".chart line.level{stroke:var(--theirs);stroke-dasharray:4 3}"
    ".chart .bridge{stroke:var(--muted);stroke-width:1.4;opacity:.55}"
    ".chart .ring{fill:var(--card);stroke:var(--theirs);stroke-width:1.8}"
    ".chart text.level{fill:var(--theirs)}"
    ".chart .whole{fill:var(--ours)}.chart .part{fill:var(--muted);opacity:.6}"
)


@dataclass(frozen=True)
class Line:
    """One curve. noisy: drawn thin, with its smoothed self over it."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    noisy: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    y: float
    label: str


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    zero: bool = False,
    focus: bool = False,
    digits: int = 2,
) -> str:
    """An SVG of 440 x 270 units. zero: the vertical axis begins there; focus: it leaves out the
    first fall of a curve, so that the rest has room. Values that are not finite are left out. Text
    is escaped."""
    lines = [_thinned(_finite(line)) for line in lines]
    if focus:
        lines = [_without_first_fall(line) for line in lines]
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y] + [level.y for level in levels]
    x_ticks = ticks(min([0.0, *xs]), max([*xs, 1e-9]), 5)
    y_ticks = ticks(*((0.0 if zero else min(ys), max(ys)) if ys else (0.0, 1.0)), 5)
    frame = _Frame(min([0.0, *xs]), max([*xs, 1e-9]), y_ticks[0], y_ticks[-1])

    parts = _axes(frame, x_ticks, y_ticks, x_label, y_label)
    for level in levels:
        parts += _level(frame, level, lines)
    for line in lines:
        parts += _curve(frame, line, levels, digits)
    return _svg(title, HEIGHT, parts)


def bar_steps(rows: Sequence[tuple[str, float]], *, title: str, unit: str) -> str:
    """A waterfall of (label, value after it): each bar spans from the value before it to its own;
    the first and the last stand on zero."""
    width, left, right = _WIDE, 104, 74
    scale = (width - left - right) / max([value for _, value in rows], default=1.0)
    parts, before = [], 0.0
    for i, (label, value) in enumerate(rows):
        whole = i in (0, len(rows) - 1)
        low, high = (0.0, value) if whole else (min(before, value), max(before, value))
        y, x = 28 * i + 6, left + low * scale
        change = f"{value:.1f} {unit}" if whole else f"{value - before:+.1f}".replace("-", "−")
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 14}" text-anchor="end">{escape(label)}'
            f'</text><rect class="{"whole" if whole else "part"}" x="{x:.1f}" y="{y}" height="19" '
            f'rx="2" width="{max(1.0, (high - low) * scale):.1f}"/>'
            f'<text class="value" x="{left + high * scale + 7:.1f}" y="{y + 14}">{change}</text>'
        )
        before = value
    return _svg(title, 28 * len(rows) + 8, parts, width=width)


def pairs(rows: Sequence[tuple[str, float | None, float]], *, title: str) -> str:
    """For each (label, our value, the reference's) a line with a dot for ours and a ring for
    theirs; ours may be missing."""
    left, right, top = 206, 24, 20
    values = [v for _, *both in rows for v in both if v is not None]
    marks = ticks(min([0.0, *values]), max([0.1, *values]), 5)
    scale = (_WIDE - left - right) / (marks[-1] - marks[0])

    def x(value: float) -> str:
        return f"{left + (value - marks[0]) * scale:.1f}"

    bottom = top + 19 * len(rows)
    parts = [
        f'<line class="grid" x1="{x(m)}" x2="{x(m)}" y1="{top - 6}" y2="{bottom}"/>'
        f'<text x="{x(m)}" y="{top - 10}" text-anchor="middle">{_tick(m)}</text>'
        for m in marks
    ]
    for i, (label, ours, theirs) in enumerate(rows):
        y = top + 19 * i + 8
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(label)}'
            "</text>"
        )
        if ours is not None:
            line = f'x1="{x(ours)}" x2="{x(theirs)}" y1="{y}" y2="{y}"'
            parts.append(f'<line class="bridge" {line}/>')
        parts.append(f'<circle class="ring" cx="{x(theirs)}" cy="{y}" r="4"/>')
        if ours is not None:
            parts.append(f'<circle class="end" cx="{x(ours)}" cy="{y}" r="4.4"/>')
    return _svg(title, bottom + 6, parts, width=_WIDE)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, evenly spaced, the first not above low and the last not below high."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _axes(
    frame: _Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
) -> list[str]:
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>'
        )
    for value in x_ticks:
        if value <= frame.x_high * 1.001:
            x = frame.x(value)
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
                f"{_tick(value)}</text>"
            )
    parts.append(
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}" text-anchor="end">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="0" y="11">{escape(y_label)}</text>'
    )
    return parts


def _level(frame: _Frame, level: Level, lines: Sequence[Line]) -> list[str]:
    """The line, and its name in the middle on the side where no curve is."""
    y, middle = frame.y(level.y), (_LEFT + WIDTH - _RIGHT) / 2
    near = [
        frame.y(value)
        for line in lines
        for x, value in zip(line.x, line.y, strict=True)
        if abs(frame.x(x) - middle) < 80
    ]
    above = not any(y - 20 < value <= y + 1 for value in near)
    return [
        f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="level" x="{middle:.1f}" y="{y - 5 if above else y + 13:.1f}" '
        f'text-anchor="middle">{escape(level.label)}</text>'
    ]


def _curve(frame: _Frame, line: Line, levels: Sequence[Level], digits: int) -> list[str]:
    if not line.x:
        return []
    parts = []
    shown = _smoothed(line.y) if line.noisy else list(line.y)
    if line.noisy:
        parts.append(f'<path class="faint" d="{_path(frame, line.x, line.y)}"/>')
    readings = ";".join(
        f"{frame.x(x):.1f},{frame.y(y):.1f},{count(x)},{y:.{digits}f}"
        for x, y in zip(line.x, shown, strict=True)
    )
    parts.append(
        f'<path class="curve" d="{_path(frame, line.x, shown)}" data-points="{readings}"/>'
    )
    if line.dots and len(line.x) <= 60:
        parts += [
            f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>'
            for x, y in zip(line.x, shown, strict=True)
        ]
    # The last value, by name, where a reader looks for it.
    x, y = frame.x(line.x[-1]), frame.y(shown[-1])
    crossed = any(y - 24 < frame.y(level.y) < y for level in levels)
    above = -9 if y > _TOP + 20 and not crossed else 18
    text = f"{line.label} {shown[-1]:.{digits}f}".strip()
    parts.append(
        f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
        f'<text class="end" x="{min(x, WIDTH - _RIGHT):.1f}" y="{y + above:.1f}" '
        f'text-anchor="end">{escape(text)}</text>'
    )
    return parts


def _path(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    points = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True)]
    return "M" + "L".join(points)


def _finite(line: Line) -> Line:
    kept = [
        (x, y)
        for x, y in zip(line.x, line.y, strict=True)
        if y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    return replace(line, x=[x for x, _ in kept], y=[y for _, y in kept])


def _without_first_fall(line: Line) -> Line:
    """Without the first 4 % of the way, if enough is left to see."""
    if not line.x:
        return line
    begin = line.x[0] + 0.04 * (line.x[-1] - line.x[0])
    kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x >= begin]
    return line if len(kept) < 8 else replace(line, x=[x for x, _ in kept], y=[y for _, y in kept])


def _thinned(line: Line) -> Line:
    """Means of equally many neighbours, so that no more than _POINTS remain; the last stays."""
    size = math.ceil(len(line.x) / _POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.x) - 1, size)
    xs = [math.fsum(line.x[i : i + size]) / len(line.x[i : i + size]) for i in starts]
    ys = [math.fsum(line.y[i : i + size]) / len(line.y[i : i + size]) for i in starts]
    return Line([*xs, line.x[-1]], [*ys, line.y[-1]], line.label, noisy=line.noisy, dots=line.dots)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average, debiased so that it begins at the first value."""
    smooth, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smooth.append(mean / (1 - _SMOOTHING**i))
    return smooth


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return count(value)
    return f"{value:.4g}"


def _svg(title: str, height: float, parts: Sequence[str], *, width: float = WIDTH) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}" class="chart">'
        f"{''.join(parts)}</svg>"
    )


def standalone(svg: str) -> str:
    """The chart as a file of its own: with colours that it otherwise takes from the page."""
    return svg.replace(
        'class="chart">', f'class="chart"><style>{_STANDALONE}{CHART_STYLE}</style>', 1
    )
