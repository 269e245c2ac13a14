"""The port to the inference engine: what the rest of the server needs of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ibtree.options import SamplingOptions
from ibtree.tree import Finish
from server_ext.tree_cache import TreeCache

if TYPE_CHECKING:
    import torch


class EngineError(RuntimeError):
    """The engine refused or lost a request, or an update of its weights."""


class MixedWeightsError(EngineError):
    """An update failed half-way and the old version could not be put back: stop serving."""


class DrainTimeout(EngineError):
    """Rollouts did not end in time for an update; the weights are as they were."""


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
        """Its first tokens."""
        part = slice(length)
        return replace(
            self,
            token_ids=self.token_ids[part],
            logprobs=self.logprobs[part],
            versions=self.versions[part],
        )


@dataclass(frozen=True)
class Score:
    """The log-probability of one token after a prefix [nats], how many tokens of the prefix came
    from the cache, and the weight version that scored."""

    logprob: float
    cached_tokens: int
    version: int


class Engine(Protocol):
    """What the rest of the server needs of an engine."""

    context_tokens: int
    dtype: str
    trees: TreeCache

    async def generate(
        self, rid: str, token_ids: Sequence[int], sampling: SamplingOptions, max_new_tokens: int
    ) -> Completion: ...

    def abort(self, rid: str) -> None: ...

    async def score(
        self, prefix: Sequence[int], token: int, *, tree: str = "", cold: bool = False
    ) -> Score: ...

    def paused(self) -> AbstractAsyncContextManager[None]: ...

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    async def try_out(self, prefix: Sequence[int], token: int) -> float: ...

    def shutdown(self) -> None: ...
