"""Stand-ins for `verify_math` that a grading process can import."""

from __future__ import annotations

import os
import sys
import time


def misbehaving(completion: str, answer: str, marker: str) -> float:
    """Does what the completion says; right answers are graded without math-verify."""
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise RuntimeError("odd input")
    if completion == "recurse":
        return misbehaving(completion, answer, marker)
    return float(completion == answer)


def library_is_loaded(completion: str, answer: str, marker: str) -> float:
    return float("math_verify" in sys.modules)
