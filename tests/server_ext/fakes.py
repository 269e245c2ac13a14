"""Stand-ins without a model: a byte tokenizer, and an engine that writes seeded arithmetic."""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import astuple, fields
from types import SimpleNamespace
from typing import Any

import torch

from ibtree.messages import CacheState, Chat
from ibtree.tree import Finish
from ibtree.tree.options import SamplingOptions
from server_ext.cache.audit import Score
from server_ext.cache.client import TreeCache
from server_ext.cache.open_trees import OpenTrees
from server_ext.capacity.gate import Gate
from server_ext.engine.port import Completion
from server_ext.errors import DrainTimeout, StillBusy
from server_ext.trees.cuts import UNITS, Segmenter, SentenceSegmenter

EOS = 256
# tokens of several characters, and of a part of one
EXTRA = {257: b".\n\n", 258: b"\n\n", 259: b"\n\n\n", 260: b"\xe2\x82", 261: b"\xac\n", 262: b"a\n"}


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Returns as soon as the condition holds; fails the test when it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.002)


class ToyTokenizer:
    """The same methods as server_ext.trees.text.Tokenizer; ids 0 to 255 are bytes."""

    longest_token = 5
    model_vocabulary = 257 + len(EXTRA)

    def __len__(self) -> int:
        return self.model_vocabulary

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        return self.encode("".join(f"[{turn.role}]{turn.content}" for turn in chat.messages))

    def decode(self, token_ids: Sequence[int], *, special: bool = True) -> str:
        eos = b"<eos>" if special else b""
        parts = (eos if i == EOS else EXTRA.get(i) or bytes([i]) for i in token_ids)
        return b"".join(parts).decode(errors="replace")

    def segmenter(self, separators: str | tuple[str, ...], max_step_tokens: int = 0) -> Segmenter:
        return Segmenter(self.decode, separators, None, None, max_step_tokens)

    def unit_segmenters(self, max_step_tokens: int) -> dict[str, Segmenter]:
        units = ("paragraph", "line")
        made = {unit: self.segmenter(UNITS[unit], max_step_tokens) for unit in units}
        sentences = SentenceSegmenter(self.decode, None, None, max_step_tokens)
        return made | {"sentence": sentences}


def toy_text(token_ids: Sequence[int], number: int) -> str:
    """Two steps and an answer; the steps that the prefix holds already are left out."""
    rng = random.Random(zlib.crc32(repr((tuple(token_ids), number)).encode()))
    steps = [f"{rng.randrange(3)}+{rng.randrange(2)}\n\n", f"={rng.randrange(3)}.\n\n"]
    done = ToyTokenizer().decode(token_ids).count("\n\n")
    return "".join([*steps[done:], f"#### {rng.randrange(3)}"])


class FakeRank:
    """The far end of a TreeCache: one rank's open trees, without a cache."""

    def __init__(self, capacity_tokens: int) -> None:
        self.open = OpenTrees(capacity_tokens)
        self.cache = TreeCache(self._take, ranks=1)

    def _take(self, **message: Any) -> None:
        self.open.expire(message["now_s"])
        for name, deadline_s in message.get("opened", {}).items():
            self.open.open(name, deadline_s)
        accounts = [astuple(self.open.close(name)) for name in message.get("closed", [])]
        if reply := message.get("reply"):
            state = {f.name: 0 for f in fields(CacheState)}
            state |= {
                "open_trees": len(self.open),
                "capacity_tokens": self.open.capacity_tokens,
                "ranks_agree": True,
            }
            probes = [(0, 0)] * len(message.get("probes", []))
            answer = SimpleNamespace(reply=reply, accounts=accounts, probes=probes, **state)
            asyncio.get_running_loop().call_soon(self.cache.replied, answer)


