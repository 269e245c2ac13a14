"""What an evaluation finds: mean reward with an interval, pass@n, what was cut off or failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_Z = 1.959964
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Outcome:
    """What became of one problem: the rewards of its samples, how many of these were cut off at the
    limit of tokens, what they were sampled with, and the oldest and newest weight version."""

    rewards: tuple[float, ...]
    truncated: int
    temperature: float
    max_new_tokens: int
    versions: tuple[int, int]

    @property
    def mean(self) -> float:
        return sum(self.rewards) / len(self.rewards)


@dataclass(frozen=True)
class Accuracy:
    """Mean reward over problems with its 95 % interval (`interval`).

    `problems` were graded, each with `samples` rollouts; `pass_at_n` is the mean of each problem's
    best reward; `truncated` counts rollouts cut off at `max_new_tokens`. Problems that `failed` are
    in none of these figures; `first_failure` says why the first of them did.
    """

    mean: float
    low: float
    high: float
    problems: int
    samples: int = 1
    pass_at_n: float = math.nan
    truncated: int = 0
    failed: int = 0
    first_failure: str = ""
    temperature: float = math.nan
    max_new_tokens: int = 0
    seconds: float = math.nan


def accuracy_of(
    outcomes: Sequence[Outcome], samples: int, failures: Sequence[str], seconds: float
) -> Accuracy:
    """The figures of at least one outcome."""
    means = [outcome.mean for outcome in outcomes]
    return Accuracy(
        sum(means) / len(means),
        *interval(means, samples),
        problems=len(outcomes),
        samples=samples,
        pass_at_n=sum(max(outcome.rewards) for outcome in outcomes) / len(outcomes),
        truncated=sum(outcome.truncated for outcome in outcomes),
        failed=len(failures),
        first_failure=failures[0] if failures else "",
        temperature=outcomes[0].temperature,
        max_new_tokens=outcomes[0].max_new_tokens,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Gain:
    """Mean of the differences of problems that two evaluations share, with its 95 % interval."""

    mean: float
    low: float
    high: float
    problems: int


def paired_gain(before: Mapping[str, float], after: Mapping[str, float]) -> Gain:
    """What problems gained from `before` to `after`, which hold a mean reward for each problem.

    The interval is the normal one over the differences (the t quantile is 2 % longer for 50
    problems): which problems are hard cancels out, so it is shorter than the two accuracies' own.
    Raises ValueError for fewer than two shared problems.
    """
    differences = [after[problem] - before[problem] for problem in before if problem in after]
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} problems are in both evaluations; at least 2 must be")
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    half = _Z * math.sqrt(variance / count)
    return Gain(mean, mean - half, mean + half, count)


def interval(means: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean over problems, whose `means` are those of `samples` rewards each.

    Wilson's, of as many observations as the problems' means are worth by their spread (Kish's
    effective size: mean (1 - mean) / variance of the mean): one a problem where the samples of a
    problem agree, one a sample where they differ as much as those of other problems. Near the
    middle it is the normal interval over problems' means, which near 0 and 1 is too short. Of one
    sample a problem with rewards 0 and 1 it is Wilson's itself.
    """
    count = len(means)
    if not count:
        return 0.0, 1.0
    mean = sum(means) / count
    spread = sum((value - mean) ** 2 for value in means) / count
    most = mean * (1 - mean)
    worth = samples if spread * samples < most else most / spread if spread else 1.0
    return wilson(mean, count * max(worth, 1.0))


def wilson(mean: float, count: float) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if not count:
        return 0.0, 1.0
    z = _Z
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
