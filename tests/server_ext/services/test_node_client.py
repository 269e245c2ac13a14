"""A client in another language, grpc-js with its defaults, holds a quiet call open.

Needs Node and npm's registry: the packages go into a temporary folder.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server_ext.services import channel, sampling
from tests import ROOT
from tests.server_ext import site as site_module
from tests.server_ext.fakes import until
from tests.server_ext.services.test_long_calls import shortened
from tests.server_ext.site import DEFAULTS, Site

SHORTER = 60
"""How many times shorter the server's clocks run here."""
_PONG_MS = 2000
"""But for this one: a busy machine may take that long to answer a ping."""
PACKAGES = ("@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this machine")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text("{}")
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    try:
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if done.returncode:
        pytest.skip(f"npm has no {' '.join(PACKAGES)}: {done.stderr.strip()[:200]}")
    return folder


async def sampled(packages: Path, site: Site) -> dict[str, Any]:
    """What the client says that it received."""
    script = Path(__file__).with_name("node_client.js")
    process = await asyncio.create_subprocess_exec(
        "node", script, packages, ROOT / "protos", site.target, stdout=asyncio.subprocess.PIPE
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    return dict(json.loads(said))


@pytest.mark.parametrize(
    ("progress_s", "quiet_s"),
    [(sampling._PROGRESS_S, 120), (1000.0 * SHORTER, 600)],
    ids=["with the server's Progress", "with nothing but pings"],
)
async def test_a_quiet_call_stays_open(tmp_path, monkeypatch, packages, progress_s, quiet_s):
    """A tree of some quiet minutes on the server's own clocks, all so many times shorter."""
    options = dict(shortened(channel.SERVER_OPTIONS, SHORTER))
    options["grpc.keepalive_timeout_ms"] = _PONG_MS
    monkeypatch.setattr(site_module, "SERVER_OPTIONS", [*options.items()])
    monkeypatch.setattr(sampling, "_PROGRESS_S", progress_s / SHORTER)
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        growing = asyncio.create_task(sampled(packages, site))
        await until(lambda: len(site.engine.running) == DEFAULTS.init_rollouts)
        await asyncio.sleep(quiet_s / SHORTER)
        assert not growing.done()
        site.engine.go_on.set()
        seen = await asyncio.wait_for(growing, 20)
        assert seen["error"] == "" and seen["tree"] == 1
        assert seen["expansion"] == DEFAULTS.trajectories
        assert len(site.engine.requests) == DEFAULTS.trajectories, "it was not begun anew"
        assert seen["progress"] == pytest.approx(quiet_s / progress_s, abs=4)
