"""The backend beside SGLang's torch_native, on SGLang's own pools."""

from __future__ import annotations

from types import SimpleNamespace

import server_ext.engine.cpu  # isort: skip

import numpy as np
import pytest
import torch

server_ext.engine.cpu.select()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from server_ext.attention import backend, kernel, registry
from server_ext.attention.names import ATTENTION_BACKEND

SLOTS, HEADS, KV_HEADS, DIM = 4096, 6, 2, 32


def runner(pool=None, dtype=torch.float32, **more):
    table = ReqToTokenPool(32, 256, "cpu", False)
    pool = pool or MHATokenToKVPool(
        SLOTS, 1, dtype, KV_HEADS, DIM, 2, "cpu", False, enable_alt_stream=False
    )
    return SimpleNamespace(
        **{
            "device": "cpu",
            "req_to_token_pool": table,
            "token_to_kv_pool": pool,
            "use_mla_backend": False,
            "spec_algorithm": SimpleNamespace(is_none=lambda: True),
            **more,
        }
    )


def layer(number=0, **more):
    return RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, number, **more)


class Server:
    """Requests that prefill, decode and branch, run by both backends on the same pools."""

    def __init__(self, the_runner, layers):
        self.layers = layers
        self.pool, self.requests = the_runner.token_to_kv_pool, the_runner.req_to_token_pool
        self.ours = backend.create(the_runner)
        self.theirs = TorchNativeAttnBackend(the_runner)
        self.free = (np.random.default_rng(0).permutation(SLOTS - 1) + 1).tolist()
        self.lengths: dict[int, int] = {}

    def take(self, row: int, new: int) -> list[int]:
        slots = [self.free.pop() for _ in range(new)]
        at = self.lengths.get(row, 0)
        self.requests.req_to_token[row, at : at + new] = torch.tensor(slots, dtype=torch.int32)
        self.lengths[row] = at + new
        return slots

    def branch(self, row: int, of: int, tokens: int) -> None:
        table = self.requests.req_to_token
        table[row, :tokens] = table[of, :tokens]
        self.lengths[row] = tokens

    def forward(self, mode: ForwardMode, new: dict[int, int]) -> None:
        """`new`: tokens of each row. Compares what every layer gives."""
        before = [self.lengths.get(row, 0) for row in new]
        slots = torch.tensor([s for row, n in new.items() for s in self.take(row, n)])
        lengths = torch.tensor([self.lengths[row] for row in new])
        batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=torch.tensor(list(new)),
            seq_lens=lengths,
            out_cache_loc=slots,
            encoder_lens=None,
            extend_seq_lens=torch.tensor(list(new.values()), dtype=torch.int32),
            extend_prefix_lens=torch.tensor(before, dtype=torch.int32),
        )
        self.ours.init_forward_metadata(batch)
        self.theirs.init_forward_metadata(batch)
        for one in self.layers:
            n = len(slots)
            q, k = torch.randn(n, HEADS * DIM), torch.randn(n, KV_HEADS, DIM)
            v = torch.randn(n, KV_HEADS, DIM)
            found = self.ours.forward(q, k, v, one, batch)
            exact = self.theirs.forward(q, k, v, one, batch)
            assert found.shape == exact.shape and found.dtype == exact.dtype
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def lives(server: Server) -> None:
    server.forward(ForwardMode.EXTEND, {1: 60, 2: 5})
    for row in (3, 4, 5):
        server.branch(row, 1, 60)
    server.forward(ForwardMode.EXTEND, {3: 1, 4: 2, 5: 3})
    running = (2, 5, 1, 4, 3)
    for _ in range(3):
        server.forward(ForwardMode.DECODE, dict.fromkeys(running, 1))
    server.branch(6, 4, 61)
    server.forward(ForwardMode.MIXED, {6: 20, **dict.fromkeys(running, 1)})
    for _ in range(2):
        server.forward(ForwardMode.DECODE, dict.fromkeys((*running, 6), 1))
    server.forward(ForwardMode.DECODE, dict.fromkeys((4, 6), 1))


@pytest.mark.parametrize("built", [True, False])
def test_requests_that_branch(monkeypatch, built):
    if not built:
        monkeypatch.setattr(kernel, "library", lambda: None)
    lives(Server(runner(), [layer(0), layer(1, sliding_window_size=40)]))


