"""The learner's side of the tree queue: prompts submitted ahead, trees leased and given back."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import grpc

from ibtree.client import Client, RpcFailed
from ibtree.messages import Prompt, TreeLease
from ibtree.options import options_from
from learner.checkpoint import TrainState
from learner.config import LearnerConfig
from learner.prompts import PromptStream

_log = logging.getLogger(__name__)
_POLL_S = 5.0


class QueueDry(RuntimeError):
    """No tree came within the learner's patience."""


class Intake:
    """Prompts in, leases out. What it holds is written down, so that a run that is killed gives
    its trees back when it comes back, instead of waiting until the leases run out."""

    def __init__(
        self, client: Client, stream: PromptStream, config: LearnerConfig, state: TrainState
    ) -> None:
        self._client, self._stream, self._config, self._state = client, stream, config, state
        self._options = options_from(config)
        self._held: dict[str, TreeLease] = {}
        self._extended = time.monotonic()
        self._note = config.out_dir / "leases.json"

    def give_back_from_before(self) -> None:
        """Nacks what a run that was killed held; leases that ran out meanwhile do not matter."""
        if self._note.is_file():
            for lease_id in json.loads(self._note.read_text()):
                self._nack([lease_id], "the learner was restarted")
            self._note.unlink()

    def submit_ahead(self, step: int) -> None:
        """Submits the prompts of `step` and of the steps ahead of it."""
        per_step = self._config.prompts_per_step
        until = round((step + 1 + self._config.prompts_ahead_steps) * per_step)
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
            self._client.submit_prompts(prompts, wait=True)
        self._state.next_prompt = max(until, self._state.next_prompt)

    def lease_step(self) -> list[TreeLease]:
        """A step's trees: `prompts_per_step`, or fewer if no more will come.

        Trees already in the ledger are only kept to be acked. Raises QueueDry.
        """
        leases: list[TreeLease] = []
        until = time.monotonic() + self._config.patience_s
        while len(leases) < self._config.prompts_per_step:
            wanted = self._config.prompts_per_step - len(leases)
            got = self._client.lease_trees(
                wanted, lease_s=self._config.lease_s, wait_s=_POLL_S, wait=True
            )
            self._hold(got)
            leases += [one for one in got if one.tree.tree_id not in self._state.trained]
            self.keep_alive()
            leases = [one for one in leases if one.lease_id in self._held]
            if not got:
                stats = self._client.queue_stats()
                # leased to nobody: a learner killed between the answer and its note; they run out
                elsewhere = stats.leased - len(self._held)
                if not stats.queued + stats.growing + stats.graded + elsewhere and leases:
                    _log.warning("only %s trees for this step: prompts died", len(leases))
                    break
                if time.monotonic() > until:
                    raise QueueDry(f"no tree within {self._config.patience_s} s ({stats})")
        return leases

    def keep_alive(self) -> None:
        """Prolongs the leases held, when a third of their time is over."""
        if self._held and time.monotonic() - self._extended > self._config.lease_s / 3:
            self._extended = time.monotonic()
            try:
                self._client.extend_lease(list(self._held), lease_s=self._config.lease_s)
            except RpcFailed as error:
                _log.warning("leases not prolonged: %s", error)
                if error.code is grpc.StatusCode.NOT_FOUND:
                    # trees that went back come again; the ledger knows those trained on
                    self._held.clear()

    def ack(self) -> None:
        """Ends all leases held: their trees are in a durable checkpoint's ledger."""
        for lease_id in list(self._held):
            try:
                self._client.ack_trees([lease_id], wait=True)
            except RpcFailed as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    raise
                continue  # ran out: it comes again, and its id stays in the ledger
            finally:
                lease = self._held.pop(lease_id)
            if lease.tree.tree_id in self._state.trained:
                self._state.trained.remove(lease.tree.tree_id)
        self._write_down()

    def give_back(self, reason: str) -> None:
        """Nacks everything held."""
        self._nack(list(self._held), reason)
        self._held.clear()
        self._write_down()

    def _hold(self, leases: list[TreeLease]) -> None:
        if leases:
            self._held.update({one.lease_id: one for one in leases})
            self._write_down()

    def _nack(self, lease_ids: list[str], reason: str) -> None:
        try:
            if lease_ids:
                self._client.nack_trees(lease_ids, reason)
        except RpcFailed as error:
            _log.info("not given back: %s", error)

    def _write_down(self) -> None:
        fresh = Path(f"{self._note}.new")
        fresh.write_text(json.dumps(list(self._held)))
        fresh.rename(self._note)
