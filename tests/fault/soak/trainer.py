"""A learner as the server sees it:

    python -m tests.fault.soak.trainer ADDRESS RUN FOLDER [TRAIN_S [LEASE_S]]

It submits prompts, leases trees, writes their ids into its ledger, durably, and only then acks
them. Killed anywhere, it goes on from the ledger: a tree in it that comes again is acked and not
trained on. An id leaves the ledger when its ack is confirmed, as in learner/io/leases.py, so that a
server that hands it out again has it trained on twice. The ledger is the run's file of events.
"""

from __future__ import annotations

import sys
import time
from itertools import groupby
from pathlib import Path
from random import Random

import grpc

from ibtree import Client, Prompt, Tree
from ibtree.client import RpcFailed
from ibtree.messages import TreeChoice, TreeLease
from tests.fault.soak.events import EventLog, Kind, now_s, read_events
from tests.fault.soak.reward_service import POISON

CALL_S = 5.0
LEASE_S = 8.0
BATCH = 2
TRAIN_S = 0.6
PAUSE_S = 0.2
FEW_QUEUED, AT_ONCE = 4, 4
"""While fewer are queued, so many prompts more are submitted."""
KEEP_GRADED = 2
"""So many are left in the queue, so that faults meet trees in every state."""
OPTIONS = {"init_rollouts": 2, "rounds": 3, "max_new_tokens": 48}
FINAL = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
"""Trying again would not help: the soak itself is wrong."""
DRAIN = "drain"
"""While this file lies in the folder nothing is submitted, and everything is leased."""


def ledger_path(folder: Path, run: str) -> Path:
    return folder / f"run-{run}.jsonl"


def is_refused(number: int) -> bool:
    """Whether the learner finds this prompt's tree bad."""
    return number % 12 == 11


def is_ungradable(number: int) -> bool:
    """Whether the reward service refuses this prompt's trajectories."""
    return number % 12 == 5


def is_cancelled(number: int) -> bool:
    """Whether the prompt is cancelled as soon as it is submitted."""
    return number % 12 == 8


def prompt(run: str, number: int) -> Prompt:
    """The run's prompt of this number, always the same: an arith problem of three terms."""
    rng = Random(f"{run}/{number}")
    digits = [rng.randrange(10) for _ in range(3)]
    answer = POISON if is_ungradable(number) else str(sum(digits) % 10)
    text = "+".join(map(str, digits)) + "=?\n"
    return Prompt(text, f"{run}/{number:05d}", answer, "", OPTIONS)


def version_paths(tree: Tree) -> list[list[int]]:
    """Weight versions along each path from the root, each run of equal ones once."""
    paths = []
    for end in tree.end_nodes():
        versions = [v for node in tree.path(end) for v in tree.steps[node].versions]
        paths.append([version for version, _ in groupby(versions)])
    return paths


class Trainer:
    """One run."""

    def __init__(
        self,
        address: str,
        run: str,
        folder: Path,
        train_s: float = TRAIN_S,
        lease_s: float = LEASE_S,
    ) -> None:
        """`train_s`: how long a batch is trained on; `lease_s`: how long leases last."""
        self._client, self._run = Client(address, timeout_s=CALL_S), run
        self._train_s, self._lease_s = train_s, lease_s
        self._drain, path = folder / DRAIN, ledger_path(folder, run)
        self._log = EventLog(path)
        before = read_events([path])
        self._submitted = sum(event.kind is Kind.SUBMITTED for event in before)
        acked = {event["id"] for event in before if event.kind is Kind.ACKED}
        self._ledger = {e["id"] for e in before if e.kind is Kind.TRAINED} - acked

    def turn(self) -> None:
        """Submits if little waits, and trains on what is ready. Raises RpcFailed."""
        stats, draining = self._client.queue_stats(), self._drain.exists()
        if not draining and stats.queued < FEW_QUEUED:
            for _ in range(AT_ONCE):
                self._submit()
        if draining or stats.graded > KEEP_GRADED:
            self._train()
        else:
            time.sleep(PAUSE_S)

    def _submit(self) -> None:
        number = self._submitted
        one = prompt(self._run, number)
        self._client.submit_prompts([one])
        self._submitted += 1
        poison = is_ungradable(number) or is_refused(number)
        self._log.write(Kind.SUBMITTED, id=one.id, poison=poison)
        if is_cancelled(number):
            self._log.write(Kind.CANCELLED, id=one.id)
            self._client.cancel_prompts(TreeChoice(ids=(one.id,)))

    def _train(self) -> None:
        asked_s = now_s()
        leases = self._client.lease_trees(BATCH, lease_s=self._lease_s, wait_s=1.0, run=self._run)
        for lease in leases:
            self._log.write(
                Kind.LEASED,
                id=lease.tree.tree_id,
                lease=lease.lease_id,
                lease_s=self._lease_s,
                asked_s=asked_s,
                paths=version_paths(lease.tree),
            )
        if leases:
            time.sleep(self._train_s)
        for lease in leases:
            self._done(lease)

    def _done(self, lease: TreeLease) -> None:
        run, _, number = lease.tree.tree_id.rpartition("/")
        if run != self._run:
            self._return(lease, "not of a prompt of this run", bad=False)
        elif is_refused(int(number)):
            self._return(lease, "this tree is bad", bad=True)
        else:
            if lease.tree.tree_id not in self._ledger:
                self._log.write(Kind.TRAINED, id=lease.tree.tree_id, durably=True)
                self._ledger.add(lease.tree.tree_id)
            self._ack(lease)

    def _ack(self, lease: TreeLease) -> None:
        tree_id = lease.tree.tree_id
        while True:
            try:
                self._client.ack_trees([lease.lease_id])
            except RpcFailed as failed:
                if (
                    failed.code is grpc.StatusCode.NOT_FOUND
                ):  # it comes again, and stands in the ledger
                    return self._log.write(Kind.GONE, id=tree_id, lease=lease.lease_id)
                again(failed)
            else:
                self._log.write(Kind.ACKED, id=tree_id, lease=lease.lease_id)
                return self._ledger.discard(tree_id)

    def _return(self, lease: TreeLease, reason: str, *, bad: bool) -> None:
        # before the call: whoever is killed behind it must not seem to hold the tree still
        self._log.write(Kind.RETURNED, id=lease.tree.tree_id, lease=lease.lease_id, reason=reason)
        while True:
            try:
                self._client.nack_trees([lease.lease_id], reason, bad=bad)
            except RpcFailed as failed:
                if failed.code is grpc.StatusCode.NOT_FOUND:
                    return  # it ran out, or the answer to the attempt before was lost
                again(failed)
            else:
                return


def again(failed: RpcFailed) -> None:
    """Waits a little before the next attempt; raises the failure if there is no use in one."""
    if failed.code in FINAL:
        raise failed
    print(failed, file=sys.stderr, flush=True)
    time.sleep(PAUSE_S)


def main(address: str, run: str, folder: str, *times_s: str) -> None:
    trainer = Trainer(address, run, Path(folder), *map(float, times_s))
    while True:
        try:
            trainer.turn()
        except RpcFailed as failed:
            again(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
