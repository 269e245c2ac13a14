"""`ibtpo-server`: parses the command line and runs the server.

SGLang's children re-import this module (they are spawned), so it stays light, and importing
server_ext.engine.cpu first installs the CPU stand-ins there too.
"""

from __future__ import annotations

import logging
import sys

import server_ext.engine.cpu
from ibtree.extras import installed, required

NEEDED = (
    "pydantic_settings", "yaml", "transformers", "grpc_health", "safetensors", "math_verify",
    "pebble", "prometheus_client", "zstandard",
)  # fmt: skip
"""What the server imports, sooner or later, beyond what a client needs."""

ENGINE = ("sglang", "torch")
"""The engine: in the extra `gpu`; on a CPU SGLang goes in by itself."""


def main() -> None:
    """Exits 0 after a signal, 1 or 2 with one line that says what is wrong; with RESTART_STATUS if
    it is to be started again as it was."""
    extra = "server" if all(map(installed, ENGINE)) else "gpu"
    with required("ibtpo-server", extra, (*NEEDED, *ENGINE)):
        _serve(sys.argv[1:])


def _serve(argv: list[str]) -> None:
    from server_ext.config import ServerConfig

    at = argv.index("--") if "--" in argv else len(argv)
    config = ServerConfig.load("ibtpo-server", argv[:at])

    import asyncio

    from ibtree.errors import FieldError
    from server_ext.errors import RESTART_STATUS, RestartNeededError

    try:
        device = server_ext.engine.cpu.resolved_device(config.device)
    except FieldError as error:
        sys.exit(f"ibtpo-server: {error.as_option()}")
    config = config.model_copy(update={"device": device})
    if device == "cpu":  # before anything imports transformers: tokenizers need the stand-ins too
        server_ext.engine.cpu.select()

    from server_ext.app import serve

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    restart = ""
    try:
        with required("ibtpo-server", "cpu" if device == "cpu" else "gpu"):  # SGLang's own imports
            asyncio.run(serve(config, argv[at + 1 :]))
    except FieldError as error:
        sys.exit(f"ibtpo-server: {error.as_option()}")
    except RestartNeededError as error:
        restart = str(error)
    if restart:  # only now: the traceback held the gRPC server, which has to go before gRPC itself
        print(f"ibtpo-server: {restart}", file=sys.stderr, flush=True)
        sys.exit(RESTART_STATUS)


if __name__ == "__main__":
    main()
