"""An engine in a process of its own, which answers commands as JSON lines: both ends of it."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent


class ArmProcess:
    """A script of this folder, started with its settings; commands are answered in order."""

    def __init__(
        self,
        script: str,
        settings: Mapping[str, Any],
        log: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        (HERE / "out").mkdir(exist_ok=True)
        self._log = (HERE / "out" / log).open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        self._answer("READY")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._log.close()

    def __call__(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer("RESULT "))

    def _answer(self, word: str) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"an engine ended; see {self._log.name}")


async def answer_commands(make: Callable[[], Any], start: Callable[[Any], Awaitable[None]]) -> None:
    """The process's end: after `start` of the arm made, each line of standard input names one of
    its methods and the arguments, and is answered with what it returns; at the end its engine is
    shut down."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the engine's processes inherit it
    arm = make()
    try:
        await start(arm)
        print("READY", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            result = await getattr(arm, command.pop("do"))(**command)
            print("RESULT " + json.dumps(result), flush=True)
    finally:
        arm.engine.shutdown()
