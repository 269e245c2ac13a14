"""The port to the inference engine: what the rest of the server needs of one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ibtree.tree import Finish
from ibtree.tree.options import SamplingOptions
from server_ext.cache.audit import Score
from server_ext.cache.client import TreeCache

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Completion:
    """What the engine generated for one request; `finish` is NONE if it was aborted.

    `logprobs` are ln softmax(logits / temperature) before top-p and top-k [nats]; `versions` the
    weight version of each token; `cached_tokens` of the `prefix_tokens` came from the radix cache.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish: Finish
    prefix_tokens: int
    cached_tokens: int

    def head(self, length: int) -> Completion:
        """The completion's first tokens."""
        part = slice(length)
        return replace(
            self,
            token_ids=self.token_ids[part],
            logprobs=self.logprobs[part],
            versions=self.versions[part],
        )


class Engine(Protocol):
    """What the rest of the server needs of an engine."""

    context_tokens: int
    dtype: str
    trees: TreeCache

    async def generate(
        self,
        rid: str,
        token_ids: Sequence[int],
        sampling: SamplingOptions,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Completion: ...

    def generated_tokens(self, rid: str) -> int: ...

    def abort(self, rid: str) -> None: ...

    async def score(
        self, prefix: Sequence[int], token: int, *, tree: str = "", cold: bool = False
    ) -> Score: ...

    def paused(self) -> AbstractAsyncContextManager[None]: ...

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    async def try_out(self, prefix: Sequence[int], token: int) -> float: ...

    @property
    def broken(self) -> asyncio.Event: ...

    def shutdown(self) -> None: ...
