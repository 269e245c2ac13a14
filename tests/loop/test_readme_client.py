"""The README's ten lines of Python run as they stand against a real server."""

from __future__ import annotations

import re
import subprocess
import sys

from tests import ROOT
from tests.engine import Server

README = ROOT / "README.md"


def test_the_client_in_ten_lines(server: Server) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    block = block.replace("127.0.0.1:7300", server.address)
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert sum(line.startswith("Expansion(") for line in lines) == 12
    assert lines[-1].split()[0].isdigit()
