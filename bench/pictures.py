"""The growth as a picture (SVG)."""

from __future__ import annotations

from collections.abc import Mapping

from bench.measure import OURS, Results, middle

# Mid-tones, readable on white and on black: no page tells a picture which of them it is on.
_COLOURS = {"floor": "#8b95a1", OURS: "#2f9e6e", "merge": "#d9822b", "bulk": "#7c83db"}
_TEXT = "#848d97"
_SHORT = {"floor": "floor", OURS: "this service", "merge": "$merge", "bulk": "bulk_write"}


def chart(sizes: Mapping[int, Results]) -> str:
    """Draw seconds over orders, both linear: what grows with the orders is straight."""
    width, height, left, top = 560, 260, 50, 40
    names = list(next(iter(sizes.values())))
    most = max(sizes)
    slowest = max(middle(runs) for results in sizes.values() for runs in results.values())
    step = next(s for e in range(-1, 5) for m in (1, 2, 5) if (s := m * 10**e) * 5 >= slowest)

    def x(orders: float) -> float:
        return left + width * orders / most

    def y(seconds: float) -> float:
        return top + height * (1 - seconds / slowest)

    def text(x: float, y: float, anchor: str, words: str, colour: str = _TEXT) -> str:
        at = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}"'
        return f"<text {at}>{words}</text>"

    parts = [text(0, 16, "start", "Seconds for a pass in which nothing has changed")]
    for n in range(int(slowest / step) + 1):
        level = y(n * step)
        line = f'<path d="M{left} {level:.1f}h{width}" stroke="{_TEXT}" stroke-opacity=".3"/>'
        parts += [line, text(left - 8, level + 4, "end", f"{n * step:g}")]
    for size in sizes:
        if size >= most / 12:
            parts.append(text(x(size), top + height + 20, "middle", f"{size / 1e6:g} M"))
    parts.append(text(left, top + height + 20, "middle", "orders"))
    used: list[float] = []
    for name in sorted(names, key=lambda name: middle(sizes[most][name])):
        colour, last = _COLOURS[name], y(middle(sizes[most][name]))
        dots = [(x(size), y(middle(results[name]))) for size, results in sizes.items()]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in dots)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in dots]
        used.append(min([last + 4, *(other - 15 for other in used)]))  # labels stay apart
        parts.append(text(left + width + 8, used[-1], "start", _SHORT[name], colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 100} '
        f'{top + height + 34}" font-family="sans-serif" font-size="13" role="img">\n'
        "<title>Seconds of a recount over the number of orders</title>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )
