"""The server's own log lines."""

from __future__ import annotations

import logging

from ibtpo_settings.logs import log_to_stderr


def begin() -> None:
    """Warnings and what the server does go to stderr. Call it again after SGLang has read its
    arguments or started: both take the root logger for themselves, at its level of errors."""
    log_to_stderr(nowhere_else=True)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    for name in ("httpx", "httpcore"):  # the reward service's, a line a call
        logging.getLogger(name).setLevel(logging.WARNING)
