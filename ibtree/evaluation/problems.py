"""The problems of an evaluation, each with a key, and the file of those that are finished."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ibtree.evaluation.accuracy import Outcome
from ibtree.messages import Chat, Prompt
from ibtree.tree.options import check_integer

_SHAPE = {
    "strategy": "independent",
    "schedule": "rounds",
    "rounds": 1,
    "branch_nodes": 1,
    "branch_rollouts": 1,
}


@dataclass(frozen=True)
class Problem:
    """What is asked, and a key that is the same whenever the same is asked of the same weights;
    `content` is the same whatever the weights and however it is sampled."""

    key: str
    content: str
    prompt: Prompt


def problems_of(
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    samples: int,
    seed: int | None,
    weights: str,
) -> list[Problem]:
    """One tree of `samples` independent rollouts a prompt; `options` say how they are sampled.
    `seed` gives each problem a seed of its own; None: the server draws them. Raises FieldError."""
    check_integer("samples", samples, 1, 4096)
    asked = {**options, **_SHAPE, "init_rollouts": samples}
    asked.pop("seed", None)
    setting = json.dumps([asked, seed, weights], sort_keys=True, default=list)
    earlier: Counter[str] = Counter()
    problems = []
    for prompt in prompts:
        content = asdict(prompt.content) if isinstance(prompt.content, Chat) else prompt.content
        what = json.dumps([content, prompt.answer, prompt.grader], sort_keys=True, default=list)
        numbered = f"{what}{earlier[what]}"
        earlier[what] += 1
        digest = hashlib.sha256(f"{setting}{numbered}".encode()).digest()
        own = {} if seed is None else {"seed": int.from_bytes(digest[:7])}
        problems.append(
            Problem(
                digest.hex()[:32],
                hashlib.sha256(numbered.encode()).hexdigest()[:32],
                replace(prompt, id="", options=asked | own),
            )
        )
    return problems


class FinishedProblems:
    """Outcomes by key, kept in a JSON lines file if there is a path: an evaluation that was killed
    goes on from it. Lines of other problems, settings and weights are left as they are."""

    def __init__(self, path: Path | None) -> None:
        """Raises OSError if the file cannot be written."""
        self._outcomes: dict[str, Outcome] = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            self._note(line)
        if not line.endswith(b"\n"):  # cut off by a kill
            self._file.write(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def of(self, problem: Problem) -> Outcome | None:
        return self._outcomes.get(problem.key)

    def add(self, problem: Problem, outcome: Outcome) -> None:
        """Survives a kill of this process from here on."""
        if self._file:
            key = {"problem": problem.key, "content": problem.content}
            line = json.dumps(key | asdict(outcome))
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def _note(self, line: bytes) -> None:
        if found := _outcome_of(line, "problem"):
            self._outcomes[found[0]] = found[1]


def outcomes_by_content(path: Path) -> dict[str, Outcome]:
    """The outcomes in the file of an evaluation, by their problems' `content`: what two
    evaluations, of different weights or settings, are paired by. Raises OSError."""
    return dict(found for line in path.open("rb") if (found := _outcome_of(line, "content")))


def _outcome_of(line: bytes, key: str) -> tuple[str, Outcome] | None:
    """The outcome of a line and its field `key`; None if it was cut off, or is not ours."""
    try:
        entry = json.loads(line)
        low, high = entry["versions"]
        return str(entry[key]), Outcome(
            rewards=tuple(map(float, entry["rewards"])),
            truncated=int(entry["truncated"]),
            temperature=float(entry["temperature"]),
            max_new_tokens=int(entry["max_new_tokens"]),
            versions=(low, high),
        )
    except (ValueError, KeyError, TypeError):
        return None
