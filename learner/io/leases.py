"""The learner's side of the tree queue: prompts submitted ahead, trees leased and given back.

Step k trains on the trees of the k-th `prompts_per_step` prompts, in the prompts' order, whatever
order they are grown in; a tree that comes early waits for its step. So a run that was killed meets
the same trees in the same batches, and short trajectories are not preferred.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from ibtree.client import Client, RpcFailed
from ibtree.messages import Prompt, TreeLease
from ibtree.tree import Tree
from ibtree.tree.options import flat, options_from
from learner.config import LearnerConfig
from learner.errors import QueueDry, WriteError, writing
from learner.io.checkpoint import TrainState
from learner.io.prompts import PromptStream

_log = logging.getLogger(__name__)
_POLL_S = 5.0
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_GIVE_BACK_S = 5.0
"""Longest wait for a server to take a tree back: whoever stops the learner waits for it."""
_MAX_TREES = 1024  # a LeaseTrees call gives no more
_MAX_REASON_CHARACTERS = 500  # a tree's reasons are kept no longer


def asked_options(config: LearnerConfig) -> dict[str, Any]:
    """What trees are asked to be grown with. A limit of tokens that nobody set is left to the
    server, whose default gives way to the model's context."""
    options = flat(options_from(config))
    if "max_new_tokens" not in config.model_fields_set:
        del options["max_new_tokens"]
    del options["seed"]  # the learner's is of its prompts' order; one for every tree is none
    return {name: value for name, value in options.items() if value is not None}


