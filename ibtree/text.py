"""Text from anywhere, made fit for a terminal and for a log of one line an entry."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text on one line, with everything that could steer a terminal escaped: "\n", "\x1b"."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
