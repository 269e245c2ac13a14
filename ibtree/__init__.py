"""What every process and any client of ibtpo uses: the Tree, its scores, the wire, the client.

Needs grpcio, protobuf and numpy only. The client is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ibtree.messages import Chat, ChatMessage, Prompt
from ibtree.tree import SamplingOptions, Step, Tree, TreeOptions

if TYPE_CHECKING:
    from ibtree.client import AsyncClient, Client

__version__ = "0.1.0"
"""The project's, as in pyproject.toml."""

__all__ = [
    "AsyncClient",
    "Chat",
    "ChatMessage",
    "Client",
    "Prompt",
    "SamplingOptions",
    "Step",
    "Tree",
    "TreeOptions",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from ibtree import client

        return getattr(client, name)
    raise AttributeError(f"module 'ibtree' has no attribute {name!r}")
