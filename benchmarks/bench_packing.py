"""`make bench-packing`: a step on packed trees beside one trajectory by trajectory.

On the CPU each way is a process of its own and takes its steps in turn with the others;
`--device cuda` measures another model, see packing_cuda.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from figures import show
from shortage_model import make_model

HERE = Path(__file__).parent
OUT = HERE / "out"
TREE = {"prompt": 256, "tokens": 1024, "step": 32}
WARM = {"prompt": 16, "tokens": 32, "step": 8}
GRADIENTS = [
    {"prompt": 5, "tokens": 20, "step": 3},
    {"prompt": 40, "tokens": 60, "step": 1},
    {"prompt": 1, "tokens": 200, "step": 13},
]
ARMS = {
    "packed": {"forward": "packed", "micro_batch_tokens": 16384},
    "rows": {"forward": "trajectory", "micro_batch_tokens": 1},
    "rows_whole": {"forward": "trajectory", "micro_batch_tokens": 16384},
}
"""A tree in one pass, a trajectory at a time (the faster of the two), all of them in one batch."""
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
"""glibc gives larger blocks back at once, and their pages are cleared at every use. A pack's blocks
are such, a row's are not: where time is measured it keeps both."""


class Arm:
    """A process of packing_arm.py; commands are answered in order."""

    def __init__(
        self, name: str, model: Path, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name = name
        settings = {"model": str(model), "threads": threads, **ARMS[name]}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "packing_arm.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
        )

    def __enter__(self) -> Self:
        self._answer("READY")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()

    def __call__(self, do: str, **arguments: Any) -> dict[str, float]:
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._answer("RESULT ")
        print(do, self._name, answer.strip(), file=sys.stderr)
        return json.loads(answer)

    def _answer(self, word: str) -> str:
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit("an arm ended")


def gradient_error(arms: Sequence[Arm], folder: Path) -> float:
    """Largest relative difference of the two gradients (global norm, float32)."""
    errors = []
    for seed, shape in enumerate(GRADIENTS):
        gradients = []
        for arm in arms:
            arm("gradient", file=str(folder / "gradient"), seed=seed, **shape)
            gradients.append(torch.load(folder / "gradient").double())
        errors.append(float((gradients[0] - gradients[1]).norm() / gradients[1].norm()))
    return max(errors)


def whole_step(name: str, model: Path, threads: int) -> dict[str, float]:
    """A step on a tree in a fresh process, after a small one that makes the optimiser's state."""
    with Arm(name, model, threads) as arm:
        arm("step", seed=0, **WARM)
        return arm("step", seed=0, **TREE)


def on_cpu(pairs: int, threads: int) -> dict[str, float]:
    """Speed-up against a trajectory at a time, in processor time (on one thread that is the clock
    of an undisturbed machine), and memory against all of them in one batch."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        packed_whole, rows_whole = (  # one after the other: the second takes 12 GB
            whole_step(name, model, threads) for name in ("packed", "rows_whole")
        )
        with ExitStack() as stack:
            arms = [
                stack.enter_context(Arm(name, model, threads, KEEP)) for name in ("packed", "rows")
            ]
            for arm in arms:
                arm("step", seed=0, **WARM)
            figures = {"grad_max_rel_error": gradient_error(arms, Path(folder))}
            both = [[arm("step", seed=s, **TREE) for arm in arms] for s in range(pairs + 1)]
            packed, rows = zip(*both[1:], strict=True)  # the first steps touch their memory anew
    limits = [step["token_ratio"] for step in packed]

    def ratios(key: str) -> list[float]:
        return [r[key] / p[key] for p, r in zip(packed, rows, strict=True)]

    shares = [r / limit for r, limit in zip(ratios("cpu_seconds"), limits, strict=True)]
    return figures | {
        "speedup": statistics.median(ratios("cpu_seconds")),
        "speedup_limit": statistics.median(limits),
        "speedup_share_of_limit": statistics.median(shares),
        "speedup_share_low": min(shares),
        "speedup_share_high": max(shares),
        "speedup_clock": statistics.median(ratios("seconds")),
        "packed_cpu_s": statistics.median(step["cpu_seconds"] for step in packed),
        "rows_cpu_s": statistics.median(step["cpu_seconds"] for step in rows),
        "speedup_whole": rows_whole["cpu_seconds"] / packed_whole["cpu_seconds"],
        "memory_ratio": packed_whole["peak_mb"] / rows_whole["peak_mb"],
        "packed_peak_mb": packed_whole["peak_mb"],
        "rows_whole_peak_mb": rows_whole["peak_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, default=3, help="steps of each way on the CPU")
    parser.add_argument("--threads", type=int, default=1, help="of each way on the CPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        from packing_cuda import on_cuda

        name, figures = "packing_cuda", on_cuda()
    else:
        name, figures = "packing", on_cpu(arguments.pairs, arguments.threads)
    show("packed trees beside trajectory by trajectory", figures, OUT / f"{name}.json")


if __name__ == "__main__":
    main()
