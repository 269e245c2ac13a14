"""Real data that stays outside the repository: tokenizers of large models, GSM8K."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import ROOT

DATA = Path(os.environ.get("IBTPO_TEST_DATA", ROOT.parent / "shared/data"))


def data(name: str) -> Path:
    """A file or folder of it; skips the test where that is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} in IBTPO_TEST_DATA ({DATA})")
    return path
