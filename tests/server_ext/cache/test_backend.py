"""The radix backend against a naive reference, over random lives of trees."""

from __future__ import annotations

import random
from array import array

import pytest

from server_ext.cache.path_trie import Key
from tests.server_ext.cache.scheduler import (
    FRACTION_VARIABLE,
    MAX_TOKENS,
    Prefix,
    Request,
    Scheduler,
)

VOCABULARY = 3  # small, so that paths meet and split everywhere


def path_of(request: Request) -> Prefix:
    return request.tokens[:-1]


def roll(scheduler: Scheduler, rid: str, prompt: Prefix, rng: random.Random) -> Prefix | None:
    """One whole rollout; None if there was no room for it."""
    request = scheduler.start(rid, prompt)
    if request is None:
        return None
    for _ in range(rng.randrange(1, 20)):
        if len(request.tokens) >= MAX_TOKENS or not scheduler.decode(
            request, rng.randrange(VOCABULARY)
        ):
            break
    else:
        scheduler.finish(request)
        return path_of(request)
    scheduler.abort(request)
    return None


def some_prompt(rng: random.Random) -> Prefix:
    return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 12)))


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("seed", range(25))
def test_random_lives(monkeypatch, seed, core):
    """Opens, branches, closes, expires, updates, retracts and floods, in a pool that is too small:
    every hit is KV of the same prefix and the same weights, and nothing leaks."""
    rng = random.Random(seed)
    scheduler = Scheduler(monkeypatch, rng.choice([60, 150, 400]), core)
    trees, now = scheduler.cache.trees, 0.0
    paths: dict[str, list[Prefix]] = {}
    numbers = iter(range(10**6))
    for _ in range(300):
        action = rng.random()
        now += 1
        if action < 0.1:
            name = f"tree{next(numbers)}"
            trees.open(name, now + rng.randrange(200))
            paths[name] = [some_prompt(rng)]
        elif action < 0.5 and paths:
            name = rng.choice(list(paths))
            base = rng.choice(paths[name])
            prompt = base[: rng.randrange(1, len(base) + 1)] if len(paths[name]) > 1 else base
            if path := roll(scheduler, f"{name}/{next(numbers)}", prompt, rng):
                paths[name].append(path)
        elif action < 0.7:
            roll(scheduler, f"other-{next(numbers)}", some_prompt(rng), rng)
        elif action < 0.78 and paths:
            name = rng.choice(list(paths))
            trees.close(name)
            del paths[name]
        elif action < 0.82:
            for name in trees.expire(now):
                del paths[name]
        elif action < 0.84:
            scheduler.update(rng.choice([scheduler.label, str(scheduler.weights + 1)]))
            if rng.random() < 0.5:
                scheduler.retract()
        elif action < 0.9 and len(scheduler.running) < 3:
            # it runs on across the following actions, updates among them
            owner = rng.choice([*paths, "other"])
            scheduler.start(f"{owner}/{next(numbers)}", some_prompt(rng))
        elif scheduler.running:
            request = rng.choice(scheduler.running)
            if rng.random() < 0.5 and scheduler.decode(request, rng.randrange(VOCABULARY)):
                scheduler.finish(request)
            else:
                scheduler.abort(request)
        scheduler.check()
    for name in list(paths):
        trees.close(name)
    for request in list(scheduler.running):
        scheduler.abort(request)
    scheduler.check()
    assert trees.protected_tokens == 0 and not trees._ends


def grown(scheduler: Scheduler, name: str, seed: int) -> list[Prefix]:
    """An open tree of a few rollouts, branching."""
    rng = random.Random(seed)
    scheduler.cache.trees.open(name, 1e9)
    paths = [tuple(rng.randrange(100) for _ in range(10))]
    for number in range(5):
        base = paths[-1][: rng.randrange(10, len(paths[-1]) + 1)]
        path = roll(scheduler, f"{name}/{number}", base, rng)
        assert path
        paths.append(path)
    return paths[1:]


