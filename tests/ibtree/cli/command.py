"""The `ibtpo` command as a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from tests import ROOT

_MAIN = "from ibtree.cli import main; main()"
_SET = ("IBTPO_", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_", "PYTHON")


class Ended(NamedTuple):
    """Exit code, and what it wrote."""

    code: int
    out: str
    err: str


@asynccontextmanager
async def command(*words: str, **streams: Any) -> AsyncIterator[Process]:
    """Killed at the end if it still runs. `streams` replace the pipes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_SET)}
    environment |= {"COLUMNS": "120", "TERM": "xterm"}
    pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _MAIN, *words, cwd=ROOT, env=environment, **(pipes | streams)
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ended(process: Process, stdin: bytes = b"") -> Ended:
    out, err = await asyncio.wait_for(process.communicate(stdin), 60)
    return Ended(process.returncode, (out or b"").decode(), (err or b"").decode())


async def ibtpo(*words: str, stdin: bytes = b"") -> Ended:
    async with command(*words) as process:
        return await ended(process, stdin)
