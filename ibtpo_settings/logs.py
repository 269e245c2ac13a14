"""The daemons' log: one line an entry, whatever ids and reasons hold."""

from __future__ import annotations

import logging

from ibtree.text import printable


class OneLine(logging.Formatter):
    """Escapes what could begin another entry or steer a terminal; a traceback keeps its lines, each
    of them escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join(f"  {printable(line)}" for line in lines)


def log_to_stderr(*, nowhere_else: bool = False) -> None:
    """Logs from INFO on; with `nowhere_else` other handlers of the root logger go."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=nowhere_else)
