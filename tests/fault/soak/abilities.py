"""What the client under test can say: the soak says it where it can."""

from __future__ import annotations

from inspect import signature
from typing import Any

from ibtree import messages
from ibtree.client import Client


def run_argument(run: str) -> dict[str, Any]:
    """Asks for the trees of one run alone, if leases know runs."""
    return {"run": run} if "run" in signature(Client.lease_trees).parameters else {}


def bad_argument() -> dict[str, Any]:
    """Says that a tree that is given back is itself at fault, if that can be said."""
    return {"bad": True} if "bad" in signature(Client.nack_trees).parameters else {}


CANCELS = hasattr(Client, "cancel_prompts")
"""Whether prompts can be cancelled."""


def cancel(client: Client, id_: str) -> None:
    """Has the server forget a prompt that is queued or growing."""
    client.cancel_prompts(messages.TreeChoice(ids=(id_,)))  # type: ignore[attr-defined]
