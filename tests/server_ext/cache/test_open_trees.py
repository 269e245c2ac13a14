"""The bookkeeping of open trees, against whole paths in lists, and at full size."""

from __future__ import annotations

import random
import time
from array import array

import numpy as np
import pytest

from server_ext.cache.open_trees import OpenTrees
from server_ext.cache.path_trie import Key
from tests.reference.slow_open_trees import Path, SlowOpenTree


def key(path: Path) -> Key:
    return Key(array("q", path[1]), (path[0],))


def some_path(rng: random.Random, paths: list[Path]) -> Path:
    """Often one that shares a prefix with another."""
    namespace, tokens = rng.choice(paths) if paths and rng.random() < 0.8 else ("", ())
    head = tokens[: rng.randrange(len(tokens) + 1)]
    tail = tuple(rng.randrange(2) for _ in range(rng.randrange(6)))
    return (namespace if rng.random() < 0.9 else "other"), (head + tail) or (1,)


@pytest.mark.parametrize("seed", range(60))
def test_random_lives_of_a_tree(seed):
    rng = random.Random(seed)
    trees, slow = OpenTrees(10**6), SlowOpenTree()
    trees.open("t", 1.0)
    paths: list[Path] = []
    for number in range(120):
        action = rng.random()
        if action < 0.25:
            rid = f"t/{rng.randrange(6)}"
            trees.started(rid)
            slow.start(rid)
        elif action < 0.7:
            rid, path = f"t/{rng.randrange(6)}", some_path(rng, paths)
            prompt, node = rng.randrange(1, len(path[1]) + 1), rng.randrange(40)
            cached = rng.randrange(prompt)
            trees.finished(rid, key(path), prompt, cached, node)
            slow.finish(rid, path, prompt, cached, node)
            paths.append(path)
        elif action < 0.98 and slow.nodes:
            node = rng.choice([*slow.nodes])
            left, end = rng.randrange(len(slow.nodes[node][1]) + 1), 100 + number
            [evicted] = trees.evicted(node)
            trees.shortened(evicted, left, end)
            slow.evict(node, left, end)
        elif action > 0.98:
            trees.forget_paths()
            slow.forget()
        assert trees.protected_tokens == slow.protected
        for node, path in slow.nodes.items():
            held = trees.key_of(node)
            assert (held.namespace, tuple(held.tokens)) == ((path[0],), path[1])
    assert trees.close("t").refilled == slow.refilled
    assert not trees._ends


def test_a_node_where_paths_of_two_trees_end():
    trees, path = OpenTrees(10**6), ("", (1, 2, 3))
    for name in "ab":
        trees.open(name, 1.0)
        trees.finished(f"{name}/0", key(path), 2, 0, node=7)
    assert trees.protected_tokens == 6
    for evicted in trees.evicted(7):
        trees.shortened(evicted, 1, 8)
    assert trees.protected_tokens == 2 and trees.evicted_tokens == 4
    assert trees.close("a").protected == 1 and trees.protects(8)


def test_a_request_that_starts_anew_under_new_weights_knows_only_their_paths():
    trees = OpenTrees(10**6)
    trees.open("t", 1.0)
    for number in range(2):
        trees.finished(f"t/{number}", key(("", (1, 2, 3))), 2, 0, node=number)
    trees.started("t/2")
    trees.forget_paths()
    trees.started("t/2")  # retracted, it looks for its prefix again
    trees.finished("t/3", key(("", (1, 2, 3, 4))), 2, 0, node=8)
    trees.finished("t/2", key(("", (1, 2, 3, 4))), 4, 0, node=9)
    assert trees.close("t").refilled == 0


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
def test_what_fills_no_page_is_computed_in_any_case(page_tokens):
    """A branch of 10 tokens of which the tree has had all: what the cache finds are whole pages."""
    trees, tokens = OpenTrees(10**6, page_tokens), tuple(range(20))
    trees.open("t", 1.0)
    trees.finished("t/0", key(("", tokens)), 2, 0, node=0)
    trees.started("t/1")
    whole_pages = 9 // page_tokens * page_tokens
    trees.finished("t/1", key(("", (*tokens[:10], 99))), 10, whole_pages, node=1)
    assert trees.close("t").refilled == 0
    trees.open("t", 1.0)
    trees.finished("t/0", key(("", tokens)), 2, 0, node=2)
    trees.started("t/1")
    trees.finished("t/1", key(("", (*tokens[:10], 99))), 10, 0, node=3)
    assert trees.close("t").refilled == whole_pages, "all of them were evicted"


def test_a_large_tree_does_not_hold_up_the_scheduler():
    """256 paths of 32k tokens: comparing each with all took seconds. The bound of a call is a
    hundred times what it takes."""
    rng, trees, ids = random.Random(0), OpenTrees(10**9), np.random.default_rng(0)
    trees.open("t", 1.0)
    tokens = ids.integers(0, 150_000, 32_768)
    slowest_s = 0.0
    for number in range(256):
        at = rng.randrange(1000, 32_000)
        tokens = np.concatenate([tokens[:at], ids.integers(0, 150_000, 32_768 - at)])
        path = Key(array("q", tokens.tobytes()))
        began = time.process_time()
        trees.started(f"t/{number}")
        trees.finished(f"t/{number}", path, at, at, node=number)
        slowest_s = max(slowest_s, time.process_time() - began)
    assert slowest_s < 0.02


@pytest.mark.parametrize(
    ("page", "prompt", "cached", "refilled"),
    [(1, 30, 16, 13), (16, 30, 16, 0), (16, 30, 0, 16), (16, 33, 16, 16), (64, 40, 0, 0)],
)
def test_pages_that_cannot_be_found_are_not_refilled(page, prompt, cached, refilled):
    """The cache finds whole pages: the tokens after the last one are computed every time."""
    trees = OpenTrees(10**6, page)
    trees.open("t", 1.0)
    path = key(("", tuple(range(48))))
    trees.finished("t/0", path, 2, 0, node=1)
    trees.started("t/1")
    trees.finished("t/1", path, prompt, cached, node=1)
    assert trees.close("t").refilled == refilled
