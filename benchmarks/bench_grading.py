"""`make bench-grading`: gradings a second of `math`, with two grading processes.

Worked answers as models write them, half of them wrong: in equal shares marked, boxed, with units,
as a sentence, with trailing text (as in tests/server_ext/rewards/test_gsm8k.py), and by themselves
formulas as in the MATH data set, of which no two are alike.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ibtree.messages import Submission
from server_ext.rewards.math import MathGrader
from server_ext.rewards.pool import GradingPool

OUT = Path(__file__).parent / "out" / "grading.json"
PROCESSES, COUNT = 2, 3000
WRITINGS = {
    "marked": "#### {}",
    "boxed": r"So we get $\boxed{{{}}}$.",
    "units": "#### {:,} dollars",
    "sentence": "The answer is {:,}.",
    "trailing": "#### {}\nI hope that helps, in 2 or 3 ways!",
}


def worked(rng: random.Random, writing: str) -> Submission:
    """Six steps of arithmetic, as in GSM8K."""
    lines, total = [], 0
    for _ in range(6):
        more = rng.randrange(1, 400)
        lines.append(
            f"That makes {total} + {more} = <<{total}+{more}={total + more}>>{total + more}."
        )
        total += more
    said = total + rng.randrange(2)
    return Submission("Q", "\n".join([*lines, WRITINGS[writing].format(said)]), f"{total:,}")


def formula(rng: random.Random) -> Submission:
    a, b, c = (rng.randrange(2, 1000) for _ in range(3))
    answer = rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}"
    said = rf"\frac{{{a + rng.randrange(2)}}}{{{c}}} \sqrt{{{b}}}"
    return Submission("Q", rf"so it is $\boxed{{{said}}}$.", answer)


async def rate(grader: MathGrader, submissions: list[Submission]) -> float:
    """Gradings a second [1/s]; about half of them must be right."""
    begin = time.perf_counter()
    rewards = await asyncio.gather(*(grader.grade(submission) for submission in submissions))
    seconds = time.perf_counter() - begin
    assert 0.4 < sum(rewards) / len(rewards) < 0.6, "the grades are wrong"
    return len(submissions) / seconds


async def main() -> None:
    rng, figures = random.Random(0), {}
    pool = GradingPool(PROCESSES, 10.0)
    grader = MathGrader(pool, "####")
    # processes start with their first grades, some seconds that are no grading
    await rate(grader, [worked(rng, "sentence") for _ in range(200)])
    of_each = {name: [worked(rng, name) for _ in range(COUNT)] for name in WRITINGS}
    mixed = [
        submission for many in of_each.values() for submission in many[: COUNT // len(of_each)]
    ]
    rng.shuffle(mixed)
    sets = {"": mixed, **of_each, "formula": [formula(rng) for _ in range(COUNT // 5)]}
    table = Table(title=f"gradings a second, `math`, {PROCESSES} processes")
    table.add_column("answers")
    table.add_column("1/s", justify="right")
    for name, submissions in sets.items():
        figures["_".join(["gradings_per_s", *name.split()])] = await rate(grader, submissions)
        table.add_row(name or "the first five, mixed", f"{list(figures.values())[-1]:,.0f}")
    pool.close()
    Console().print(table)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
