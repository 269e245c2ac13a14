"""An evaluation through a server: every problem once, whatever happens to the server meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ibtree.client import AsyncClient, RpcFailed
from ibtree.errors import FieldError, IbtpoError
from ibtree.evaluation.accuracy import Accuracy, Outcome, accuracy_of
from ibtree.evaluation.problems import FinishedProblems, Problem, problems_of
from ibtree.messages import Prompt
from ibtree.tree import Finish, Tree

IN_FLIGHT = 64
_AWAY = ("UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED")
"""Statuses of a server that stops, is away or starts, or has no room."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_CALL_PATIENCE_S = 3.0
"""How long one call waits for a server that is away; then the sweep knows, and asks again."""
_log = logging.getLogger(__name__)


async def evaluate_async(
    target: str,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    *,
    samples: int = 1,
    seed: int | None = None,
    resume: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = _log.warning,
    timeout_s: float = 3600.0,
    patience_s: float = 300.0,
    wait: bool = False,
) -> Accuracy:
    """The accuracy on the prompts with `samples` rollouts each, sampled as `options` say (names of
    TreeOptions and SamplingOptions, whose shape is not used; the rest is the server's).

    A problem that fails, or takes longer than `timeout_s`, is counted apart. A server that is away
    is asked again after growing pauses; it must answer at the start (`wait`: within `patience_s`).
    Finished problems are kept in the file `resume`, and those in it are not asked again.
    `progress` is told how many of how many are done, `tell` gets what is worth a line.

    Raises FieldError for options that are not allowed, RpcFailed when the server stays away for
    `patience_s` or all problems fail, OSError if `resume` cannot be written.
    """
    if not prompts:
        raise FieldError("prompts", "none", "at least one")
    began = time.monotonic()
    async with AsyncClient(target, patience_s=min(patience_s, _CALL_PATIENCE_S)) as client:
        served = await client.get_weights(timeout_s=patience_s if wait else None, wait=wait)
        weights = f"{served.model_id}/{served.digest.hex()}"
        problems = problems_of(prompts, options, samples, seed, weights)
        with FinishedProblems(resume) as finished:
            sweep = _Sweep(client, finished, samples, served.version, timeout_s, patience_s)
            await sweep.run(problems, progress)
    if sweep.resumed:
        tell(f"{sweep.resumed} of {len(problems)} problems were finished before, in {resume}")
    if not sweep.outcomes:
        raise sweep.failures[0]
    versions = {version for outcome in sweep.outcomes for version in outcome.versions}
    if len(versions) > 1:
        tell(f"the weights changed meanwhile: versions {min(versions)} to {max(versions)}")
    failures = [str(error) for error in sweep.failures]
    return accuracy_of(sweep.outcomes, samples, failures, time.monotonic() - began)


def evaluate(
    target: str, prompts: Sequence[Prompt], options: Mapping[str, Any], **choices: Any
) -> Accuracy:
    """The accuracy as `evaluate_async` finds it, for a caller without an event loop."""
    return asyncio.run(evaluate_async(target, prompts, options, **choices))


class _Sweep:
    """Goes through the problems, IN_FLIGHT at a time."""

    def __init__(
        self,
        client: AsyncClient,
        finished: FinishedProblems,
        samples: int,
        version: int,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self._client, self._finished = client, finished
        self._samples, self._version = samples, version
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._last_success = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.failures: list[IbtpoError] = []
        self.resumed = 0

    async def run(self, problems: Sequence[Problem], progress: Callable[[int, int], None]) -> None:
        """Raises RpcFailed for a server that stays away, OSError."""
        waiting = []
        for problem in problems:
            outcome = self._finished.of(problem)
            if outcome is None:
                waiting.append(problem)
            else:
                self.outcomes.append(outcome)
        self.resumed = len(self.outcomes)

        def done() -> None:
            progress(len(self.outcomes) + len(self.failures), len(problems))

        done()
        queue = iter(waiting)
        workers = [asyncio.create_task(self._work(queue, done)) for _ in range(IN_FLIGHT)]
        try:
            # not `gather`: cancelled, it goes on at the first worker's end; another cancellation
            # then meets the others while they tell the server that nobody wants their trees
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for worker in workers:
                worker.cancel()
            results = await asyncio.gather(*workers, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _work(self, queue: Iterator[Problem], done: Callable[[], None]) -> None:
        for problem in queue:
            try:
                outcome = await self._outcome(problem)
            except _ProblemFailed as failed:
                self.failures.append(failed.cause)
            else:
                self.outcomes.append(outcome)
                self._last_success = time.monotonic()
                if outcome.versions == (self._version, self._version):
                    self._finished.add(problem, outcome)
            done()

    async def _outcome(self, problem: Problem) -> Outcome:
        """Raises _ProblemFailed, or RpcFailed if no other problem got through either."""
        pause_s, since = _FIRST_PAUSE_S, None
        while True:
            try:
                tree = await self._client.sample_tree(problem.prompt, timeout_s=self._timeout_s)
                return _graded(tree, self._samples)
            except RpcFailed as error:
                since = since or time.monotonic()
                if error.status not in _AWAY:
                    raise _ProblemFailed(error) from error
                if time.monotonic() - since > self._patience_s:
                    if self._last_success > since:  # it is not the server
                        raise _ProblemFailed(error) from error
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _ProblemFailed(Exception):
    """This problem fails; the others go on."""

    def __init__(self, cause: IbtpoError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _graded(tree: Tree, samples: int) -> Outcome:
    """Raises _ProblemFailed if rollouts are missing."""
    if tree.trajectories != samples:
        problem = f"{tree.trajectories} of {samples} rollouts finished ({tree.stop_cause.name})"
        allowed = "what the server's limits of a tree let through"
        raise _ProblemFailed(FieldError("samples", problem, allowed))
    cut_off = [finish is Finish.LENGTH for finish in tree.finishes]
    versions = [version for step in tree.steps for version in step.versions]
    return Outcome(
        rewards=tuple(tree.rewards().tolist()),
        truncated=sum(ends for ends, cut in zip(tree.ends, cut_off, strict=True) if cut),
        temperature=tree.options.sampling.temperature,
        max_new_tokens=tree.options.sampling.max_new_tokens,
        versions=(min(versions), max(versions)),
    )
