"""Held-out evaluations of a run: the same core as `ibtpo eval`, at the weights that are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ibtree.data.questions import Question
from ibtree.evaluation.accuracy import Accuracy
from ibtree.evaluation.run import evaluate_async
from ibtree.messages import Prompt
from learner.config import LearnerConfig
from learner.errors import writing
from learner.io.leases import asked_options

_TICK_S, _LINE_S = 0.5, 10.0
_OWN = ("temperature", "top_p", "top_k", "max_new_tokens")


def eval_options(config: LearnerConfig) -> dict[str, Any]:
    """How held-out problems are sampled: as trees are, but for what evaluations have of their
    own."""
    own = {name: getattr(config, f"eval_{name}") for name in _OWN}
    return asked_options(config) | {name: v for name, v in own.items() if v is not None}


def evaluate_held_out(
    config: LearnerConfig,
    questions: Sequence[Question],
    step: int,
    say: Callable[[str], None],
    keep_alive: Callable[[], None],
    stop: Sequence[int],
) -> Accuracy | None:
    """The accuracy at a step; None if `stop` grew meanwhile. What is finished stays in
    eval/step-N.jsonl, where a run that was killed goes on. `say` gets a line every 10 s, and
    `keep_alive` is called all the while.

    Raises RpcFailed for a server that stays away, WriteError, FieldError.
    """
    prompts = [Prompt(q.prompt, "", q.answer, config.grader) for q in questions]
    told = _Told(step, say)
    evaluation = evaluate_async(
        config.server,
        prompts,
        eval_options(config),
        samples=config.eval_samples,
        seed=config.seed,
        resume=config.out_dir / "eval" / f"step-{step}.jsonl",
        progress=told.progress,
        tell=told.line,
        timeout_s=config.patience_s,
        patience_s=config.patience_s,
        wait=True,
    )
    with writing("the evaluation", config.out_dir):
        return asyncio.run(_watched(evaluation, partial(_tick, told, keep_alive), stop))


class _Told:
    """What is said of an evaluation while it runs."""

    def __init__(self, step: int, say: Callable[[str], None]) -> None:
        self._step, self._say = step, say
        self._done, self._total = 0, 0
        self._last = time.monotonic()

    def progress(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def line(self, text: str) -> None:
        self._say(f"step {self._step}  held-out: {text}")

    def when_due(self) -> None:
        if time.monotonic() - self._last >= _LINE_S:
            self._last = time.monotonic()
            self.line(f"{self._done} of {self._total} problems")


def _tick(told: _Told, keep_alive: Callable[[], None]) -> None:
    told.when_due()
    keep_alive()


async def _watched(
    evaluation: Coroutine[Any, Any, Accuracy], tick: Callable[[], None], stop: Sequence[int]
) -> Accuracy | None:
    """The evaluation's result; `tick` is called on a thread. None if `stop` grew."""
    task = asyncio.ensure_future(evaluation)
    try:
        while not task.done() and not stop:
            await asyncio.wait({task}, timeout=_TICK_S)
            await asyncio.to_thread(tick)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
