"""Stand-ins without a model: a byte tokenizer, and an engine that writes seeded arithmetic."""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
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
from server_ext.engine.port import Completion
from server_ext.engine.switch import Bucket, Switch, SwitchState
from server_ext.errors import EngineError
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


class FakeWeights:
    """Implements server_ext.engine.switch.WeightPort with SGLang's sessions: one at a time.

    While `half_way` is not set updates hang at the second tensor. Each update takes one entry of
    `faults` (an exception, or None) and raises it there.
    """

    def __init__(self, took: Callable[[str], None]) -> None:
        """`took`: called with the label of what an ended session brought."""
        self.half_way = asyncio.Event()
        self.half_way.set()
        self.faults: deque[Exception | None] = deque()
        self.tensors = dict[str, torch.Tensor]()
        self.open = False
        self._took, self._label = took, ""

    async def pause(self) -> None:
        pass

    async def resume(self) -> None:
        pass

    async def begin(self) -> None:
        if self.open:
            raise EngineError("a weight-update session is already open")
        self.open, self._label = True, ""

    async def load(self, bucket: Bucket, label: str) -> None:
        assert self.open, "outside of a session"
        fault = self.faults.popleft() if self.faults else None
        self._label = ""
        for at, (name, tensor) in enumerate(bucket):
            if at == 1:
                await self.half_way.wait()
                if fault:
                    raise fault
            self.tensors[name] = tensor.clone()
        self._label = label

    async def end(self) -> None:
        if not self.open:
            raise EngineError("no weight-update session is open")
        self.open = False
        if self._label:
            self._took(self._label)


class FakeEngine:
    """Implements server_ext.engine.port.Engine, with the real weight switch; records what it loads.

    `write` makes the text of a rollout from its token ids and number. While `go_on` is not set
    rollouts hang. An update that interrupts finds rollouts half through what is left of them.
    """

    def __init__(self, switch: str = "interrupt", drain_timeout_s: float = 5.0) -> None:
        self.context_tokens, self.dtype = 512, "F32"
        self.write: Callable[[Sequence[int], int], str] = toy_text
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.port = FakeWeights(self._took)
        self.half_way, self.faults = self.port.half_way, self.port.faults
        self.version = 0
        self.rank = FakeRank(capacity_tokens=1_000_000)
        self.trees = self.rank.cache
        self.updates: list[int] = []
        self.running: dict[str, asyncio.Event] = {}
        self.requests: list[str] = []
        self.seeds: list[int] = []
        self.tried: list[int] = []
        """The version of each trial."""
        self._labels = ["0"]
        self._spans: dict[str, list[tuple[float, int]]] = {}
        """Spans of the rollouts in flight: (share of the tokens before each, updates before it)."""
        self.switch = Switch(self.port, drain_timeout_s if switch == "drain" else None)
        self.broken = self.switch.broken

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.port.tensors

    @weights.setter
    def weights(self, tensors: dict[str, torch.Tensor]) -> None:
        self.port.tensors = tensors

    @property
    def updating(self) -> bool:
        return self.port.open

    def _took(self, label: str) -> None:
        self.version = int(label.partition(".")[0])
        self.updates.append(self.version)
        self._labels.append(label)
        for spans in self._spans.values():
            spans.append(((spans[-1][0] + 1) / 2, len(self.updates)))

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
            async with self.switch.gate.rollout():
                aborted = self.running[rid] = asyncio.Event()
                spans = self._spans[rid] = [(0.0, len(self.updates))]
                self.requests.append(rid)
                try:
                    await self._may_go_on(aborted)
                    text = self.write(token_ids, int(number) if number != "prompt" else -1)
                finally:
                    del self.running[rid], self._spans[rid]
            labels = {self._labels[update] for _, update in spans}
            if self.switch.on_trial(labels):
                await self.switch.gate.opened()
            if not self.switch.withdrew(labels):
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
        async with self.switch.gate.rollout():
            return Score(-0.5, 0 if cold else len(prefix) // 2, self.version)

    def abort(self, rid: str) -> None:
        if rid in self.running:  # like SGLang's, which knows no requests that wait at the gate
            self.running[rid].set()

    async def try_out(self, prefix: Sequence[int], token: int) -> float:
        assert self.switch.state is SwitchState.ON_TRIAL
        await self.switch.resume_on_trial()
        self.tried.append(self.version)
        return self.logprob(prefix, token)

    def logprob(self, prefix: Sequence[int], token: int) -> float:
        """A log-probability that the loaded weights decide."""
        total = sum(float(tensor.float().sum()) for tensor in self.weights.values())
        return -(abs(total + len(prefix) + token / 7) % 5.0)

    def paused(self) -> AbstractAsyncContextManager[None]:
        return self.switch.paused()

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        await self.switch.load(tensors, version)

    def shutdown(self) -> None:
        pass
