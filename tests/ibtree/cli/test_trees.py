"""`ibtpo trees`: list, revive, purge and cancel against a server."""

from __future__ import annotations

import json

import pytest

from server_ext.queue.journal import Journal
from tests.ibtree.cli.command import ibtpo
from tests.server_ext.site import Site

NASTY = "run/\x1b[2J\nmine"


@pytest.fixture
async def site(tmp_path):
    """Of the run `run` one dead tree and two queued prompts, and one whose id is nasty."""
    async with Site(tmp_path) as site:
        site.producing.cancel()

        def fill(journal: Journal) -> None:
            prompts = [(id_, b"no prompt") for id_ in ("run/1", NASTY, "run/2", "other/1")]
            journal.submit(prompts)
            for _ in range(3):
                journal.take(2)
                journal.fail("run/1", "why\n\x1b[2Jthen")
                journal.fail(NASTY, "first")

        await site.journal(fill)
        yield site


async def of(site: Site, *words: str) -> dict:
    code, out, err = await ibtpo("trees", "--server", site.target, "--json", *words)
    assert (code, err) == (0, "")
    return json.loads(out)


async def test_the_life_of_a_dead_tree(site):
    found = await of(site, "--state", "dead")
    assert [(tree["id"], tree["failures"]) for tree in found["trees"]] == [("run/1", 3), (NASTY, 3)]
    assert found["trees"][0]["reasons"] == ["why\n\x1b[2Jthen"] * 3 and not found["more"]
    assert await of(site, "revive", "--id", "run/1") == {"revived": 1}
    assert [tree["state"] for tree in (await of(site))["trees"]] == [
        "queued",
        "dead",
        "queued",
        "queued",
    ]
    assert await of(site, "purge", "--run", "run") == {"purged": 1}
    assert await of(site, "cancel", "--run", "run") == {"cancelled": 2}
    assert [tree["id"] for tree in (await of(site))["trees"]] == ["other/1"]
    assert await of(site, "cancel", "--all") == {"cancelled": 1}
    assert await of(site) == {"trees": [], "more": False}


async def test_what_is_printed_cannot_steer_the_terminal(site):
    code, out, err = await ibtpo("trees", "--server", site.target)
    assert (code, err) == (0, "")
    assert "\x1b" not in out and r"run/\x1b[2J\nmine" in out and "3 failed" in out


async def test_a_limit_says_that_more_follow(site):
    found = await of(site, "--limit", "3", "--run", "run")
    assert len(found["trees"]) == 3 and not found["more"]
    found = await of(site, "--limit", "2")
    assert len(found["trees"]) == 2 and found["more"]
    _, out, _ = await ibtpo("trees", "--server", site.target, "--limit", "2")
    assert "--limit 4" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["revive"], "exactly one of --id, --run, --all"),
        (["purge", "--id", "a", "--all"], "exactly one of"),
        (["purge", "--all", "--state", "leased"], "in use"),
        (["cancel", "--all", "--state", "dead"], "list and purge only"),
        (["--all"], "with list"),
        (["--limit", "0"], "1 or more"),
        (["--state", "lost"], "invalid choice"),
    ],
)
async def test_bad_input_is_one_line(words, said):
    code, out, err = await ibtpo("trees", *words)
    assert code == 1 and out == "" and said in err and err.count("\n") == 1
