"""The radix backend `ibtree`, its messages and hooks, as SGLang's scheduler takes them.

SGLang logs and swallows what goes wrong in a plugin, so the factory, which runs in the scheduler,
checks that every hook took, and fails the start-up if one did not.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types

from server_ext.cache.joining import Passes, next_batch, passes_of
from server_ext.cache.names import BACKEND

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


class TreeCacheReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """A message from the server to every rank: trees opened (or renewed) and closed.

    `now_s` and the deadlines (opened: name → deadline_s) are on the sender's clock [s]: ranks
    never look at one of their own. `probes`: prefixes to look up. `reply`: names the answer;
    0 wants none.
    """

    now_s: float
    opened: dict[str, float] = msgspec.field(default_factory=dict)
    closed: list[str] = msgspec.field(default_factory=list)
    probes: list[list[int]] = msgspec.field(default_factory=list)
    reply: int = 0


class TreeCacheReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """The answer of each data-parallel rank: the accounts of the trees closed (asked, cached,
    refilled, protected [tokens]), per probe (tokens cached, of those computed with other weights),
    and the state of the cache. `ranks_agree`: every tensor-parallel rank took the same decisions.
    `prefill_passes`, `joined_requests`: counts of the scheduler since it began (joining.py).
    """

    reply: int
    accounts: list[tuple[int, int, int, int]]
    probes: list[tuple[int, int]]
    open_trees: int
    protected_tokens: int
    evicted_tokens: int
    capacity_tokens: int
    pool_tokens: int
    ranks_agree: bool
    prefill_passes: int
    joined_requests: int


def register() -> None:
    """Registers the backend, its messages and its hooks."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hook_custom_types(TreeCacheReqInput, TreeCacheReqOutput)
    register_radix_cache_backend(BACKEND, _create)
    for method, (hook, when) in _HOOKS.items():
        HookRegistry.register(f"{_SCHEDULER}.{method}", hook, HookType(when))


def _create(context: Any) -> Any:
    """The factory of `--radix-cache-backend ibtree`. Raises RuntimeError if a hook did not take, or
    where the backend does not work."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache
    from sglang.srt.plugins.hook_registry import HookRegistry

    from server_ext.cache.radix import IbTreeCache

    # and those that were registered before this room's (server_ext/plugin.py)
    others = (
        target
        for target, hooks in HookRegistry._hooks.items()
        if any(hook.__module__.startswith("server_ext.") for _, hook, _ in hooks)
    )
    for target in (*(f"{_SCHEDULER}.{method}" for method in _HOOKS), *others):
        if target not in HookRegistry._patched:
            raise RuntimeError(f"radix cache backend {BACKEND}: the hook on {target} did not take")
    refused = {
        "SGLang keeps no prefixes for this model and these arguments": context.disable_radix_cache,
        "sliding windows have a pool of their own; --disable-hybrid-swa-memory puts them into the"
        " whole one": context.is_hybrid_swa,
        "the model has recurrent layers": context.is_hybrid_ssm,
    }
    for why, is_so in refused.items():
        if is_so:
            raise RuntimeError(f"radix cache backend {BACKEND}: {why}")
    return create_unified_radix_cache(context, cache_class=IbTreeCache)


def _take_messages(_: None, scheduler: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from server_ext.cache.radix import IbTreeCache

    def handle(request: TreeCacheReqInput) -> TreeCacheReqOutput | None:
        # looked up now: the cache does not exist yet when the scheduler's messages are set up
        if not isinstance(scheduler.tree_cache, IbTreeCache):
            return None  # the sender waits in vain, and the scheduler lives
        return _handle(scheduler.tree_cache, request, passes_of(scheduler))

    scheduler._request_dispatcher += TypeBasedDispatcher([(TreeCacheReqInput, handle)])


def _weights_changed(_: None, scheduler: Any, **__: Any) -> None:
    from server_ext.cache.radix import IbTreeCache

    if isinstance(scheduler.tree_cache, IbTreeCache):
        scheduler.tree_cache.weights_changed()


_HOOKS = {
    "init_request_dispatcher": (_take_messages, "after"),
    "record_weight_version_change": (_weights_changed, "after"),
    "get_next_batch_to_run": (next_batch, "around"),
}


def _handle(cache: Any, request: TreeCacheReqInput, passes: Passes) -> TreeCacheReqOutput | None:
    trees = cache.trees
    trees.expire(request.now_s)
    for name, deadline_s in request.opened.items():
        trees.open(name, deadline_s)
    accounts = [trees.close(name) for name in request.closed]
    probes = [cache.probe(token_ids) for token_ids in request.probes]
    if not request.reply:
        return None
    return TreeCacheReqOutput(
        reply=request.reply,
        accounts=[(a.asked, a.cached, a.refilled, a.protected) for a in accounts],
        probes=probes,
        open_trees=len(trees),
        protected_tokens=trees.protected_tokens,
        evicted_tokens=trees.evicted_tokens,
        capacity_tokens=trees.capacity_tokens,
        pool_tokens=cache.pool_tokens,
        ranks_agree=cache.ranks_agree(),
        prefill_passes=passes.prefill_passes,
        joined_requests=passes.joined_requests,
    )
