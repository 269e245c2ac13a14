"""A really full disk (a small tmpfs): leasing and acking go on, a restart comes up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests import ROOT

CHILD = "-m tests.server_ext.queue.disk_child"
SCRIPT = f"""
mount -t tmpfs -o size=48m tmpfs "$1" || exit 1
"$2" {CHILD} "$1" first
"$2" {CHILD} "$1" second
"""


def on_a_small_disk(folder: str) -> list[dict]:
    """What the two processes say, on a tmpfs that nobody else sees. Skips where that is not
    allowed."""
    unshare = shutil.which("unshare")
    if not unshare:
        pytest.skip("there is no unshare(1)")
    own = [unshare, "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace of one's own is allowed here")
    ended = subprocess.run(
        [*own, "sh", "-c", SCRIPT, "sh", folder, sys.executable],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_what_a_full_disk_does(tmp_path):
    first, second = on_a_small_disk(str(tmp_path))
    assert first["stored"] > 40 and first["free"] == 0
    assert first["handed_on"] == first["stored"] // 2
    before, after = first["states"], second["states"]
    before["queued"] = before.pop("growing", 0) + before.get("queued", 0)
    assert after == {state: n for state, n in before.items() if n}
    assert second["handed_on"] == 3 and second["stored"] > 0
