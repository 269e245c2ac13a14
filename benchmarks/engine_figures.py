"""The parts of bench_engine.py that run whole engines, each in a process of its own
(engine_arm.py), one thread each; arms take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import scheduler_clock
from arm_process import ArmProcess

OUT = Path(__file__).parent / "out"
ARITH = Path(__file__).parents[1] / "examples" / "arith" / "model"
Figures = dict[str, float]


class Arm(ArmProcess):
    """A process of engine_arm.py; `stock`: with SGLang's own attention and sampler."""

    def __init__(self, model: Path, dtype: str, pool_tokens: int, *, stock: bool = False) -> None:
        settings = {
            "model": str(model),
            "dtype": dtype,
            "stock": stock,
            "arguments": [f"--max-total-tokens={pool_tokens}"],
        }
        clock = OUT / ("clock-stock.json" if stock else "clock-ours.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", scheduler_clock.VARIABLE: str(clock)}
        if stock:
            environment["IBTPO_BENCH_STOCK"] = "1"
        log = "engine-stock.log" if stock else "engine-ours.log"
        super().__init__("engine_arm.py", settings, log, environment)


def decode(model: Path) -> Figures:
    """Generated tokens a second of the real model, prompts of 300 tokens in the cache."""
    figures = {}
    with ExitStack() as stack:
        ours = stack.enter_context(Arm(model, "bfloat16", 65_536))
        stock = stack.enter_context(Arm(model, "bfloat16", 65_536, stock=True))
        for rollouts, tokens, suffix in ((32, 32, ""), (128, 16, "_128")):
            work = {"rollouts": rollouts, "prompt_tokens": 300, "new_tokens": tokens, "seed": 1}
            pairs = [(ours("decode", **work), stock("decode", **work)) for _ in range(3)]
            rates = [[_rate(result) for result in pair] for pair in pairs]
            figures[f"real_tokens_speedup{suffix}"] = statistics.median(a / b for a, b in rates)
            figures[f"real_tokens_per_second{suffix}"] = statistics.median(a for a, _ in rates)
            figures[f"stock_tokens_per_second{suffix}"] = statistics.median(b for _, b in rates)
        one = {"rollouts": 1, "prompt_tokens": 300, "new_tokens": 64, "seed": 2}
        pairs = [(ours("decode", **one), stock("decode", **one)) for _ in range(5)]
        figures["plain_ratio"] = statistics.median(_rate(b) / _rate(a) for a, b in pairs)
    return figures


def _rate(result: dict[str, Any]) -> float:
    return float(result["tokens"] / statistics.median(result["seconds"]))


def growth(model: Path) -> Figures:
    """Trees on the real model: against plain requests, and against independent rollouts."""
    with Arm(model, "bfloat16", 65_536) as arm:
        figures = _walls(arm, limit=16, trees=64, new_tokens=96, suffix="")
        lengths = figures.pop("lengths")
        # as many requests of the same lengths, in the order in which they ended
        plain = arm("replay", lengths=lengths, limit=16, seed=3)
    figures["plain_tokens_per_second"] = plain["tokens_per_second"]
    figures["engine_share"] = figures["grown_tokens_per_second"] / plain["tokens_per_second"]
    return figures


def arith_growth() -> Figures:
    """The same on the model in the repository."""
    with Arm(ARITH, "float32", 120_000) as arm:
        figures = _walls(arm, limit=64, trees=256, new_tokens=96, suffix="_arith", pairs=5)
    del figures["lengths"]
    return figures


def _walls(
    arm: Arm, limit: int, trees: int, new_tokens: int, suffix: str, pairs: int = 1
) -> dict[str, Any]:
    """Medians over pairs, which take turns at being first."""
    arm("grow", strategy="ib", limit=limit, trees=limit, new_tokens=new_tokens, seed=0)  # warm
    work = {"limit": limit, "trees": trees, "new_tokens": new_tokens}
    grown: dict[str, list[dict[str, Any]]] = {"independent": [], "ib": []}
    for pair in range(pairs):
        for strategy in (*grown,) if pair % 2 else reversed(grown):
            grown[strategy].append(arm("grow", strategy=strategy, seed=1 + pair, **work))
    _show_scheduler({name: runs[-1]["scheduler"] for name, runs in grown.items()})

    def ratio(key: str) -> float:
        both = zip(grown["ib"], grown["independent"], strict=True)
        return statistics.median(ib[key] / independent[key] for ib, independent in both)

    def median(strategy: str, key: str) -> float:
        return statistics.median(run[key] for run in grown[strategy])

    return {
        f"wall_ratio_full{suffix}": ratio("seconds_per_tree"),
        f"token_ratio{suffix}": ratio("tokens"),
        f"prefill_passes_per_branch{suffix}": median("ib", "prefill_passes") / (8 * trees),
        f"tail_seconds_ib{suffix}": median("ib", "tail_seconds"),
        f"tail_seconds_independent{suffix}": median("independent", "tail_seconds"),
        f"grown_tokens_per_second{suffix}": median("ib", "tokens_per_second"),
        f"independent_tokens_per_second{suffix}": median("independent", "tokens_per_second"),
        "lengths": grown["ib"][-1]["lengths"],
    }


def _show_scheduler(seconds: dict[str, dict[str, float]]) -> None:
    """What the scheduler's processor time went to."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the scheduler's processor time [s], and its passes")
    table.add_column("")
    for strategy in seconds:
        table.add_column(strategy, justify="right")
    for part in sorted({part for parts in seconds.values() for part in parts}):
        table.add_row(part, *(f"{parts.get(part, 0):.4g}" for parts in seconds.values()))
    Console().print(table)


def demo() -> Figures:
    """`make demo` from start to end, ours and with SGLang's attention, in turn."""
    seconds: dict[str, list[float]] = {"ours": [], "native": []}
    accuracy: dict[str, float] = {}
    for name, arguments in (("native", ["--attention-backend=torch_native"]), ("ours", [])):
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            _run_demo(Path(out), arguments)
            seconds[name].append(time.perf_counter() - began)
            accuracy[name] = json.loads(Path(out, "summary.json").read_text())["accuracy_after"]
    return {
        "demo_speedup": seconds["native"][0] / seconds["ours"][0],
        "demo_seconds": seconds["ours"][0],
        "demo_accuracy": accuracy["ours"],
        "demo_accuracy_native": accuracy["native"],
    }


def _run_demo(out: Path, arguments: Sequence[str]) -> None:
    patch = (
        "import sys, processes, runpy; server = processes.server_command; "
        f"processes.server_command = lambda *a, **k: [*server(*a, **k), *{list(arguments)!r}]; "
        f"sys.argv = ['demo.py', '--out', {str(out)!r}]; "
        "runpy.run_path(sys.path[0] + '/demo.py', run_name='__main__')"
    )
    code = f"import sys; sys.path.insert(0, {str(ARITH.parent)!r}); {patch}"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
