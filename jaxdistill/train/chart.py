"""Line charts as inline SVG: no plotting library, and the page's style sheet gives the colours."""

import html
import itertools
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40
MAX_POINTS = 400  # of a line; more would not be seen at this width
SMOOTHED_FROM = 40  # points; shorter lines are drawn as they are
COLOURS = 8  # series-1 to series-8 in the style sheet; further series begin anew


def line_chart(series: Mapping[str, Points], *, x_label: str = "step") -> str:
    """An SVG element with one line a series, axes, a legend and the values under the pointer.

    Points that are not finite leave a gap. A long, noisy line is drawn faintly, with its moving
    average over a twentieth of the points in full colour.

    Args:
        series: name -> (x, y) points in order of x.
        x_label: what x is.

    >>> line_chart({"ce": [(1, 2.0), (2, 1.5)]}).startswith("<figure")
    True
    """
    drawn = {name: thin(points) for name, points in series.items()}
    finite = [p for points in drawn.values() for p in points if math.isfinite(p[1])]
    if not finite:
        return '<p class="muted">No finite values to draw.</p>'
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    x_ticks = [x for x in ticks(x_low, x_high) if x_low <= x <= x_high]
    y_ticks = ticks(min(y for _, y in finite), max(y for _, y in finite))
    to_x = _Scale((x_low, x_high), (LEFT, WIDTH - RIGHT))
    to_y = _Scale((y_ticks[0], y_ticks[-1]), (HEIGHT - BOTTOM, TOP))
    parts = [_grid(x_ticks, y_ticks, to_x, to_y, x_label)]
    for number, (name, points) in enumerate(drawn.items()):
        parts.append(_line(name, points, number % COLOURS + 1, to_x, to_y))
    legend = "".join(
        f'<span class="key series-{number % COLOURS + 1}">{html.escape(name)}</span>'
        for number, name in enumerate(series)
    )
    return (
        f'<figure><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg></figure>'
    )


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the mean of each of so many equal stretches.

    >>> len(thin([(x, 1.0) for x in range(1000)]))
    334
    """
    size = math.ceil(len(points) / MAX_POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [
        (math.fsum(x for x, _ in s) / len(s), math.fsum(y for _, y in s) / len(s))
        if all(math.isfinite(y) for _, y in s)
        else (s[0][0], math.nan)
        for s in stretches
    ]


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at most `low` to at least `high`.

    >>> ticks(0.3, 9.1)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if low == high:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.99)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def moving_average(points: Points, window: int) -> list[tuple[float, float]]:
    """Centred means over up to `window` points; points that are not finite are left out of them."""
    smooth = []
    for i, (x, _) in enumerate(points):
        around = points[max(0, i - window // 2) : i + window // 2 + 1]
        values = [y for _, y in around if math.isfinite(y)]
        smooth.append((x, math.fsum(values) / len(values) if values else math.nan))
    return smooth


def _variation(points: Points) -> float:
    """How far the line goes up and down in all."""
    values = [y for _, y in points if math.isfinite(y)]
    return math.fsum(abs(b - a) for a, b in itertools.pairwise(values))


class _Scale:
    """A linear map from data to picture coordinates."""

    def __init__(self, domain: tuple[float, float], target: tuple[float, float]) -> None:
        self._low, self._target = domain[0], target
        self._width = domain[1] - domain[0] or 1.0

    def __call__(self, value: float) -> float:
        start, end = self._target
        return round(start + (value - self._low) / self._width * (end - start), 1)


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: _Scale,
    to_y: _Scale,
    x_label: str,
) -> str:
    """Horizontal rules with their values, x values below, and the name of the x axis."""
    parts = []
    for y in y_ticks:
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(y)}" y2="{to_y(y)}"/>'
            f'<text class="tick end" x="{LEFT - 8}" y="{to_y(y) + 4}">{y:g}</text>'
        )
    for x in x_ticks:
        parts.append(
            f'<text class="tick middle" x="{to_x(x)}" y="{HEIGHT - BOTTOM + 17}">{x:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick middle" x="{middle}" y="{HEIGHT - 5}">{html.escape(x_label)}</text>'
    )
    return "".join(parts)


def _line(name: str, points: Points, colour: int, to_x: _Scale, to_y: _Scale) -> str:
    """One series: its line or lines, and a spot on each point that tells its value."""
    smooth = moving_average(points, len(points) // 20)
    noisy = len(points) >= SMOOTHED_FROM and _variation(points) > 3 * _variation(smooth)
    lines = [(points, "line faint"), (smooth, "line")] if noisy else [(points, "line")]
    parts = [f'<path class="{kind}" d="{_path(p, to_x, to_y)}"/>' for p, kind in lines]
    every = max(1, len(points) // 100)
    for x, y in points[::every]:
        if math.isfinite(y):
            parts.append(
                f'<circle class="spot" cx="{to_x(x)}" cy="{to_y(y)}" r="5">'
                f"<title>{html.escape(name)}, {x:g}: {y:.4g}</title></circle>"
            )
    return f'<g class="series-{colour}">{"".join(parts)}</g>'


def _path(points: Points, to_x: _Scale, to_y: _Scale) -> str:
    """SVG path data; a point that is not finite lifts the pen."""
    commands, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if pen_down else 'M'}{to_x(x)} {to_y(y)}")
        pen_down = math.isfinite(y)
    return "".join(commands)
