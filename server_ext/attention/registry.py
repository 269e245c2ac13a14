"""Puts the backend into SGLang's registry, and into the places that go by backends' names."""

from __future__ import annotations

from typing import Any

from server_ext.attention.names import ATTENTION_BACKEND


def add_choice() -> None:
    """Lets SGLang's arguments name the backend."""
    from sglang.srt.arg_groups import choices

    if ATTENTION_BACKEND not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([ATTENTION_BACKEND])


def register() -> None:
    """Called where plugins are loaded, in each of SGLang's processes."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_choice()
    register_attention_backend(ATTENTION_BACKEND)(_create)
    for target, hook in _HOOKS.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _create(runner: Any) -> Any:
    """The factory. Raises RuntimeError if a hook did not take: SGLang only logs that."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for target in _HOOKS:
        if target not in HookRegistry._patched:
            raise RuntimeError(f"attention backend {ATTENTION_BACKEND}: no hook on {target}")
    from server_ext.attention.backend import create

    return create(runner)


def _no_triton(original: Any, backend: str) -> bool:
    return backend != ATTENTION_BACKEND and bool(original(backend))


def _last_slots(original: Any, table: Any, rows: Any, prefix_lengths: Any) -> Any:
    """Of each request's cached prefix; needed with pages of several tokens."""
    from sglang.srt.mem_cache.allocation import attention_backends, get_last_loc_torch

    chosen = get_last_loc_torch if ATTENTION_BACKEND in attention_backends() else original
    return chosen(table, rows, prefix_lengths)


_HOOKS = {
    "sglang.srt.utils.common.support_triton": _no_triton,
    "sglang.srt.mem_cache.allocation.get_last_loc": _last_slots,
}
"""SGLang asks by name which backends run without Triton, which has no CPU."""
