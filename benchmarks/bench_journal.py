"""`make bench-journal`: the queue's journal at real sizes.

100,000 graded trees are leased 16 at a time and acked; small trees go all the way from prompt to
ack, each step durable; a million rows are counted; trees of 100 MiB are leased without being read;
and a file through which many trees went is as large as what it keeps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from figures import show

from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.retention import Retention

OUT = Path(__file__).parent / "out" / "journal.json"
MIB = 1024 * 1024
TREES, ROWS, LEASE = 100_000, 1_000_000, 16
SMALL_BYTES = 2048
"""A tree of the demo's: 8 bytes a token."""
LARGE_BYTES = 100 * MIB
MESSAGE_BYTES = 3 * MIB
LEASE_S = 600.0


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def ids(run: str, count: int) -> Iterator[list[tuple[str, bytes]]]:
    """Prompts in calls of 10,000, the most that a client may send."""
    for low in range(0, count, 10_000):
        yield [(f"{run}/{n}", b"What is 1 + 1?") for n in range(low, min(low + 10_000, count))]


def grade(journal: Journal, count: int, tree: bytes) -> None:
    """Brings so many queued prompts to graded; how long that takes is not looked at."""
    for _ in range(0, count, 1000):
        with journal.together():
            for queued in journal.take(1000):
                journal.store(queued.id, tree, version=1)


def leases(folder: Path, trees: int) -> dict[str, float]:
    """Leases of 16 beside 100,000 graded trees of two runs, each acked."""
    journal = Journal(folder / "journal.sqlite")
    for run in ("first", "second"):
        for call in ids(run, trees // 2):
            journal.submit(call)
    grade(journal, trees, os.urandom(SMALL_BYTES))
    leased_ms, acked_ms = [], []
    for turn in range(300):
        run = ("first", "second", None)[turn % 3]
        began = time.perf_counter()
        held = journal.lease(LEASE, LEASE_S, MESSAGE_BYTES, run)
        leased_ms.append(1000 * (time.perf_counter() - began))
        assert len(held) == LEASE
        lease_ids = [lease.lease_id for lease in held]
        acked_ms.append(milliseconds(lambda lease_ids=lease_ids: journal.ack(lease_ids)))
    journal.close()
    return {
        "lease_ms_median": statistics.median(leased_ms),
        "lease_ms_p99": sorted(leased_ms)[-3],
        "ack_ms_median": statistics.median(acked_ms),
    }


async def throughput(folder: Path, trees: int, growing: int) -> float:
    """Small trees a second from prompt to ack, as producer and services write them: so many end
    at about the same time, beside a learner that leases and acks."""
    journal = JournalThread(lambda: Journal(folder / "journal.sqlite"))
    for call in ids("run", trees):
        await journal(Journal.submit, call)
    tree = os.urandom(SMALL_BYTES)

    async def grow() -> None:
        while taken := await journal(Journal.take, 1):
            await journal(Journal.store, taken[0].id, tree, 1)

    async def learn() -> None:
        acked = 0
        while acked < trees:
            held = await journal(Journal.lease, LEASE, LEASE_S, MESSAGE_BYTES)
            await journal(Journal.ack, [lease.lease_id for lease in held])
            acked += len(held)

    began = time.perf_counter()
    await asyncio.gather(learn(), *(grow() for _ in range(growing)))
    seconds = time.perf_counter() - began
    journal.close()
    return trees / seconds


def throughputs(folder: Path, trees: int) -> dict[str, float]:
    """With 64 trees growing, and with one: then each waits for the disk by itself."""
    figures = {}
    for growing, name in ((64, "trees_per_second"), (1, "trees_per_second_alone")):
        part = folder / name
        part.mkdir()
        count = trees if growing > 1 else trees // 10
        figures[name] = asyncio.run(throughput(part, count, growing))
    return figures


def counting(folder: Path, rows: int) -> dict[str, float]:
    """Counts at a million rows, and what a row that is only remembered costs."""
    path = folder / "journal.sqlite"
    journal = Journal(path)
    for call in ids("run", rows):
        journal.submit(call)
    counted_ms = [milliseconds(journal.counts) for _ in range(200)]
    assert sum(journal.counts().values()) == rows
    taken_ms = [milliseconds(lambda: journal.take(1)) for _ in range(200)]
    journal.close()
    opened_ms = milliseconds(lambda: Journal(path).close())
    return {
        "counts_ms": statistics.median(counted_ms),
        "counts_ms_max": max(counted_ms),
        "take_ms_median": statistics.median(taken_ms),
        "open_ms": opened_ms,
        "bytes_per_row": path.stat().st_size / rows,
    }


def large(folder: Path, tree_bytes: int) -> dict[str, float]:
    """Three trees of 100 MiB: leased without being read, then read in parts."""
    journal = Journal(folder / "journal.sqlite")
    journal.submit([(f"run/{n}", b"?") for n in range(3)])
    stored_ms = []
    for queued in journal.take(3):
        tree = os.urandom(tree_bytes)
        work = lambda id_=queued.id, tree=tree: journal.store(id_, tree)  # noqa: E731
        stored_ms.append(milliseconds(work))
    began = time.perf_counter()
    held = journal.lease(3, LEASE_S, MESSAGE_BYTES)
    lease_ms = 1000 * (time.perf_counter() - began)
    assert [lease.tree for lease in held] == [None] * 3
    at, parts_ms = 0, []
    while at < tree_bytes:
        began = time.perf_counter()
        at += len(journal.read(held[0].lease_id, at))
        parts_ms.append(1000 * (time.perf_counter() - began))
    acked_ms = milliseconds(lambda: journal.ack([lease.lease_id for lease in held]))
    journal.close()
    return {
        "large_store_ms": statistics.median(stored_ms),
        "large_lease_ms": lease_ms,
        "large_part_ms_max": max(parts_ms),
        "large_ack_ms": acked_ms,
    }


def retention(folder: Path, trees: int) -> dict[str, float]:
    """The file's size when twice as many trees have gone through, relative to before."""
    path = folder / "journal.sqlite"
    journal = Journal(path, retention=Retention(acked=1000, dead_bytes=MIB))
    tree, sizes = os.urandom(32 * 1024), []
    for half in ("first", "second"):
        for n in range(0, trees, 100):
            journal.submit([(f"{half}/{i}", b"?") for i in range(n, n + 100)])
            for queued in journal.take(100):
                journal.store(queued.id, tree)
            held = journal.lease(100, LEASE_S, 100 * MIB)
            journal.ack([lease.lease_id for lease in held[1:]])
            for _ in range(6):
                journal.nack([held[0].lease_id], "bad", bad=True)
                held = journal.lease(1, LEASE_S, MIB) or held
        sizes.append(path.stat().st_size)
    journal.close()
    return {"file_growth": sizes[1] / sizes[0], "file_mib": sizes[1] / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where the journals lie; default: the system's own")
    parser.add_argument("--trees", type=int, default=TREES)
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    parts: list[Callable[[Path], dict[str, float]]] = [
        lambda folder: leases(folder, arguments.trees),
        lambda folder: throughputs(folder, 10_000),
        lambda folder: counting(folder, arguments.rows),
        lambda folder: large(folder, LARGE_BYTES),
        lambda folder: retention(folder, 5000),
    ]
    for part in parts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            figures |= part(Path(folder))
    show("the journal at real sizes", figures, OUT)


if __name__ == "__main__":
    main()
