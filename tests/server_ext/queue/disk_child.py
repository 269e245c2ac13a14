"""Run as a process in a mount namespace of its own, on a small tmpfs: what a full disk does.

python -m tests.server_ext.queue.disk_child FOLDER first | second
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from server_ext.errors import DiskFullError
from server_ext.queue.journal import Journal

MIB = 1024 * 1024
MANY = 10**9


def fill(folder: Path) -> None:
    """Somebody else takes all the room that is left."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def opened(folder: Path) -> Journal:
    return Journal(folder / "journal.sqlite")


def until_full(journal: Journal, prefix: str) -> int:
    """Grades trees of half a MiB until the disk is full; how many."""
    for n in range(10**6):
        id_ = f"{prefix}/{n}"
        try:
            journal.submit([(id_, b"prompt")])
            journal.take(1)
            journal.store(id_, os.urandom(MIB // 2))
        except DiskFullError:
            return n
    raise AssertionError


def hands_on(journal: Journal, count: int) -> int:
    """Leases, prolongs, gives back and acks one tree after another; how many."""
    done = 0
    for _ in range(count):
        (lease,) = journal.lease(1, 60.0, MANY)
        journal.extend([lease.lease_id], 90.0)
        journal.nack([lease.lease_id], "only looking")
        (lease,) = journal.lease(1, 60.0, MANY)
        journal.ack([lease.lease_id])
        done += 1
    return done


def states(journal: Journal) -> dict[str, int]:
    return {state: n for state, n in journal.counts().items() if n}


def first(folder: Path) -> None:
    """A server that fills the disk, and is killed there while a prompt grows."""
    journal = opened(folder)
    said: dict[str, object] = {"stored": until_full(journal, "run")}
    fill(folder)
    said["free"] = os.statvfs(folder).f_bavail
    said["handed_on"] = hands_on(journal, int(str(said["stored"])) // 2)
    print(json.dumps(said | {"states": states(journal)}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def second(folder: Path) -> None:
    """The next one, which finds it as full."""
    fill(folder)
    journal = opened(folder)
    said: dict[str, object] = {"states": states(journal), "handed_on": hands_on(journal, 3)}
    (folder / "filler").unlink()
    said["stored"] = until_full(journal, "more")
    print(json.dumps(said))


if __name__ == "__main__":
    {"first": first, "second": second}[sys.argv[2]](Path(sys.argv[1]))
