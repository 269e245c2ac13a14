"""This process among those that torchrun started.

Rank 0 leads: it alone runs the loop, and where all must take part it calls the others, which follow
(`serve_leader` in learner/loop.py). Without torchrun there is one rank, no process group, and
nothing here does anything.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ibtree.errors import FieldError
from ibtree.tree import Tree
from learner.config import LearnerConfig
from learner.dist.balance import balanced
from learner.dist.commands import Command, receive, send
from learner.errors import RankLostError

_log = logging.getLogger(__name__)
_END = "end"


class Ranks:
    """One rank alone; `Group` is several."""

    rank, size = 0, 1
    mesh: DeviceMesh | None = None
    """The mesh over all ranks; None without a process group."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def together(self, name: str, trees: Sequence[Tree] = (), **facts: Any) -> Iterator[None]:
        """Encloses what all ranks do at once, and all that they tell each other: in between others
        listen. The leader's call reaches them as a Command.

        `facts` go through JSON. Raises RankLostError if another rank fails inside or does not come.
        An OSError inside must be one that every rank raises: it leaves the ranks together.
        """
        yield

    def commands(self) -> Iterator[Command]:
        """What the leader calls the others for, until it ends the run. Raises RankLostError."""
        yield from ()

    def assigned(self, sizes: Sequence[int]) -> list[int]:
        """Indices of the things of these sizes that are this rank's, in their order."""
        return balanced(sizes, self.size)[self.rank]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the ranks, the same on all of them."""
        return list(values)

    def most(self, value: float) -> float:
        """The largest over the ranks, the same on all of them."""
        return value


ALONE = Ranks(torch.device("cpu"))


class Group(Ranks):
    """The ranks of torchrun's process group. Between two commands the leader tells the others four
    times in `timeout_s` that it is there: a wait for trees may be longer than that."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        super().__init__(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(device.type, (self.size,))
        self._line, self._together, self._over = threading.Lock(), True, threading.Event()
        if self.leads and self.size > 1:
            beat = threading.Thread(target=self._beat, args=(timeout_s / 4,), daemon=True)
            beat.start()

    @contextmanager
    def together(self, name: str, trees: Sequence[Tree] = (), **facts: Any) -> Iterator[None]:
        with self._line, self._reporting(name):
            if self.leads:
                send(Command(name, facts, list(trees)).parts())
            yield

    def commands(self) -> Iterator[Command]:
        while True:
            with self._reporting("waiting for rank 0"):
                parts = receive()
            if not parts:
                continue
            command = Command.of(parts)
            if command.name == _END:
                return
            yield command

    def end(self) -> None:
        """Lets the others go, unless the ranks have lost each other. Raises RankLostError."""
        self._over.set()
        if self._together and self.leads:
            with self.together(_END):
                pass
        if self._together:
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def most(self, value: float) -> float:
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        if not self._together:
            raise RankLostError(f"rank {self.rank} of {self.size}: {what}: another rank is gone")
        try:
            yield
        except OSError:
            raise
        except RuntimeError as error:
            self._together = False
            _log.debug("rank %s failed", self.rank, exc_info=True)
            first = str(error).splitlines()[0]
            raise RankLostError(
                f"rank {self.rank} of {self.size}: {what}: {type(error).__name__}: {first}; if no "
                "rank says more, another one died or stalled for longer than --rank-timeout-s. "
                "Start again: the run goes on from its newest checkpoint"
            ) from error
        except BaseException:
            self._together = False
            raise

    def _beat(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            with self._line:
                if self._over.is_set() or not self._together:
                    return
                try:
                    with self._reporting("telling that rank 0 is there"):
                        send([])
                except RankLostError as error:
                    _log.error("%s", error)
                    signal.raise_signal(signal.SIGTERM)


@contextmanager
def joined(config: LearnerConfig) -> Iterator[Ranks]:
    """This process's rank, among torchrun's if it started it.

    Raises FieldError for a device that is not there, RankLostError if the others do not come.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(pick_device(config.device))
        return
    device = _own_device(config.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=config.rank_timeout_s))
        group = Group(device, config.rank_timeout_s)
    except RuntimeError as error:
        raise RankLostError(f"the ranks did not find each other: {error}") from error
    try:
        yield group
    except BaseException:
        with suppress(RankLostError):  # what ends the run says more than a rank gone before
            group.end()
        raise
    group.end()


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises FieldError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FieldError("device", "cuda is not available here", "auto | cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _own_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cpu":
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise FieldError("device", f"local rank {local} has no GPU of its own", f"{there} ranks")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
