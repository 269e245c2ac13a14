"""A tree queue in memory, with a clock of its own, in the place of ibtree.client.Client."""

from __future__ import annotations

from collections import Counter
from itertools import count

import grpc

from ibtree.client import RpcFailed
from ibtree.messages import QueueStats, TreeLease
from tests.learner.tiny import flat_tree


class Queue:
    """Duck-typed ibtree.client.Client and the server behind it. Trees are graded when submitted,
    unless their number is in `dying`; those in `problems` do not decode; waiting and `sleep`
    advance the clock. Prompts fit after `full_s`. A tree given back as bad three times is dead, by
    its last reason; only trees of the run that asks are leased and counted."""

    def __init__(self, dying: set[int] = frozenset()) -> None:
        self.now, self.dying, self._ids = 0.0, dying, count()
        self.submitted: list[str] = []
        self.graded: list[str] = []
        self.acked: list[str] = []
        self.nacked: list[str] = []
        self.bad: list[str] = []
        """Of these, given back as bad."""
        self.leases: dict[str, tuple[str, float]] = {}
        self.problems: dict[str, str] = {}
        self.dead: dict[str, str] = {}
        self.fail: dict[str, grpc.StatusCode] = {}
        self.full_s = 0.0
        self.calls = Counter[str]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for lease, (tree, until) in list(self.leases.items()):
            if until <= self.now:
                del self.leases[lease]
                self.graded.append(tree)

    def _check(self, method: str, lease_ids: list[str] | None = None) -> None:
        self.calls[method] += 1
        code = self.fail.get(method)
        if lease_ids and any(lease not in self.leases for lease in lease_ids):
            code = grpc.StatusCode.NOT_FOUND
        if code:
            raise RpcFailed(method, "here", code, "told to")

    def submit_prompts(self, prompts, *, timeout_s, wait):
        assert wait
        self.now += self.full_s
        if self.full_s > timeout_s:
            raise RpcFailed("SubmitPrompts", "here", grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        for prompt in prompts:
            if prompt.id not in self.submitted:
                self.submitted.append(prompt.id)
                if int(prompt.id.split("/")[1]) not in self.dying:
                    self.graded.append(prompt.id)

    def lease_trees(self, max_trees, *, lease_s, wait_s, wait, run):
        assert wait and max_trees > 0
        if not self._of(run):
            self.sleep(wait_s)
        leases = []
        for tree in self._of(run)[:max_trees]:
            self.graded.remove(tree)
            lease = f"lease-{next(self._ids)}"
            self.leases[lease] = (tree, self.now + lease_s)
            rollouts = [((1,), 1.0), ((2,), 0.0)]
            problem = self.problems.get(tree, "")
            leases.append(TreeLease(lease, flat_tree(rollouts, tree_id=tree), 0, problem))
        return leases

    def extend_lease(self, lease_ids, *, lease_s):
        self._check("ExtendLease", lease_ids)
        for lease in lease_ids:
            self.leases[lease] = (self.leases[lease][0], self.now + lease_s)

    def ack_trees(self, lease_ids, *, wait):
        self._check("AckTrees", lease_ids)
        self.acked += [self.leases.pop(lease)[0] for lease in lease_ids]

    def nack_trees(self, lease_ids, reason, *, bad, timeout_s=None):
        assert reason
        self._check("NackTrees", lease_ids)
        for tree in [self.leases.pop(lease)[0] for lease in lease_ids]:
            self.nacked.append(tree)
            self.bad += [tree] * bad
            if self.bad.count(tree) < 3:
                self.graded.append(tree)
            else:
                self.dead[tree] = reason

    def queue_stats(self, run):
        leased = [tree for tree, _ in self.leases.values() if run_of(tree) == run]
        return QueueStats(graded=len(self._of(run)), leased=len(leased))

    def _of(self, run):
        return [tree for tree in self.graded if run_of(tree) == run]


def run_of(tree):
    return tree.rpartition("/")[0]
