"""Figures of an evaluation: intervals against their coverage, pass@n, what is counted apart."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ibtree.evaluation.accuracy import Outcome, accuracy_of, interval, paired_gain, wilson


def outcome(*rewards: float, truncated: int = 0) -> Outcome:
    return Outcome(rewards, truncated, 0.5, 64, (3, 3))


def test_figures_of_a_few_problems():
    outcomes = [outcome(1, 0, 0, 0, truncated=2), outcome(1, 1, 1, 1), outcome(0, 0, 0, 0)]
    accuracy = accuracy_of(outcomes, 4, ["this was wrong", "that"], 2.5)
    assert accuracy.mean == pytest.approx(5 / 12)
    assert accuracy.pass_at_n == pytest.approx(2 / 3)
    assert (accuracy.problems, accuracy.samples, accuracy.truncated) == (3, 4, 2)
    assert (accuracy.failed, accuracy.first_failure) == (2, "this was wrong")
    assert (accuracy.temperature, accuracy.max_new_tokens, accuracy.seconds) == (0.5, 64, 2.5)
    assert 0 < accuracy.low < accuracy.mean < accuracy.high < 1


def test_one_sample_a_problem_is_wilsons_interval():
    for right, count in [(0, 7), (1, 7), (20, 40), (40, 40), (1, 1)]:
        means = [1.0] * right + [0.0] * (count - right)
        assert interval(means, 1) == pytest.approx(wilson(right / count, count))
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval([], 4) == (0.0, 1.0)


def test_samples_that_agree_are_worth_one():
    means = [1.0] * 30 + [0.0] * 10
    assert interval(means, 16) == pytest.approx(wilson(0.75, 40))
    assert interval([0.0] * 40, 16) == pytest.approx(wilson(0.0, 40))
    assert interval([0.5] * 40, 16) == pytest.approx(wilson(0.5, 40 * 16))


def test_in_the_middle_it_is_the_interval_of_a_bootstrap_over_problems():
    rng = np.random.default_rng(0)
    means = rng.binomial(8, rng.beta(1.0, 1.0, 1319)) / 8
    drawn = rng.choice(means, (4000, len(means))).mean(axis=1)
    expected = np.percentile(drawn, [2.5, 97.5])
    assert interval(means.tolist(), 8) == pytest.approx(expected.tolist(), abs=0.002)


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize(("right", "wrong"), [(1.0, 1.0), (9.0, 1.0), (0.2, 0.3), (60.0, 2.0)])
def test_it_covers_the_truth_in_95_of_100_evaluations(samples, right, wrong):
    """Problems of random difficulty, Beta(right, wrong); 60 of them an evaluation."""
    rng, truth, covered = random.Random(1), right / (right + wrong), 0
    for _ in range(1000):
        difficulties = [rng.betavariate(right, wrong) for _ in range(60)]
        means = [sum(rng.random() < d for _ in range(samples)) / samples for d in difficulties]
        low, high = interval(means, samples)
        covered += low <= truth <= high
    assert 925 <= covered <= 995


def test_a_paired_gain_is_that_of_the_problems_both_have():
    before = {"a": 0.0, "b": 0.5, "c": 1.0, "gone": 0.0}
    after = {"a": 0.5, "b": 0.5, "c": 1.0, "new": 1.0}
    gain = paired_gain(before, after)
    assert (gain.mean, gain.problems) == (pytest.approx(1 / 6), 3)
    half = 1.959964 * np.std([0.5, 0.0, 0.0], ddof=1) / np.sqrt(3)
    assert (gain.low, gain.high) == pytest.approx((1 / 6 - half, 1 / 6 + half))
    with pytest.raises(ValueError, match="1 problems"):
        paired_gain({"a": 0.0}, after)


def test_a_paired_gain_covers_the_truth_in_95_of_100_evaluations():
    """Four samples a problem, problems of any difficulty, all of them a tenth easier after."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        chances = 0.9 * rng.beta(0.4, 0.8, 100)
        before, after = (rng.binomial(4, chances + more) / 4 for more in (0.0, 0.1))
        gain = paired_gain(dict(enumerate(before)), dict(enumerate(after)))
        covered += gain.low <= 0.1 <= gain.high
    assert 0.93 <= covered / 2000 <= 0.97
