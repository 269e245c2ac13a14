"""One SampleTree call over all its attempts: what is asked, what came, what is left to come."""

from __future__ import annotations

import uuid
from typing import Any

from ibtree.messages import Expansion, Progress, Prompt
from ibtree.tree import Tree
from ibtree.wire import calls
from ibtree.wire.parts import joined


class Sampling:
    """A stream that breaks is followed by another one, which goes on with the same tree where the
    first left off; if the server has lost that tree, it is grown anew."""

    def __init__(self, prompt: Prompt, include_text: bool, tree_only: bool) -> None:
        call_id = uuid.uuid4().hex
        self._call = calls.sample_tree(prompt, include_text, tree_only, call_id)
        self.method = self._call.method
        self.cancel = calls.cancel_tree(call_id)
        """Ends the tree on the server."""
        self._parts: list[bytes] = []
        self.over = False
        """Whether the server has nothing left of it: the tree came, or it failed."""

    def request(self) -> Any:
        """What the next attempt asks."""
        self._parts.clear()
        return self._call.request

    def event(self, message: Any) -> Expansion | Progress | Tree | None:
        """What the message tells; None: nothing yet. Raises FieldError for what can not be."""
        event = self._call.decode(message)
        if isinstance(event, bytes):
            self._parts.append(event)
            return None
        if isinstance(event, Expansion):
            self._call.request.received_expansions = event.trajectories
        self.over = isinstance(event, Tree)
        return event

    def last(self) -> Tree | None:
        """The tree that came in parts, now that the stream has ended; None: it did not. Raises
        FieldError for one that is none."""
        if not self._parts:
            return None
        self.over = True
        return joined(self._parts)