@pytest.mark.parametrize("built", [True, False])
def test_a_pool_of_windows(monkeypatch, built):
    """Layers with windows have slots of their own; those before the window are given back."""
    if not built:
        monkeypatch.setattr(kernel, "library", lambda: None)
    pool = SWAKVPool(
        SLOTS, SLOTS // 2, 1, torch.float32, KV_HEADS, DIM, [1], [0], "cpu", enable_alt_stream=False
    )
    mapping = torch.cat([torch.randperm(SLOTS + 1) % (SLOTS // 2), torch.tensor([-1])])
    pool.register_mapping(mapping)
    server = Server(runner(pool), [layer(0), layer(1, sliding_window_size=9)])

    def translated(one):  # torch_native reads the pool of windows by the slots of the other
        table = server.requests.req_to_token
        return mapping[table.long()].int() if one.layer_id == 1 else table

    theirs = server.theirs.forward
    table = server.requests

    def forward(q, k, v, one, batch):
        mapped = SimpleNamespace(req_to_token=translated(one))
        server.theirs.req_to_token_pool = mapped
        return theirs(q, k, v, one, batch)

    server.theirs.forward = forward
    assert table is server.ours.req_to_token_pool
    slots = iter(range(1, SLOTS))
    mapping[:-1] = 0

    def take(row: int, new: int) -> list[int]:
        taken = Server.take(server, row, new)
        mapping[taken] = torch.tensor([next(slots) % (SLOTS // 2) for _ in taken])
        return taken

    server.take = take
    lives(server)


def test_a_plan_lasts_until_the_batch_changes(monkeypatch):
    server = Server(runner(), [layer()])
    made: list[int] = []
    forest = backend.forest
    monkeypatch.setattr(backend, "forest", lambda *args: made.append(1) or forest(*args))
    steps = {1: 1, 2: 1, 3: 1}
    server.forward(ForwardMode.EXTEND, {1: 80})
    server.branch(2, 1, 80)
    server.branch(3, 1, 70)
    server.forward(ForwardMode.EXTEND, {2: 1, 3: 4})
    made.clear()
    for _ in range(4):
        server.forward(ForwardMode.DECODE, steps)
    assert len(made) == 1
    server.forward(ForwardMode.EXTEND, {4: 3})
    server.forward(ForwardMode.DECODE, steps)  # the batch is as it was, but there was another
    assert len(made) == 3
    server.forward(ForwardMode.DECODE, steps)
    assert len(made) == 3
    server.forward(ForwardMode.DECODE, {1: 1, 3: 1})
    assert len(made) == 4


def test_slots_that_move_are_seen():
    """Between two steps of the same batch, which beam search does."""
    server = Server(runner(), [layer()])
    server.forward(ForwardMode.EXTEND, {1: 80, 2: 80})
    server.branch(3, 1, 80)
    server.forward(ForwardMode.DECODE, {1: 1, 2: 1, 3: 1})
    table = server.requests.req_to_token
    table[3, :80] = table[2, :80]
    server.forward(ForwardMode.DECODE, {1: 1, 2: 1, 3: 1})


def test_what_it_can_not_do_is_refused():
    speculative = SimpleNamespace(is_none=lambda: False)
    for what, says in [
        ({"device": "cuda"}, "device cuda"),
        ({"use_mla_backend": True}, "MLA"),
        ({"spec_algorithm": speculative}, "speculative"),
    ]:
        with pytest.raises(ValueError, match=f"{ATTENTION_BACKEND}: no .*{says}.*torch_native"):
            backend.create(runner(**what))
    server = Server(runner(), [layer(logit_cap=30.0, logit_capping_method="sigmoid")])
    with pytest.raises(NotImplementedError, match="sigmoid"):
        server.forward(ForwardMode.DECODE, {1: 1})


@pytest.mark.parametrize("target", registry._HOOKS)
def test_a_hook_that_did_not_take_fails_the_start(monkeypatch, target):
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", set(registry._HOOKS) - {target})
    with pytest.raises(RuntimeError, match=f"no hook on {target}"):
        registry._create(runner())
