"""Runs the demo on a pseudo-terminal, and writes its output as a picture: sandbox/demo.svg."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
import tty
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PICTURE = Path(__file__).with_name("demo.svg")
WIDTH = 100  # columns
# Of an output that is longer than MAX_LINES, the picture shows the first and the last lines.
MAX_LINES, FIRST_LINES, LAST_LINES = 45, 17, 27
# Background, text, and black, red, green, yellow, blue, magenta, cyan, white.
_THEME = TerminalTheme(
    (22, 27, 34),
    (215, 221, 228),
    [(22, 27, 34), (255, 123, 114), (86, 211, 100), (227, 179, 65)]
    + [(121, 192, 255), (210, 168, 255), (118, 227, 234), (215, 221, 228)],
)
# With the reader's fonts only: rich's own template loads a font from a web site.
_FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>The output of make demo</title>
<style>{styles}</style>
<defs>{lines}</defs>
<g font-family="ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace" font-size="{char_height}">
{chrome}
<g transform="translate({terminal_x} {terminal_y})">{backgrounds}{matrix}</g>
</g>
</svg>
"""


def record() -> tuple[int, str]:
    """Run the demo; return its exit code and its output on the terminal."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (MAX_LINES, WIDTH))
    tty.setraw(terminal)  # otherwise a carriage return precedes each line feed
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    demo = subprocess.Popen(
        [sys.executable, "-m", "sandbox.demo"],
        cwd=PICTURE.parents[1],
        env=env | {"TERM": "xterm-256color"},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    output = b""
    with suppress(OSError):  # Linux reports an error when the other end is closed
        while part := os.read(controller, 65_536):
            output += part
    os.close(controller)
    return demo.wait(), output.decode()


def parse_lines(output: str) -> list[Text]:
    """Return the lines that are visible at the end. Raises ValueError."""
    # A terminal keeps the rest of a longer line, and rich does not.
    if re.search(r"\r(?!\x1b\[K)", output):
        raise ValueError("a line is overwritten that was not cleared")
    return list(Text.from_ansi(output.rstrip("\n")).split("\n", allow_blank=True))


def shorten(lines: list[Text]) -> list[Text]:
    """Replace the middle of a long output by a line that says so."""
    if len(lines) <= MAX_LINES:
        return lines
    omitted = len(lines) - FIRST_LINES - LAST_LINES
    return [*lines[:FIRST_LINES], Text(f"  [{omitted} lines omitted]", "dim"), *lines[-LAST_LINES:]]


def draw(lines: list[Text]) -> str:
    """Return a picture of the lines, as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(*lines, "", sep="\n", no_wrap=True, overflow="crop")
    return console.export_svg(
        title="make demo", theme=_THEME, code_format=_FORMAT, unique_id="demo"
    )


def main() -> int:
    code, output = record()
    if code:
        print(f"The demo failed with exit code {code}; no picture is written.", file=sys.stderr)
        print(output, file=sys.stderr)
        return 1
    PICTURE.write_text(draw(shorten(parse_lines(output))), encoding="utf-8")
    print(f"{PICTURE} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
