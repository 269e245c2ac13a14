"""Weight updates in SGLang's schedulers: what one rank raises is every rank's answer."""

from __future__ import annotations

import json
import subprocess
import sys

from tests import ROOT
from tests.server_ext.engine.loading_child import CALLS, FAILING


def test_two_ranks_answer_alike_and_go_on(tmp_path):
    """A rank that raised would be waited for for ever, or its failure would not be heard: SGLang
    passes on what the first rank says."""
    command = [sys.executable, "-m", "tests.server_ext.engine.loading_child", tmp_path / "store"]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=90)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert said[0] == said[1]
    answers = [json.loads(line) for line in said[0]]
    assert len(answers) == len(FAILING) * len(CALLS)
    for at, failing in enumerate(FAILING):
        begin, update, end = answers[at * len(CALLS) : (at + 1) * len(CALLS)]
        assert [begin[0], update[0], end[0]] == [not failing] * 3
        for success, message, *_ in (begin, update, end):
            assert success or all(f"rank {rank} failed" in message for rank in failing)
        # a failed begin or end leaves no session, a failed update leaves it to be ended
        assert [begin[2], update[2], end[2]] == [not failing, True, False]
        assert [begin[3], update[3], end[3]] == [at, at + 1, at + 1]