class FakeEngine:
    """Implements server_ext.engine.Engine; records what it loads.

    `write` makes the text of a rollout from its token ids and number. While `go_on` is not set
    rollouts hang, while `half_way` is not set updates do. Each update takes one entry of `faults`
    (an exception, or None) and raises it half-way. An update that interrupts finds rollouts half
    through what is left of them.
    """

    def __init__(self, switch: str = "interrupt", drain_timeout_s: float = 5.0) -> None:
        self.context_tokens, self.dtype = 512, "F32"
        self.write: Callable[[Sequence[int], int], str] = toy_text
        self.go_on, self.half_way = asyncio.Event(), asyncio.Event()
        self.go_on.set()
        self.half_way.set()
        self.faults: deque[Exception | None] = deque()
        self.version, self.weights = 0, dict[str, torch.Tensor]()
        self.rank = FakeRank(capacity_tokens=1_000_000)
        self.trees = self.rank.cache
        self.updates: list[int] = []
        self.running: dict[str, asyncio.Event] = {}
        self.requests: list[str] = []
        self.seeds: list[int] = []
        self.updating = False
        self.tried: list[int] = []
        """The version of each trial."""
        self._spans: dict[str, list[tuple[float, int]]] = {}
        """Spans of the rollouts in flight: (share of the tokens before each, updates before it)."""
        self._trial, self._withdrawn = False, set[int]()
        self._gate = Gate()
        self._drain_timeout_s = drain_timeout_s if switch == "drain" else None

    def generated_tokens(self, rid: str) -> int:
        return 3 if rid in self.running else 0

    async def generate(
        self,
        rid: str,
        token_ids: Sequence[int],
        sampling: SamplingOptions,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Completion:
        self.seeds.append(seed)
        assert rid not in self.running
        assert 0 < max_new_tokens < self.context_tokens - len(token_ids)
        number = rid.rsplit("/", 1)[1]
        while True:
            async with self._gate.rollout():
                aborted = self.running[rid] = asyncio.Event()
                spans = self._spans[rid] = [(0.0, len(self.updates))]
                self.requests.append(rid)
                try:
                    await self._may_go_on(aborted)
                    text = self.write(token_ids, int(number) if number != "prompt" else -1)
                finally:
                    del self.running[rid], self._spans[rid]
            if self._trial:
                await self._gate.opened()
            if not self._withdrawn & {update for _, update in spans}:
                break
        out = (*text.encode(), EOS)
        finish = Finish.STOP if len(out) <= max_new_tokens else Finish.LENGTH
        out, finish = (out[:3], Finish.NONE) if aborted.is_set() else (out[:max_new_tokens], finish)
        logprobs = tuple(-((t * 7 + i) % 16) / 16 for i, t in enumerate(out))
        made_by = [[u for at, u in spans if at * len(out) <= i][-1] for i in range(len(out))]
        versions = tuple((0, *self.updates)[update] for update in made_by)
        return Completion(out, logprobs, versions, finish, len(token_ids), len(token_ids) // 2)

    async def _may_go_on(self, aborted: asyncio.Event) -> None:
        waits = {asyncio.ensure_future(event.wait()) for event in (self.go_on, aborted)}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def score(
        self, prefix: Sequence[int], token: int, *, tree: str = "", cold: bool = False
    ) -> Score:
        async with self._gate.rollout():
            return Score(-0.5, 0 if cold else len(prefix) // 2, self.version)

    def abort(self, rid: str) -> None:
        if rid in self.running:  # like SGLang's, which knows no requests that wait at the gate
            self.running[rid].set()

    async def try_out(self, prefix: Sequence[int], token: int) -> float:
        assert not self._gate._open.is_set()
        self.tried.append(self.version)
        return self.logprob(prefix, token)

    def logprob(self, prefix: Sequence[int], token: int) -> float:
        """A log-probability that the loaded weights decide."""
        total = sum(float(tensor.float().sum()) for tensor in self.weights.values())
        return -(abs(total + len(prefix) + token / 7) % 5.0)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        try:
            async with self._gate.update(self._drain_timeout_s):
                assert not self.running or self._drain_timeout_s is None
                try:
                    yield
                finally:
                    self._trial = False
        except StillBusy as error:
            raise DrainTimeout("rollouts did not end") from error

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        assert not self.updating, "two updates at once"
        assert not self._gate._open.is_set()
        self.updating = True
        try:
            fault = self.faults.popleft() if self.faults else None
            for at, (name, tensor) in enumerate(tensors):
                if at == 1:
                    await self.half_way.wait()
                    if fault:
                        raise fault
                self.weights[name] = tensor.clone()
            if self._trial:
                self._withdrawn.add(len(self.updates))
            self._trial = True
            self.version = version
            self.updates.append(version)
            for spans in self._spans.values():
                spans.append(((spans[-1][0] + 1) / 2, len(self.updates)))
        finally:
            self.updating = False

    def shutdown(self) -> None:
        pass
