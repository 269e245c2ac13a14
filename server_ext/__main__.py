"""`ibtpo-server`: parses the command line and runs the server.

SGLang's children re-import this module (they are spawned), so it stays light, and importing
server_ext.engine.cpu first installs the CPU stand-ins there too.
"""

from __future__ import annotations

import logging
import sys

import server_ext.engine.cpu


def main() -> None:
    """Exits 0 after a signal, 2 with one line that names the field for bad settings."""
    from server_ext.config import ServerConfig

    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    config = ServerConfig.load("ibtpo-server", argv[:at])

    import asyncio

    from ibtree.errors import FieldError

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
    try:
        asyncio.run(serve(config, argv[at + 1 :]))
    except FieldError as error:
        sys.exit(f"ibtpo-server: {error.as_option()}")


if __name__ == "__main__":
    main()
