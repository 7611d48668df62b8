"""Charts (SVG): a recount that grows with the shop, and a customer's day."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.day import RECOUNTS, Day, Line
from bench.measure import OURS, Results, middle

# Mid-tones, readable on white and on black: no page tells a picture which of them it is on.
_COLOURS = {"floor": "#8b95a1", OURS: "#2f9e6e", "merge": "#d9822b", "bulk": "#7c83db"}
_TEXT = "#848d97"
_SHORT = {"floor": "floor", OURS: "this service", "merge": "$merge", "bulk": "bulk_write"}

Points = Iterable[tuple[float, float]]


class _Chart:
    """Two linear axes from zero, lines between them, and the name of each at its end."""

    _WIDTH, _HEIGHT, _LEFT, _TOP = 560, 260, 50, 40

    def __init__(self, title: str, heading: str, most_x: float, most_y: float) -> None:
        """Draw the axes: `title` is for who cannot see the picture, `heading` stands above it."""
        self._title, self._most_x, self._most_y = title, most_x, most_y
        self._parts: list[str] = []
        self._names: list[float] = []
        self._text(0, 16, "start", heading)
        step = next(s for e in range(-1, 5) for m in (1, 2, 5) if (s := m * 10**e) * 5 >= most_y)
        for n in range(int(most_y / step) + 1):
            level = self._y(n * step)
            line = f'd="M{self._LEFT} {level:.1f}h{self._WIDTH}"'
            self._parts.append(f'<path {line} stroke="{_TEXT}" stroke-opacity=".3"/>')
            self._text(self._LEFT - 8, level + 4, "end", f"{n * step:g}")

    def mark(self, x: float, words: str) -> None:
        """Put words below the horizontal axis."""
        self._text(self._x(x), self._TOP + self._HEIGHT + 20, "middle", words)

    def line(self, points: Points, colour: str, *, width: int = 2) -> None:
        """Connect points."""
        corners = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        stroke = f'stroke="{colour}" stroke-width="{width}"'
        if width > 2:
            stroke += ' stroke-opacity=".4"'  # what lies behind another line
        self._parts.append(f'<polyline points="{corners}" fill="none" {stroke}/>')

    def dots(self, points: Points, colour: str) -> None:
        for x, y in points:
            at = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            self._parts.append(f'<circle {at} r="3" fill="{colour}"/>')

    def name(self, y: float, words: str, colour: str) -> None:
        """Name the line that ends at this height, from the lowest line to the highest."""
        # Names stay apart.
        self._names.append(min([self._y(y) + 4, *(other - 15 for other in self._names)]))
        self._text(self._LEFT + self._WIDTH + 8, self._names[-1], "start", words, colour)

    def svg(self) -> str:
        size = f"{self._LEFT + self._WIDTH + 110} {self._TOP + self._HEIGHT + 34}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
            'font-family="sans-serif" font-size="13" role="img">\n'
            f"<title>{self._title}</title>\n" + "\n".join(self._parts) + "\n</svg>\n"
        )

    def _x(self, x: float) -> float:
        return self._LEFT + self._WIDTH * x / self._most_x

    def _y(self, y: float) -> float:
        return self._TOP + self._HEIGHT * (1 - y / self._most_y)

    def _text(self, x: float, y: float, anchor: str, words: str, colour: str = _TEXT) -> None:
        at = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}"'
        self._parts.append(f"<text {at}>{words}</text>")


def growth(sizes: Mapping[int, Results]) -> str:
    """Draw seconds over orders: what grows with the orders is straight."""
    most = max(sizes)
    slowest = max(middle(runs) for results in sizes.values() for runs in results.values())
    chart = _Chart(
        "Seconds of a recount over the number of orders",
        "Seconds for a pass in which nothing has changed",
        most,
        slowest,
    )
    for size in sizes:
        if size >= most / 12:
            chart.mark(size, f"{size / 1e6:g} M")
    chart.mark(0, "orders")
    for name in sorted(sizes[most], key=lambda name: middle(sizes[most][name])):
        points = [(size, middle(runs[name])) for size, runs in sizes.items()]
        chart.line(points, _COLOURS[name])
        chart.dots(points, _COLOURS[name])
        chart.name(middle(sizes[most][name]), _SHORT[name], _COLOURS[name])
    return chart.svg()


def day(day: Day) -> str:
    """Draw the points of one customer over the hours."""
    lines = [
        ("the orders", day.right, _COLOURS["floor"]),
        ("every 2 hours", day.record_recount, _COLOURS["merge"]),
        ("live updates", day.live, _COLOURS[OURS]),
    ]
    most = max(points for _, line, _ in lines for _, points in line.steps)
    chart = _Chart(
        "Points of one customer over a day: by the orders, with recounts, and with live updates",
        f"A customer's points over a day, measured in {day.seconds} s: "
        f"{day.interval} s are drawn as two hours",
        24,
        most,
    )
    for hour in range(0, 25, 24 // RECOUNTS):
        chart.mark(hour, f"{hour} h")
    ends = []
    for name, line, colour in lines:
        corners = _corners(day, line)
        chart.line(corners, colour, width=8 if line is day.right else 2)
        ends.append((corners[-1][1], name, colour))
    for points, name, colour in sorted(ends, key=lambda end: end[0]):
        chart.name(points, name, colour)
    return chart.svg()


def _corners(day: Day, line: Line) -> list[tuple[float, float]]:
    """Return the corners of a line that goes in steps, up to the end of the day."""
    corners: list[tuple[float, float]] = []
    for seconds, points in line.steps:
        if seconds <= day.seconds:
            hour = day.hours(seconds) if corners else 0.0
            corners += [(hour, corners[-1][1])] if corners else []
            corners.append((hour, points))
    return [*corners, (24.0, corners[-1][1])]
