"""The picture of the demo, drawn from a recorded text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from sandbox.picture import FIRST, LAST, MAX_LINES, draw, seen, shortened

SAID = '\r\x1b[K\x1b[2mfilling\x1b[0m\r\x1b[K\x1b[32m3 < 5 & "all" right\x1b[0m\n\nend\n'


def test_the_picture_shows_what_is_seen_at_the_end_and_asks_for_nothing_from_elsewhere() -> None:
    assert [line.plain for line in seen(SAID)] == ['3 < 5 & "all" right', "", "end"]
    picture = draw(seen(SAID))
    words = "".join(ET.fromstring(picture).itertext()).replace("\xa0", " ")
    assert '3 < 5 & "all" right' in words
    assert "filling" not in words
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    assert "//" not in picture.replace(namespace, "")
    assert "@import" not in picture


def test_what_is_too_long_says_how_much_is_left_out() -> None:
    lines = seen("".join(f"{n}\n" for n in range(MAX_LINES + 5)))
    kept = [line.plain for line in shortened(lines)]
    assert kept[FIRST] == f"  [{MAX_LINES + 5 - FIRST - LAST} lines are left out here]"
    assert (kept[0], kept[-1]) == ("0", str(MAX_LINES + 4))
    assert shortened(lines[:MAX_LINES]) == lines[:MAX_LINES]
