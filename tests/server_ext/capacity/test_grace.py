"""Who is given the time that is left."""

from __future__ import annotations

import random

import pytest

from server_ext.capacity.grace import kept


@pytest.mark.parametrize(
    ("left_s", "grace_s", "beside", "stay"),
    [
        ({}, 10, 0, []),
        ({"a": 5.0}, 10, 0, ["a"]),
        ({"a": 11.0}, 10, 0, []),
        # two of four remain, so each has twice of the engine
        ({"a": 30.0, "b": 19.0, "c": 100.0, "d": 18.0}, 10, 0, ["d", "b"]),
        # with four calls beside them the two have 6 of 8 parts
        ({"a": 30.0, "b": 19.0, "c": 100.0, "d": 13.0}, 10, 4, ["d"]),
        # the nearer ones alone would end; the third makes them all too slow, and stays away
        ({"a": 1.0, "b": 2.0, "c": 50.0}, 10, 0, ["a", "b"]),
        ({"a": 1.0, "b": None}, 10, 0, ["a", "b"]),
        ({"a": 99.0, "b": None}, 10, 0, []),
        ({"a": None}, 10, 0, ["a"]),
        ({"a": 0.0, "b": 3.0}, 0, 0, ["a"]),
    ],
)
def test_who_stays(left_s, grace_s, beside, stay):
    assert kept(left_s, grace_s, beside) == stay


def test_those_who_stay_are_the_nearest_and_end_in_time():
    rng = random.Random(0)
    for _ in range(300):
        left_s = {n: rng.expovariate(0.05) for n in range(rng.randrange(1, 30))}
        grace_s, beside = rng.uniform(0, 40), rng.randrange(5)
        stay = kept(left_s, grace_s, beside)
        assert stay == sorted(left_s, key=left_s.__getitem__)[: len(stay)]

        def at_their_end_s(n: int, left=left_s, beside=beside) -> float:
            return sorted(left.values())[n - 1] * (n + beside) / (len(left) + beside)

        assert not stay or at_their_end_s(len(stay)) <= grace_s
        assert all(at_their_end_s(n) > grace_s for n in range(len(stay) + 1, len(left_s) + 1))
