"""Real data that stays outside the repository: tokenizers of large models, GSM8K."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = os.environ.get("IBTPO_TEST_DATA")


def data(name: str) -> Path:
    """A file or folder of it; skips the test where that is absent."""
    if DATA is None:
        pytest.skip(f"{name} is wanted: IBTPO_TEST_DATA names no folder")
    path = Path(DATA, name)
    if not path.exists():
        pytest.skip(f"no {name} in IBTPO_TEST_DATA ({DATA})")
    return path
