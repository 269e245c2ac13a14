"""How Python itself keeps out of the event loop's way."""

from __future__ import annotations

import gc
import sys

_SWITCH_S = 0.001
"""How long a thread may keep the interpreter from the loop, once the loop wants it; 5 ms is
Python's own."""


def settle() -> None:
    """Call it when all that lasts as long as the process is built: modules, the vocabulary, the
    engine. Those are a million objects, and a full garbage collection, for which everything stands
    still, looked at each of them: hundreds of milliseconds. Now it looks at what came later."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)
