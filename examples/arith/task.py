"""The arith task: chains of single-digit additions and subtractions mod 10.

A prompt is ``3+4-5+1=?`` and a newline.  A completion works it out from the left, one operation
a step, a blank line between steps, and ends with the answer line::

    3+4
    =7

    7-5
    =2

    2+1
    =3

    #### 3

The task is small enough for a tiny model on a CPU, yet a chain goes wrong wherever one step
does, so what a tree of steps tells about each step is worth something.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HELD_OUT_EVERY = 8
"""One prompt in this many, by hash, is held out."""


class Problem(NamedTuple):
    """A prompt, as the model sees it, and the one digit that answers it."""

    prompt: str
    answer: str


def _apply(value: int, operation: str) -> int:
    """The value after an operation such as ``+4`` or ``-5``, mod 10."""
    return (value + int(operation)) % 10


def _parse(prompt: str) -> tuple[int, list[str]]:
    """The first digit of a prompt and the operations after it."""
    chain = prompt.removesuffix("=?\n")
    return int(chain[0]), re.findall(r"[+-]\d", chain)


def make_problem(rng: random.Random, terms: int) -> Problem:
    """Draw one problem of so many terms: digits and signs are uniform and independent."""
    value = rng.randrange(10)
    prompt = str(value)
    for _ in range(terms - 1):
        operation = rng.choice("+-") + str(rng.randrange(10))
        prompt += operation
        value = _apply(value, operation)
    return Problem(f"{prompt}=?\n", str(value))


def solution(problem: Problem, rng: random.Random, wrong: float = 0.0) -> str:
    """A demonstration, each step of which is wrong with probability ``wrong``.

    A wrong step writes another digit, drawn uniformly, and the next step goes on from it.  A model
    fitted to such demonstrations slips at that rate when sampled, and is right when greedy: it
    has room to improve, and a right step always to be found.
    """
    value, operations = _parse(problem.prompt)
    steps = []
    for operation in operations:
        result = _apply(value, operation)
        if rng.random() < wrong:
            result = (result + rng.randrange(1, 10)) % 10
        steps.append(f"{value}{operation}\n={result}")
        value = result
    return "\n\n".join([*steps, f"#### {value}"])


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out side, whatever the seed or the set's size."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_EVERY == 0


def problems(n: int, terms: int, seed: int, side: bool | None = None) -> list[Problem]:
    """The same n distinct problems for the same arguments.

    ``side`` keeps to one side of the split: True for held-out prompts, False for the others.
    """
    possible = 10 * 20 ** (terms - 1)
    share = 1.0 if side is None else 1 / HELD_OUT_EVERY if side else 1 - 1 / HELD_OUT_EVERY
    # A short chain has few problems: ask for more than half of them and the draw below may not end.
    if n > possible * share / 2:
        raise ValueError(f"too few problems of {terms} terms to draw {n} distinct ones")
    rng = random.Random(f"{seed}/{terms}")
    drawn: dict[str, Problem] = {}
    while len(drawn) < n:
        problem = make_problem(rng, terms)
        if side is None or held_out(problem.prompt) == side:
            drawn.setdefault(problem.prompt, problem)
    return list(drawn.values())


def split(
    n_train: int, n_held_out: int, terms: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """A training and a held-out set; no prompt is in the training set of one seed and in the
    held-out set of another, as the prompt alone decides its side."""
    return problems(n_train, terms, seed, False), problems(n_held_out, terms, seed, True)


def write_jsonl(path: str | Path, items: Iterable[Problem]) -> None:
    """Write problems one JSON object a line, with the keys ``prompt`` and ``answer``."""
    lines = (json.dumps(item._asdict()) + "\n" for item in items)
    Path(path).write_text("".join(lines), encoding="utf-8")
