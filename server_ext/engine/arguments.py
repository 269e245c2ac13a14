"""SGLang's server arguments: ours, the operator's after `--`, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibtree.errors import FieldError
from server_ext.attention import registry
from server_ext.engine import cpu


def server_arguments(
    model: str, device: str, dtype: str, backend: str, arguments: Sequence[str]
) -> Any:
    """SGLang's ServerArgs. `backend`: name of the radix cache backend, empty for SGLang's own.

    What the operator passes comes last and wins. Raises FieldError for arguments that SGLang
    rejects, and for those that take the backend away.
    """
    from sglang.srt.server_args import prepare_server_args

    registry.add_choice()  # SGLang loads plugins only after it has read its arguments
    ours = [f"--model-path={model}", f"--dtype={dtype}", "--weight-version=0", "--page-size=1"]
    ours += [f"--radix-cache-backend={backend}"]
    quiet = ["--log-level=error", "--skip-server-warmup"]
    defaults = cpu.SERVER_ARGUMENTS if device == "cpu" else []
    try:
        resolved = prepare_server_args([*ours, *quiet, *defaults, *arguments])
    except SystemExit as error:
        raise FieldError("--", "SGLang rejected its arguments", "sglang's options") from error
    chosen = resolved.radix_cache_backend or ""
    if chosen != backend:
        raise FieldError("--", f"--radix-cache-backend={chosen}", "leave it out: it is ours")
    if backend and resolved.disable_radix_cache:
        problem = "--disable-radix-cache"
        raise FieldError("--", problem, "leave it out: trees are grown on cached prefixes")
    return resolved