def flood(scheduler: Scheduler, tokens: int, seed: int = 0) -> None:
    rng = random.Random(f"flood {seed}")
    for number in range(tokens // 40):
        assert roll(
            scheduler, f"flood-{number}", tuple(rng.randrange(9, 99) for _ in range(40)), rng
        )


def test_open_trees_stay(monkeypatch):
    scheduler = Scheduler(monkeypatch, 1000)
    trees = {f"t{i}": grown(scheduler, f"t{i}", i) for i in range(6)}
    assert scheduler.cache.trees.protected_tokens <= scheduler.cache.trees.capacity_tokens
    flood(scheduler, 20_000)
    for paths in trees.values():
        assert all(scheduler.cached(path) == len(path) for path in paths)
    assert scheduler.cache.trees.evicted_tokens == 0


def test_released_trees_go(monkeypatch):
    scheduler = Scheduler(monkeypatch, 1000)
    paths = grown(scheduler, "t", 0)
    assert scheduler.cache.trees.close("t").protected > 0
    flood(scheduler, 20_000)
    assert all(scheduler.cached(path) == 0 for path in paths)


@pytest.mark.parametrize("release", ["expire", "flush", "update"])
def test_other_releases(monkeypatch, release):
    scheduler = Scheduler(monkeypatch, 1000)
    trees = scheduler.cache.trees
    grown(scheduler, "t", 0)
    assert trees.protected_tokens > 0
    if release == "expire":
        assert trees.expire(1e9) == [] and trees.expire(1e9 + 1) == ["t"]
    elif release == "update":
        scheduler.update("1")
    else:
        scheduler.cache.reset()
        scheduler.allocator.clear()
    assert trees.protected_tokens == 0 and not trees._ends
    flood(scheduler, 2000)
    scheduler.check()


def test_beyond_the_cap_the_oldest_tree_goes_first(monkeypatch):
    scheduler = Scheduler(monkeypatch, 400)
    trees = {f"t{i}": grown(scheduler, f"t{i}", i) for i in range(8)}
    open_trees = scheduler.cache.trees
    assert open_trees.protected_tokens > open_trees.capacity_tokens
    for path in trees["t0"]:
        scheduler.match(path)  # used last, yet the first to go
    flood(scheduler, 8000)
    whole = [all(scheduler.cached(p) == len(p) for p in paths) for paths in trees.values()]
    sizes = [len({p[:n] for p in paths for n in range(1, len(p) + 1)}) for paths in trees.values()]
    fits = [sum(sizes[i:]) <= open_trees.capacity_tokens for i in range(8)]
    assert whole == fits, "not the newest that fit were kept"
    assert whole[-1] and not whole[0]


def test_protection_never_keeps_a_request_out(monkeypatch):
    """A request that needs the whole pool gets it, from the oldest tree to the newest."""
    monkeypatch.setenv(FRACTION_VARIABLE, "1")
    scheduler = Scheduler(monkeypatch, 300)
    trees = [grown(scheduler, f"t{i}", i) for i in range(3)]
    protected_before = scheduler.cache.trees.protected_tokens
    assert protected_before > 120
    request = scheduler.start("big", tuple(range(1000, 1000 + MAX_TOKENS)))
    other = scheduler.start("big2", tuple(range(2000, 2000 + MAX_TOKENS)))
    assert request and other
    assert all(scheduler.cached(p) == len(p) for p in trees[-1]), (
        "the newest went though others were left"
    )
    assert scheduler.start("big3", tuple(range(3000, 3000 + MAX_TOKENS)))
    scheduler.check()
    assert scheduler.cache.trees.evicted_tokens > 0


def test_what_was_evicted_and_computed_again_is_counted(monkeypatch):
    scheduler = Scheduler(monkeypatch, 200)
    paths = grown(scheduler, "t", 1)
    trees = scheduler.cache.trees
    base = paths[-1]
    scheduler.start("big", tuple(range(1000, 1000 + MAX_TOKENS)))
    scheduler.start("big2", tuple(range(2000, 2000 + MAX_TOKENS)))
    left = scheduler.cached(base)
    assert left < len(base)
    for request in list(scheduler.running):
        scheduler.abort(request)
    request = scheduler.start("t/9", base)
    assert request and request.cached_tokens == min(left, len(base) - 1)
    scheduler.decode(request, 5)
    scheduler.finish(request)
    account = trees.close("t")
    assert account.refilled == len(base) - 1 - request.cached_tokens


def test_what_is_left_of_a_path_stays_protected(monkeypatch):
    scheduler = Scheduler(monkeypatch, 200)
    scheduler.cache.trees.open("t", 1e9)
    prompt = tuple(range(40))
    for number in range(2):  # two paths that share the prompt
        request = scheduler.start(f"t/{number}", prompt)
        for token in range(30):
            scheduler.decode(request, 100 * number + token)
        scheduler.finish(request)
    wide = [scheduler.start(f"big{i}", tuple(range(1000 * i, 1000 * i + 75))) for i in (1, 2)]
    for request in wide:
        scheduler.abort(request)  # nobody needs so much any more
    left = scheduler.cached(prompt)
    assert left == len(prompt) and scheduler.cache.trees.evicted_tokens > 0
    flood(scheduler, 4000)
    assert scheduler.cached(prompt) == left


def test_requests_that_start_together_refill_nothing(monkeypatch):
    """What the second computes the first has not cached yet when it starts."""
    scheduler = Scheduler(monkeypatch, 1000)
    scheduler.cache.trees.open("t", 1e9)
    prompt = tuple(range(20))
    requests = [Request(f"t/{i}", array("q", prompt)) for i in range(2)]
    for request in requests:
        assert len(scheduler.match(prompt[:-1], request)) == 0
    for request in requests:
        key = Key(array("q", (*prompt, 5)), ("", None))
        scheduler.cache.trees.finished(request.rid, key, len(prompt), 0, int(request.rid[-1]) + 50)
    assert scheduler.cache.trees.close("t").refilled == 0


def test_an_update_is_not_an_eviction(monkeypatch):
    scheduler = Scheduler(monkeypatch, 1000)
    paths = grown(scheduler, "t", 1)
    scheduler.update("1")
    assert scheduler.cached(paths[0]) == 0
    assert roll(scheduler, "t/9", paths[-1], random.Random(0))
    account = scheduler.cache.trees.close("t")
    assert account.refilled == 0


def test_the_same_label_twice_is_two_versions(monkeypatch):
    scheduler = Scheduler(monkeypatch, 1000)
    paths = grown(scheduler, "t", 1)
    scheduler.update(scheduler.label)
    assert len(scheduler.match(paths[0])) == 0


def test_a_request_that_outlives_an_update_leaves_nothing_to_hit(monkeypatch):
    scheduler = Scheduler(monkeypatch, 1000)
    scheduler.cache.trees.open("t", 1e9)
    request = scheduler.start("t/0", (1, 2, 3, 4))
    scheduler.decode(request, 5)
    scheduler.update("1")
    scheduler.decode(request, 6)
    scheduler.finish(request)
    assert len(scheduler.match((1, 2, 3, 4, 5))) == 0
    assert scheduler.cache.trees.protected_tokens == 0
    scheduler.check()


def test_a_retracted_request_comes_back_under_the_new_weights(monkeypatch):
    scheduler = Scheduler(monkeypatch, 1000)
    request = scheduler.start("t/0", (1, 2, 3, 4))
    scheduler.decode(request, 5)
    scheduler.update("1")
    scheduler.retract()
    scheduler.decode(request, 6)
    scheduler.finish(request)
    assert len(scheduler.match((1, 2, 3, 4, 5))) == 5


def test_a_request_interrupted_by_an_update_refills_nothing(monkeypatch):
    """SGLang counts what it found in the cache when it first began; what others of the tree have
    computed under the new weights meanwhile, and it finds, was not evicted."""
    scheduler = Scheduler(monkeypatch, 1000)
    scheduler.cache.trees.open("t", 1e9)
    prompt = tuple(range(20))
    interrupted = scheduler.start("t/0", prompt)
    assert interrupted and interrupted.cached_tokens == 0
    scheduler.decode(interrupted, 5)
    scheduler.update("1")
    scheduler.running.remove(interrupted)  # it is retracted, and waits for its turn
    assert roll(scheduler, "t/1", prompt, random.Random(0))
    scheduler.running.append(interrupted)
    scheduler.retract()
    scheduler.decode(interrupted, 6)
    scheduler.finish(interrupted)
    assert scheduler.cache.trees.close("t").refilled == 0


def test_dead_versions_make_room(monkeypatch):
    """No flush: what old weights computed goes first."""
    scheduler = Scheduler(monkeypatch, 600)
    flood(scheduler, 600)
    scheduler.update("1")
    paths = [grown(scheduler, f"t{i}", i) for i in range(3)]
    flood(scheduler, 400, seed=1)
    assert all(scheduler.cached(path) == len(path) for tree in paths for path in tree)
    assert scheduler.cache.trees.evicted_tokens == 0
    for seed in range(2, 6):
        flood(scheduler, 400, seed=seed)
    scheduler.check()


def test_probe_counts_stale_slots(monkeypatch):
    """Corrupted on purpose: otherwise nobody would see the counter count."""
    scheduler = Scheduler(monkeypatch, 600)
    path = grown(scheduler, "t", 0)[0]
    assert scheduler.cache.probe(list(path)) == (len(path), 0)
    slots = scheduler.match(path)
    scheduler.cache._computed_by[slots[:3]] = 7
    assert scheduler.cache.probe(list(path)) == (len(path), 3)
