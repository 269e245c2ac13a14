"""The engine port's SGLang side (pinned: 0.5.21)."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from ibtree.tree import Finish
from ibtree.tree.options import SamplingOptions
from server_ext.cache.audit import Score
from server_ext.cache.client import TreeCache
from server_ext.cache.names import BACKEND
from server_ext.engine import cpu
from server_ext.engine.arguments import Resolved, server_arguments
from server_ext.engine.port import Completion
from server_ext.engine.pulse import Pulse
from server_ext.engine.sglang_weights import SglangWeights
from server_ext.engine.switch import Switch
from server_ext.errors import EngineError, EngineRefusedError

if TYPE_CHECKING:
    import torch

_NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
"""Said in every request, so that a folder's generation_config.json changes nothing."""
_SCORING = {"max_new_tokens": 1, "temperature": 1.0, "min_p": 0.0, **_NEUTRAL}
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class SglangEngine:
    """`sgl.Engine` in this process; its scheduler and detokenizer are children.

    Constructing it blocks until the model is loaded. Everything else runs on one event loop.
    """

    backend = BACKEND
    """Name of its radix cache backend; empty: SGLang's own."""

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str,
        drain_timeout_s: float,
        arguments: Sequence[str] | Resolved,
        switch: Literal["interrupt", "drain"] = "interrupt",
    ) -> None:
        """`arguments`: SGLang's own, or what it made of them. `switch`: what weight
        updates do to rollouts in flight (see `paused`)."""
        if device == "cpu":
            cpu.select()
        import sglang as sgl
        from sglang.srt.managers import io_struct

        if not isinstance(arguments, Resolved):
            arguments = Resolved(server_arguments(model, device, dtype, self.backend, arguments))
        values = arguments.values
        if values["dp_size"] > 1:
            # the controller of the ranks loads no plugins: it can not decode our messages, but
            # it can pass on pickles
            os.environ["SGLANG_USE_PICKLE_IPC"] = "1"
            io_struct._USE_PICKLE_IPC = True
        self._engine = sgl.Engine(server_args=arguments.server_args)
        config = self._engine.tokenizer_manager.model_config
        self.context_tokens = int(config.context_len)
        self.dtype = _SAFETENSORS_DTYPES[str(config.dtype).removeprefix("torch.")]
        self._deterministic = bool(values["enable_deterministic_inference"])
        self.trees = self._tree_cache(int(values["dp_size"]))
        port = SglangWeights(self._engine.tokenizer_manager, int(values["tp_size"]))
        self._switch = Switch(port, drain_timeout_s if switch == "drain" else None)
        self._waiting: dict[str, asyncio.Task[Any] | None] = {}
        self._names: dict[str, str] = {}
        """SGLang's names of the requests that are under way, by ours."""
        self._answered = 0
        """Requests that SGLang has answered, ever."""
        self.pulse = Pulse(
            self._progress, self._passes, lambda: not self._switch.gate.is_open, self._one_token
        )

    def _tree_cache(self, ranks: int) -> TreeCache:
        """The server's end of the radix backend, on SGLang's own message queue."""
        from sglang.utils import TypeBasedDispatcher

        from server_ext.cache.plugin import TreeCacheReqInput, TreeCacheReqOutput

        manager = self._engine.tokenizer_manager

        def send(**message: Any) -> None:
            manager._dispatch_to_scheduler(TreeCacheReqInput(**message))

        trees = TreeCache(send, ranks)
        manager._result_dispatcher += TypeBasedDispatcher([(TreeCacheReqOutput, trees.replied)])
        return trees

    async def generate(
        self,
        rid: str,
        token_ids: Sequence[int],
        sampling: SamplingOptions,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Completion:
        """Generates for one request; cancelling the caller aborts it. What weights gave that were
        taken back is thrown away and generated again. Raises EngineError."""
        parameters: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_new_tokens": max_new_tokens,
            "skip_special_tokens": False,
            **_NEUTRAL,
        }
        if self._deterministic:  # else SGLang would sample every rollout with one seed
            parameters["sampling_seed"] = seed
        if sampling.stop or sampling.stop_token_ids:
            parameters |= {
                "stop": list(sampling.stop),
                "stop_token_ids": list(sampling.stop_token_ids),
                "no_stop_trim": True,
            }
        tree, _, _ = rid.rpartition("/")
        attempt = 0
        while True:
            # what SGLang still does for an ended request of the same name hits the next one
            self._names[rid] = name = f"{rid}.{attempt}" if attempt else rid
            try:
                out = await self._ask(name, tree, token_ids, parameters)
            finally:
                del self._names[rid]
            labels = {span["version"] for span in out["meta_info"]["weight_versions"]}
            if self._switch.on_trial(labels):
                async with self._waits(rid):
                    await self._switch.gate.opened()
            if not self._switch.withdrew(labels):
                return _completion(out, len(token_ids))
            attempt += 1

    @asynccontextmanager
    async def _waits(self, rid: str) -> AsyncIterator[None]:
        """The request is not in the engine: to abort it is to cancel who waits for it."""
        self._waiting[rid] = asyncio.current_task()
        try:
            yield
        finally:
            self._waiting.pop(rid, None)

    async def _ask(
        self, rid: str, tree: str, token_ids: Sequence[int], parameters: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Sends a request when the gate is open, to the rank that holds the tree."""
        async with self._waits(rid), self._switch.gate.rollout():
            del self._waiting[rid]
            return await self._send(rid, tree, token_ids, parameters, **more)

    async def _send(
        self, rid: str, tree: str, token_ids: Sequence[int], parameters: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        try:
            out: dict[str, Any] = await self._engine.async_generate(
                input_ids=list(token_ids),
                sampling_params=parameters,
                return_logprob=True,
                rid=rid,
                routed_dp_rank=self.trees.rank(tree),
                **more,
            )
        except ValueError as error:
            raise EngineRefusedError(f"request {rid}: {error}") from error
        except Exception as error:
            if not hasattr(error, "status_code"):
                raise
            # FastAPI's HTTPException: SGLang's way to say that it has no room, or broke
            raise EngineError(f"request {rid}: {error}") from error
        self._answered += 1
        return out

    def generated_tokens(self, rid: str) -> int:
        """Tokens a request under way has generated, as far as SGLang has said: it does so every 50
        or so."""
        state = self._engine.tokenizer_manager.rid_to_state.get(self._names.get(rid, rid))
        return 0 if state is None else len(state.output_ids)

    def _progress(self) -> int | None:
        """Answers and tokens so far, as far as SGLang has said; None while it has no request."""
        states = list(self._engine.tokenizer_manager.rid_to_state.values())
        return self._answered + sum(len(state.output_ids) for state in states) if states else None

    async def _passes(self) -> int:
        return (await self.trees.state()).prefill_passes

    async def _one_token(self) -> None:
        await self._ask(f"pulse-{uuid.uuid4().hex}", "", [0], _SCORING)

    async def most_running(self) -> int:
        """Requests that it runs at once; more would wait in its own queue, in order."""
        states = await self._engine.tokenizer_manager.get_internal_state()
        return sum(int(state["effective_max_running_requests_per_dp"]) for state in states)

    def abort(self, rid: str) -> None:
        """Ends a request early: its `generate` returns what it has, or is cancelled if it still
        waits for a weight update."""
        name = self._names.get(rid, rid)
        if waiting := self._waiting.get(name):
            waiting.cancel()
        else:
            self._engine.tokenizer_manager.abort_request(name)

    async def score(
        self, prefix: Sequence[int], token: int, *, tree: str = "", cold: bool = False
    ) -> Score:
        """Scores `token` after the prefix, at temperature 1, where the tree's prefixes are cached
        or, if `cold`, afresh. Cancelling the caller aborts it. Raises EngineError."""
        rid = f"score-{uuid.uuid4().hex}"
        salt = rid if cold else None
        out = await self._ask(
            rid, tree, prefix, _SCORING, token_ids_logprob=[token], cache_salt=salt
        )
        return _score(out)

    async def try_out(self, prefix: Sequence[int], token: int) -> float:
        """The log-probability of `token` after the prefix, computed afresh at temperature 1 [nats];
        only inside `paused`. Interrupted rollouts go on from here; what they give waits for the end
        of `paused`, and is thrown away if another `load` comes before. Raises EngineError."""
        await self._switch.resume_on_trial()
        rid = f"try-{uuid.uuid4().hex}"
        out = await self._send(rid, "", prefix, _SCORING, token_ids_logprob=[token], cache_salt=rid)
        return _score(out).logprob

    def paused(self) -> AbstractAsyncContextManager[None]:
        """No rollout runs inside, new ones wait: see Switch.paused."""
        return self._switch.paused()

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Swaps weights, all or some; only inside `paused`: see Switch.load. What the radix cache
        holds of other weights can not be hit any more (radix.py) and is evicted when its room is
        needed."""
        await self._switch.load(tensors, version)

    @property
    def broken(self) -> asyncio.Event:
        """Set when only a new process heals the engine."""
        return self._switch.broken

    def shutdown(self) -> None:
        self._engine.shutdown()


def _version(span: dict[str, Any]) -> int:
    return int(span["version"].partition(".")[0])


def _score(out: dict[str, Any]) -> Score:
    meta = out["meta_info"]
    [[(logprob, _, _)]] = meta["output_token_ids_logprobs"]
    [span] = meta["weight_versions"]
    return Score(float(logprob), int(meta["cached_tokens"]), _version(span))


def _completion(out: dict[str, Any], prefix_tokens: int) -> Completion:
    meta = out["meta_info"]
    pairs = meta["output_token_logprobs"]
    reason = (meta["finish_reason"] or {}).get("type")
    versions = [0] * len(pairs)
    for span in meta["weight_versions"]:
        start, end = span["start"], span["end"]
        versions[start:end] = [_version(span)] * (end - start)
    return Completion(
        token_ids=tuple(int(token) for _, token, _ in pairs),
        logprobs=tuple(float(logprob) for logprob, _, _ in pairs),
        versions=tuple(versions),
        finish={"stop": Finish.STOP, "length": Finish.LENGTH}.get(reason or "", Finish.NONE),
        prefix_tokens=prefix_tokens,
        cached_tokens=int(meta.get("cached_tokens", 0)),  # missing: aborted before it began
    )
