"""The plugin's own checks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import tests.server_ext.cache.scheduler  # noqa: F401  prepares sglang for the CPU
from server_ext.cache import plugin


@pytest.mark.parametrize("method", plugin._HOOKS)
def test_a_hook_that_did_not_take_fails_the_start(monkeypatch, method):
    from sglang.srt.plugins.hook_registry import HookRegistry

    took = {f"{plugin._SCHEDULER}.{name}" for name in plugin._HOOKS}
    monkeypatch.setattr(HookRegistry, "_patched", took - {f"{plugin._SCHEDULER}.{method}"})
    with pytest.raises(RuntimeError, match=f"hook on .*{method} did not take"):
        plugin._create(SimpleNamespace(disable_radix_cache=False))


def test_messages_survive_the_wire():
    from sglang.srt.managers.io_struct import hook_custom_types, msgpack_decode, msgpack_encode

    hook_custom_types(plugin.TreeCacheReqInput, plugin.TreeCacheReqOutput)
    message = plugin.TreeCacheReqInput(
        now_s=1.5, opened={"a/1": 2.5}, closed=["b"], probes=[[1, 2]], reply=3
    )
    assert msgpack_decode(msgpack_encode(message)) == message


@pytest.mark.parametrize(
    ("fact", "says"),
    [
        ("disable_radix_cache", "keeps no prefixes"),
        ("is_hybrid_swa", "--disable-hybrid-swa-memory"),
        ("is_hybrid_ssm", "recurrent"),
    ],
)
def test_where_the_backend_does_not_work_the_start_fails(monkeypatch, fact, says):
    """With SGLang's own cache in its place the first message would kill the scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    took = {f"{plugin._SCHEDULER}.{name}" for name in plugin._HOOKS}
    monkeypatch.setattr(HookRegistry, "_patched", took)
    monkeypatch.setattr(HookRegistry, "_hooks", {})  # those of other rooms
    facts = dict.fromkeys(("disable_radix_cache", "is_hybrid_swa", "is_hybrid_ssm"), False)
    with pytest.raises(RuntimeError, match=says):
        plugin._create(SimpleNamespace(**facts | {fact: True}))


def test_another_cache_does_not_kill_the_scheduler():
    class Dispatcher(list):
        def __iadd__(self, other):
            self.append(other)
            return self

    scheduler = SimpleNamespace(tree_cache=object(), _request_dispatcher=Dispatcher())
    plugin._take_messages(None, scheduler)
    (ours,) = scheduler._request_dispatcher
    assert ours(plugin.TreeCacheReqInput(now_s=1.0, reply=3)) is None
