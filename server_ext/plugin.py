"""SGLang's plugin entry point (`sglang.srt.plugins`): what the server changes in its processes.

attention/registry.py  the attention backend `ibtree_cpu`
cache/plugin.py        the radix backend `ibtree`, its messages, branches that join decode steps
engine/sampler_cpu.py  sampling without sorting the vocabulary
engine/loading.py      weight updates that fail without ending the scheduler
"""

from __future__ import annotations

from server_ext.attention import registry as attention
from server_ext.cache import plugin as cache
from server_ext.engine import loading, names


def register() -> None:
    """Registers everything; SGLang calls it in every process that may need it, and logs and
    swallows what goes wrong here: the radix backend checks that it did not (cache/plugin.py).

    Raises OtherSglangError, with nothing registered: the start fails, as nobody knows the backend.
    """
    names.check()
    register_sampler()
    loading.register()
    attention.register()
    cache.register()


def register_sampler() -> None:
    """Takes the place of the one sampler that SGLang has for a CPU; on a GPU it is not asked for,
    or passes on to SGLang's."""
    from sglang.srt.layers.sampler import register_sampler_backend

    from server_ext.engine.sampler_cpu import CpuSampler

    register_sampler_backend("pytorch", CpuSampler)
