"""A log entry is one line, whatever is in it."""

from __future__ import annotations

import io
import logging

from ibtpo_settings.logs import OneLine


def logged(message: str, *arguments: object, error: Exception | None = None) -> list[str]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning(message, *arguments, exc_info=error)
    return stream.getvalue().splitlines()


def test_an_id_can_neither_forge_an_entry_nor_steer_a_terminal():
    lines = logged("tree %s failed", "a\nERROR forged\r\x1b[2J\u2028")
    assert lines == [r"WARNING tree a\nERROR forged\r\x1b[2J\u2028 failed"]
    assert lines[0].isprintable()


def test_a_traceback_keeps_its_lines_and_its_message_stays_inside():
    try:
        raise ValueError("first\nERROR forged\x1b[2J")
    except ValueError as error:
        lines = logged("failed", error=error)
    assert lines[0] == "WARNING failed" and len(lines) > 4
    assert all(line.startswith("  ") and line.isprintable() for line in lines[1:])
