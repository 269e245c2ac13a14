"""The server's end of the radix backend: opens and closes trees there, asks what they reused."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ibtree.messages import CacheState
from server_ext.cache.open_trees import TreeAccount
from server_ext.errors import NoReplyError

_TTL_S = 600.0
_REPLY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Probe:
    """A prefix in the cache: its cached tokens, and those computed with other weights."""

    cached_tokens: int
    stale_tokens: int


class _Reply(Protocol):
    """One rank's answer (plugin.py)."""

    reply: int
    accounts: list[tuple[int, int, int, int]]
    probes: list[tuple[int, int]]


class TreeCache:
    """The trees that are open, and questions about the cache; for one event loop. `send` passes
    the fields of a message on to every rank, in order.

    A tree that nobody closes (this process died) is released after a while: its deadline travels
    in the messages and is moved by `keep_open`.
    """

    def __init__(self, send: Callable[..., None], ranks: int) -> None:
        self._send, self._ranks = send, ranks
        self._open: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[list[_Reply], asyncio.Future[list[_Reply]]]] = {}

    def open(self, name: str) -> None:
        """The tree's requests have ids `<name>/<number>`; ids that begin so are its own."""
        load = Counter(self._open.values())
        self._open[name] = min(range(self._ranks), key=lambda rank: load[rank])
        now_s = time.monotonic()
        self._send(now_s=now_s, opened={name: now_s + _TTL_S})

    def rank(self, name: str) -> int | None:
        """The data-parallel rank that holds the tree's prefixes; None: any will do."""
        return self._open.get(name) if self._ranks > 1 else None

    async def close(self, name: str) -> TreeAccount:
        """Releases the tree. Raises NoReplyError."""
        self._open.pop(name, None)  # first: `keep_open` would open it again before the answer
        replies = await self._ask(closed=[name])
        return TreeAccount(*map(sum, zip(*(reply.accounts[0] for reply in replies), strict=True)))

    def drop(self, name: str) -> None:
        """Releases the tree without asking what it reused."""
        if self._open.pop(name, None) is not None:
            self._send(now_s=time.monotonic(), closed=[name])

    async def probe(self, prefixes: Sequence[Sequence[int]]) -> list[Probe]:
        """Looks each prefix up, on the rank that has most of it. Raises NoReplyError."""
        replies = await self._ask(probes=[list(prefix) for prefix in prefixes])
        by_prefix = zip(*(reply.probes for reply in replies), strict=True)
        return [
            Probe(max(cached for cached, _ in ranks), sum(stale for _, stale in ranks))
            for ranks in by_prefix
        ]

    async def state(self) -> CacheState:
        """The state of the cache, over all ranks. Raises NoReplyError."""
        replies: list[Any] = await self._ask()
        sums = (
            "open_trees",
            "protected_tokens",
            "evicted_tokens",
            "capacity_tokens",
            "pool_tokens",
            "prefill_passes",
            "joined_requests",
        )
        totals = {field: sum(getattr(reply, field) for reply in replies) for field in sums}
        return CacheState(**totals, ranks_agree=all(reply.ranks_agree for reply in replies))

    def replied(self, reply: _Reply) -> None:
        """One rank answered."""
        if reply.reply not in self._waiting:
            return  # it took too long
        replies, future = self._waiting[reply.reply]
        replies.append(reply)
        if len(replies) == self._ranks and not future.done():
            future.set_result(replies)

    async def keep_open(self) -> None:
        """Renews what is open, for ever."""
        while True:
            await asyncio.sleep(_TTL_S / 4)
            now_s = time.monotonic()
            self._send(now_s=now_s, opened=dict.fromkeys(self._open, now_s + _TTL_S))

    async def _ask(self, **message: Any) -> list[_Reply]:
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = [], future
        try:
            self._send(now_s=time.monotonic(), reply=number, **message)
            return await asyncio.wait_for(future, _REPLY_TIMEOUT_S)
        except TimeoutError as error:
            raise NoReplyError(f"the radix cache did not answer in {_REPLY_TIMEOUT_S} s") from error
        finally:
            del self._waiting[number]
