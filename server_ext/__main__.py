"""`ibtpo-server`: parses the command line and runs the server.

SGLang's children re-import this module (they are spawned), so it stays light, and importing
server_ext.engine.cpu first installs the CPU stand-ins there too.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

import server_ext.engine.cpu
from ibtree.extras import installed, required

if TYPE_CHECKING:
    from server_ext.config import ServerConfig

NEEDED = (
    "pydantic_settings", "yaml", "transformers", "grpc_health", "safetensors", "math_verify",
    "pebble", "prometheus_client", "zstandard",
)  # fmt: skip
"""What the server imports, sooner or later, beyond what a client needs."""

ENGINE = ("sglang", "torch")
"""The engine: in the extra `gpu`; on a CPU SGLang goes in by itself."""


def main() -> None:
    """Exits 0 after a signal; 1 or 2 with one line that says what is wrong with the settings; 70
    when it broke, and starting it again may help (supervisor.py)."""
    extra = "server" if all(map(installed, ENGINE)) else "gpu"
    with required("ibtpo-server", extra, (*NEEDED, *ENGINE)):
        _serve(sys.argv[1:])


def _serve(argv: list[str]) -> None:
    from server_ext.config import ServerConfig

    at = argv.index("--") if "--" in argv else len(argv)
    config = ServerConfig.load("ibtpo-server", argv[:at])

    from server_ext.supervisor import supervise

    if config.supervise:
        supervise()  # what follows is run by a child, and by the next one if it dies
    problem, status = _run(config, argv[at + 1 :])
    # outside of the error, whose traceback would keep gRPC's server until gRPC itself is gone
    if problem:
        print(f"ibtpo-server: {problem}", file=sys.stderr)
        sys.exit(status)


def _run(config: ServerConfig, sglang_arguments: list[str]) -> tuple[str, int]:
    """Runs the server to its end. Returns what ended it, in one line, with the exit status; empty
    if a signal did."""
    import asyncio

    from ibtree.errors import Fault, FieldError, IbtpoError
    from server_ext.supervisor import CRASHED, REFUSED

    try:
        device = server_ext.engine.cpu.resolved_device(config.device)
        config = config.model_copy(update={"device": device})
        if device == "cpu":  # before anything imports transformers: tokenizers need them too
            server_ext.engine.cpu.select()

        from server_ext import logs
        from server_ext.app import serve

        logs.begin()
        with required("ibtpo-server", "cpu" if device == "cpu" else "gpu"):  # SGLang's own imports
            asyncio.run(serve(config, sglang_arguments))
    except FieldError as error:
        return error.as_option(), REFUSED[0]
    except IbtpoError as error:
        return str(error), REFUSED[0] if error.fault is Fault.CALLER else CRASHED
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}", CRASHED
    return "", 0


if __name__ == "__main__":
    main()
