"""The demo as a picture: runs it on a terminal of its own, and writes sandbox/demo.svg."""

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
# Of a demo that prints more than this, its first lines and its last.
MAX_LINES, FIRST, LAST = 45, 17, 27
# Background, text, and black, red, green, yellow, blue, magenta, cyan, white.
_THEME = TerminalTheme(
    (22, 27, 34),
    (215, 221, 228),
    [(22, 27, 34), (255, 123, 114), (86, 211, 100), (227, 179, 65)]
    + [(121, 192, 255), (210, 168, 255), (118, 227, 234), (215, 221, 228)],
)
# With none but the reader's own fonts, unlike rich's template, which loads one from elsewhere.
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
    """Run the demo; return its exit code, and all that it sent to its terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (MAX_LINES, WIDTH))
    tty.setraw(theirs)  # or each line feed would bring a carriage return
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    demo = subprocess.Popen(
        [sys.executable, "-m", "sandbox.demo"],
        cwd=PICTURE.parents[1],
        env=env | {"TERM": "xterm-256color"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    with suppress(OSError):  # what Linux says once nobody has the other end
        while part := os.read(ours, 65_536):
            said += part
    os.close(ours)
    return demo.wait(), said.decode()


def seen(said: str) -> list[Text]:
    """Return the lines that a person sees at the end."""
    # A terminal would leave the rest of a longer line, and rich would not.
    if re.search(r"\r(?!\x1b\[K)", said):
        raise ValueError("a line is written over that was not cleared before")
    return list(Text.from_ansi(said.rstrip("\n")).split("\n", allow_blank=True))


def shortened(lines: list[Text]) -> list[Text]:
    """Leave out the middle of what is too long, and say so."""
    if len(lines) <= MAX_LINES:
        return lines
    left_out = len(lines) - FIRST - LAST
    return [*lines[:FIRST], Text(f"  [{left_out} lines are left out here]", "dim"), *lines[-LAST:]]


def draw(lines: list[Text]) -> str:
    """Return a picture of these lines, as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(*lines, "", sep="\n", no_wrap=True, overflow="crop")
    return console.export_svg(
        title="make demo", theme=_THEME, code_format=_FORMAT, unique_id="demo"
    )


def main() -> int:
    code, said = record()
    if code:
        print(f"The demo failed with exit code {code}; no picture is written.", file=sys.stderr)
        print(said, file=sys.stderr)
        return 1
    PICTURE.write_text(draw(shortened(seen(said))), encoding="utf-8")
    print(f"{PICTURE} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
