"""Run as a process: random journal operations for ever; one line before each, one when it is done.

python -m tests.server_ext.queue.journal_child PATH SEED
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from server_ext.queue.journal import Journal


def main(path: str, seed: str) -> None:
    rng = random.Random(seed)
    journal = Journal(Path(path), max_returns=1000, max_failures=1000)
    growing: list[str] = []
    leases: dict[str, str] = {}

    def say(**line: object) -> None:
        print(json.dumps(line), flush=True)

    def some(things: dict[str, str]) -> dict[str, str]:
        return {key: things[key] for key in rng.sample(sorted(things), min(len(things), 2))}

    for n in range(10**9):
        call = rng.choice(["submit", "take", "store", "store", "lease", "lease", "ack", "nack"])
        if call == "submit":
            ids = [f"{seed}-{n}-{i}" for i in range(rng.randrange(1, 4))]
            say(call=call, ids=ids)
            journal.submit([(i, i.encode()) for i in ids])
            say(done=call, ids=ids)
        elif call == "take":
            say(call=call)
            ids = [prompt.id for prompt in journal.take(2)]
            growing += ids
            say(done=call, ids=ids)
        elif call == "store" and growing:
            ids = [growing.pop()]
            say(call=call, ids=ids)
            journal.store(ids[0], b"tree " + ids[0].encode())
            say(done=call, ids=ids)
        elif call == "lease":
            say(call=call)
            leased = journal.lease(2, 3600.0, 10**6)
            fresh = {lease.tree[5:].decode(): lease.lease_id for lease in leased}
            leases |= fresh
            say(done=call, ids=list(fresh), leases=fresh)
        elif call in ("ack", "nack") and leases:
            ended = some(leases)
            say(call=call, ids=list(ended))
            if call == "ack":
                journal.ack(list(ended.values()))
            else:
                journal.nack(list(ended.values()), "no")
            leases = {key: lease for key, lease in leases.items() if key not in ended}
            say(done=call, ids=list(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
