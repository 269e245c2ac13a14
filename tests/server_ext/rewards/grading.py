"""Functions that a grading process can import."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


class OddError(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def misbehaving(how: str, text: str = "", answer: str = "") -> float:
    """Does as it is told; else grades by equality."""
    match how:
        case "hang":
            time.sleep(60)
        case "die":
            os._exit(3)
        case "leave":
            sys.exit(0)
        case "raise":
            raise OddError("odd", "input")
        case "recurse":
            return misbehaving(how)
        case "nan":
            return float("nan")
        case "words":
            return "seven"  # type: ignore[return-value]
        case "two":
            return 2.0
        case "negative":
            return -0.1
        case "refused":
            raise ConnectionRefusedError("nobody listens there")
        case "wrapped":
            try:
                raise TimeoutError("no answer")
            except TimeoutError as error:
                raise OddError("their", "client") from error
        case "handled":
            try:
                Path("/nowhere/at/all").stat()
            except FileNotFoundError:
                raise ValueError("and now the text")  # noqa: B904
    return float(text == answer)


def wrong_once(how: str, met: str) -> float:
    """Goes wrong the first time, as the file `met` tells."""
    if not Path(met).exists():
        Path(met).touch()
        return misbehaving(how)
    return 1.0


def library_is_loaded() -> float:
    return float("math_verify" in sys.modules)


def own_pid() -> float:
    """The process id as a fraction, since a reward is at most 1."""
    return os.getpid() / 2**32