class TreeLeases:
    """Prompts in, leases out. What it holds (`state.leases`) is also written down at once, so that
    a run that is killed gives its trees back when it comes back, instead of waiting until the
    leases run out. `tree_problem` says what is wrong with a tree, empty for a good one; `prepare`
    is told of each good one as it comes; when `stop` grows, it waits no longer."""

    def __init__(
        self,
        client: Client,
        stream: PromptStream,
        config: LearnerConfig,
        state: TrainState,
        tree_problem: Callable[[Tree], str],
        prepare: Callable[[Tree], None],
        stop: Sequence[int] = (),
    ) -> None:
        self._client, self._stream, self._config, self._state = client, stream, config, state
        self._tree_problem, self._prepare, self._stop = tree_problem, prepare, stop
        self._options = asked_options(config)
        self._ready: dict[int, TreeLease] = {}
        self._extended = time.monotonic()
        self._note = config.out_dir / "leases.json"
        self.refused: set[str] = set()
        """Ids of the trees refused since the last step's were complete."""

    def give_back_from_before(self) -> None:
        """Acks what a run that was killed held and had trained on, nacks the rest; leases that ran
        out meanwhile do not matter."""
        self._state.leases |= self._noted()
        self.ack()
        self.give_back("the learner was restarted")

    def submit_ahead(self) -> None:
        """Submits the prompts of the next step and of the steps ahead of it."""
        ahead = (1 + self._config.prompts_ahead_steps) * self._config.prompts_per_step
        until = self._state.prompts_done + round(ahead)
        numbers = range(self._state.next_prompt, until)
        for low in range(0, len(numbers), 1000):
            prompts = []
            for number in numbers[low : low + 1000]:
                id_, question = self._stream[number]
                prompts.append(
                    Prompt(
                        question.prompt, id_, question.answer, self._config.grader, self._options
                    )
                )
            patience_s = self._config.patience_s
            self._client.submit_prompts(prompts, timeout_s=patience_s, wait=True)
        self._state.next_prompt = max(until, self._state.next_prompt)

    def lease_step(self) -> list[TreeLease]:
        """The trees of the next `prompts_per_step` prompts; fewer if some will not come any more
        (dead, refused, or lost with a damaged checkpoint), never none but where `stop` grows while
        it waits. Raises QueueDry.
        """
        until = time.monotonic() + self._config.patience_s
        while not self._stop and (missing := [n for n in self._wanted() if n not in self._ready]):
            leases = self._client.lease_trees(
                min(len(missing), _MAX_TREES),
                lease_s=self._config.lease_s,
                wait_s=_POLL_S,
                wait=True,
                run=self._stream.run_id,
            )
            self._take(leases)
            self.keep_alive()
            if not leases and not self._more_will_come():
                _log.warning("%s of this step's prompts give no tree", len(missing))
                if len(missing) < self._config.prompts_per_step:
                    break
                self._state.prompts_done += self._config.prompts_per_step
                self.submit_ahead()
            if not leases and time.monotonic() > until:
                stats = self._client.queue_stats(self._stream.run_id)
                raise QueueDry(f"no tree within {self._config.patience_s} s ({stats})")
        return [self._ready[n] for n in self._wanted() if n in self._ready]

    def settle(self, leases: list[TreeLease]) -> None:
        """The step's trees go into the ledger; its prompts are done with."""
        self._state.trained += [lease.tree.tree_id for lease in leases]
        for number in self._wanted():
            self._ready.pop(number, None)
        self._state.prompts_done += self._config.prompts_per_step
        self.refused.clear()

    def keep_alive(self) -> None:
        """Prolongs the leases held, when a third of their time is over."""
        if time.monotonic() - self._extended <= self._config.lease_s / 3:
            return
        self._extended = time.monotonic()
        for lease_id in list(self._state.leases):
            try:
                self._client.extend_lease([lease_id], lease_s=self._config.lease_s)
            except RpcFailed as error:
                _log.warning("lease not prolonged: %s", error)
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    return
                # the tree went back and comes again; the ledger knows those trained on
                del self._state.leases[lease_id]
                self._ready = {n: o for n, o in self._ready.items() if o.lease_id != lease_id}

    def ack(self) -> None:
        """Ends the leases of trees that are done with: they are in a durable checkpoint's ledger,
        or their step was over when they came."""
        for lease_id, tree_id in list(self._state.leases.items()):
            if not self._is_done(tree_id):
                continue
            try:
                self._client.ack_trees([lease_id], wait=True)
            except RpcFailed as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    raise
                del self._state.leases[lease_id]
                continue  # ran out: it comes again, and its id stays in the ledger
            del self._state.leases[lease_id]
            if tree_id in self._state.trained:
                self._state.trained.remove(tree_id)
        self._write_down()

    def give_back(self, reason: str) -> None:
        """Nacks everything held. If the server is away, the rest runs out by itself."""
        for lease_id in list(self._state.leases):
            if self._nack(lease_id, reason, bad=False, timeout_s=_GIVE_BACK_S) in _AWAY:
                break
        self._state.leases.clear()
        self._ready.clear()
        try:
            self._write_down()
        except WriteError as error:  # the note then names leases that are unknown: harmless
            _log.warning("%s", error)

    def _wanted(self) -> range:
        done = self._state.prompts_done
        return range(done, done + self._config.prompts_per_step)

    def _is_done(self, tree_id: str) -> bool:
        number = self._stream.number_of(tree_id)
        below = number is not None and number < self._state.prompts_done
        return below or tree_id in self._state.trained

    def _take(self, leases: list[TreeLease]) -> None:
        self._state.leases |= {lease.lease_id: lease.tree.tree_id for lease in leases}
        self._write_down()
        for lease in leases:
            number = self._stream.number_of(lease.tree.tree_id)
            if self._is_done(lease.tree.tree_id):
                continue  # acked with the next checkpoint
            if problem := lease.problem or self._tree_problem(lease.tree):
                self._refuse(lease, problem)
            elif number is None:
                self._refuse(lease, "not of a prompt of this run")
            else:
                self._prepare(lease.tree)
                self._ready[number] = lease

    def _refuse(self, lease: TreeLease, problem: str) -> None:
        _log.warning("tree %s refused: %s", lease.tree.tree_id, problem)
        self.refused.add(lease.tree.tree_id)
        self._nack(lease.lease_id, problem, bad=True)

    def _nack(
        self, lease_id: str, reason: str, *, bad: bool, timeout_s: float | None = None
    ) -> grpc.StatusCode | None:
        """The status if it failed; then the lease runs out by itself. `bad`: the tree itself is at
        fault, which counts against it."""
        del self._state.leases[lease_id]
        short = reason[:_MAX_REASON_CHARACTERS]
        try:
            self._client.nack_trees([lease_id], short, bad=bad, timeout_s=timeout_s)
        except RpcFailed as error:
            _log.info("not given back: %s", error)
            return error.code
        return None

    def _more_will_come(self) -> bool:
        stats = self._client.queue_stats(self._stream.run_id)
        # leased to nobody: a learner killed between the answer and its note; they run out
        elsewhere = stats.leased - len(self._state.leases)
        return bool(stats.queued + stats.growing + stats.graded + elsewhere)

    def _noted(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._note.read_text()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:  # cut off by a power failure
            _log.warning("%s is damaged (%s); its leases run out by themselves", self._note, error)
            return {}

    def _write_down(self) -> None:
        fresh = Path(f"{self._note}.new")
        with writing("the leases in hand", self._note.parent):
            fresh.write_text(json.dumps(self._state.leases))
            fresh.rename(self._note)
