"""The picture of the demo, drawn from a recorded output."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from sandbox.picture import FIRST_LINES, LAST_LINES, MAX_LINES, draw, parse_lines, shorten

OUTPUT = '\r\x1b[K\x1b[2mfilling\x1b[0m\r\x1b[K\x1b[32m3 < 5 & "all" right\x1b[0m\n\nend\n'


def test_the_picture_shows_the_visible_lines_and_loads_nothing_from_other_sites() -> None:
    assert [line.plain for line in parse_lines(OUTPUT)] == ['3 < 5 & "all" right', "", "end"]
    picture = draw(parse_lines(OUTPUT))
    words = "".join(ET.fromstring(picture).itertext()).replace("\xa0", " ")
    assert '3 < 5 & "all" right' in words
    assert "filling" not in words
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    assert "//" not in picture.replace(namespace, "")
    assert "@import" not in picture


def test_a_shortened_output_shows_the_number_of_omitted_lines() -> None:
    lines = parse_lines("".join(f"{n}\n" for n in range(MAX_LINES + 5)))
    kept = [line.plain for line in shorten(lines)]
    assert kept[FIRST_LINES] == f"  [{MAX_LINES + 5 - FIRST_LINES - LAST_LINES} lines omitted]"
    assert (kept[0], kept[-1]) == ("0", str(MAX_LINES + 4))
    assert shorten(lines[:MAX_LINES]) == lines[:MAX_LINES]
