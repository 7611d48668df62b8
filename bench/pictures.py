"""Charts (SVG): seconds of a recount over the size of the shop, and freshness over a day."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.freshness import RECOUNTS_PER_DAY, FreshnessResult, Timeline
from bench.measure import SERVICE, Results, median_run

# Mid-tones, which are readable on white and on black: the background of the page is unknown.
_COLOURS = {"count_only": "#8b95a1", SERVICE: "#2f9e6e", "merge": "#d9822b", "bulk": "#7c83db"}
_TEXT = "#848d97"
_LABELS = {
    "count_only": "count only",
    SERVICE: "this service",
    "merge": "$merge",
    "bulk": "bulk_write",
}

Points = Iterable[tuple[float, float]]


class _Chart:
    """A chart with two linear axes from zero. Each line has its name at its end."""

    _WIDTH, _HEIGHT, _LEFT, _TOP = 560, 260, 50, 40

    def __init__(self, title: str, heading: str, max_x: float, max_y: float) -> None:
        """Draw the axes. `title` is for screen readers, `heading` is above the chart."""
        self._title, self._max_x, self._max_y = title, max_x, max_y
        self._parts: list[str] = []
        self._names: list[float] = []
        self._text(0, 16, "start", heading)
        step = next(s for e in range(-1, 5) for m in (1, 2, 5) if (s := m * 10**e) * 5 >= max_y)
        for n in range(int(max_y / step) + 1):
            level = self._y(n * step)
            line = f'd="M{self._LEFT} {level:.1f}h{self._WIDTH}"'
            self._parts.append(f'<path {line} stroke="{_TEXT}" stroke-opacity=".3"/>')
            self._text(self._LEFT - 8, level + 4, "end", f"{n * step:g}")

    def add_x_label(self, x: float, text: str) -> None:
        """Write text below the horizontal axis."""
        self._text(self._x(x), self._TOP + self._HEIGHT + 20, "middle", text)

    def add_line(self, points: Points, colour: str, *, width: int = 2) -> None:
        corners = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        stroke = f'stroke="{colour}" stroke-width="{width}"'
        if width > 2:
            stroke += ' stroke-opacity=".4"'  # it is behind the other lines
        self._parts.append(f'<polyline points="{corners}" fill="none" {stroke}/>')

    def add_dots(self, points: Points, colour: str) -> None:
        for x, y in points:
            at = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            self._parts.append(f'<circle {at} r="3" fill="{colour}"/>')

    def add_name(self, y: float, text: str, colour: str) -> None:
        """Name the line that ends at this height. Call it for the lowest line first."""
        # Names do not overlap.
        self._names.append(min([self._y(y) + 4, *(other - 15 for other in self._names)]))
        self._text(self._LEFT + self._WIDTH + 8, self._names[-1], "start", text, colour)

    def render(self) -> str:
        size = f"{self._LEFT + self._WIDTH + 110} {self._TOP + self._HEIGHT + 34}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
            'font-family="sans-serif" font-size="13" role="img">\n'
            f"<title>{self._title}</title>\n" + "\n".join(self._parts) + "\n</svg>\n"
        )

    def _x(self, x: float) -> float:
        return self._LEFT + self._WIDTH * x / self._max_x

    def _y(self, y: float) -> float:
        return self._TOP + self._HEIGHT * (1 - y / self._max_y)

    def _text(self, x: float, y: float, anchor: str, text: str, colour: str = _TEXT) -> None:
        at = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}"'
        self._parts.append(f"<text {at}>{text}</text>")


def draw_growth(sizes: Mapping[int, Results]) -> str:
    """Draw the seconds of a recount without changes over the number of orders."""
    largest = max(sizes)
    slowest = max(median_run(runs) for results in sizes.values() for runs in results.values())
    chart = _Chart(
        "Seconds of a recount over the number of orders",
        "Seconds of a recount in which no points have changed",
        largest,
        slowest,
    )
    for size in sizes:
        if size >= largest / 12:
            chart.add_x_label(size, f"{size / 1e6:g} M")
    chart.add_x_label(0, "orders")
    for name in sorted(sizes[largest], key=lambda name: median_run(sizes[largest][name])):
        points = [(size, median_run(runs[name])) for size, runs in sizes.items()]
        chart.add_line(points, _COLOURS[name])
        chart.add_dots(points, _COLOURS[name])
        chart.add_name(median_run(sizes[largest][name]), _LABELS[name], _COLOURS[name])
    return chart.render()


def draw_freshness(result: FreshnessResult) -> str:
    """Draw the points of one customer over the hours."""
    lines = [
        ("expected", result.expected, _COLOURS["count_only"]),
        ("every 2 hours", result.recounts, _COLOURS["merge"]),
        ("live updates", result.live, _COLOURS[SERVICE]),
    ]
    max_points = max(points for _, line, _ in lines for _, points in line.steps)
    chart = _Chart(
        "Points of one customer over a day: expected, with recounts, and with live updates",
        f"A customer's points over a day, measured in {result.seconds} s: "
        f"{result.interval} s represent two hours",
        24,
        max_points,
    )
    for hour in range(0, 25, 24 // RECOUNTS_PER_DAY):
        chart.add_x_label(hour, f"{hour} h")
    ends = []
    for name, line, colour in lines:
        corners = _corners(result, line)
        chart.add_line(corners, colour, width=8 if line is result.expected else 2)
        ends.append((corners[-1][1], name, colour))
    for points, name, colour in sorted(ends, key=lambda end: end[0]):
        chart.add_name(points, name, colour)
    return chart.render()


def _corners(result: FreshnessResult, line: Timeline) -> list[tuple[float, float]]:
    """Return the corners of a step line, up to the end of the day."""
    corners: list[tuple[float, float]] = []
    for seconds, points in line.steps:
        if seconds <= result.seconds:
            hour = result.hours(seconds) if corners else 0.0
            corners += [(hour, corners[-1][1])] if corners else []
            corners.append((hour, points))
    return [*corners, (24.0, corners[-1][1])]
