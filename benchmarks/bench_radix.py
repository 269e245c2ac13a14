"""`make bench-radix`: the radix backend beside SGLang's own cache, in one run.

Both engines run at the same time, one thread each, on the same work, so that whatever else the
machine does hits both; every ratio is the median over such pairs. Parts can be named on the
command line: pressure, churn, audit, updates, chaos, shortage.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from arm_process import ArmProcess
from figures import show

HERE = Path(__file__).parent
OUT = HERE / "out" / "radix.json"
ARITH = HERE.parent / "examples" / "arith" / "model"
AMPLE_TOKENS = 200_000
TREES = 64
CACHES = ("ibtree", "default")


class Arm(ArmProcess):
    """A process of radix_arm.py."""

    def __init__(
        self,
        radix_cache: str,
        pool_tokens: int,
        model: Path = ARITH,
        arguments: Sequence[str] = (),
        admission: bool = True,
    ) -> None:
        settings = {
            "admission": admission and radix_cache == "ibtree",
            "model": str(model),
            "radix_cache": radix_cache,
            "arguments": [
                "--sleep-on-idle",
                f"--max-total-tokens={pool_tokens}",
                *arguments,
            ],
        }
        super().__init__("radix_arm.py", settings, f"radix-{radix_cache}.log")


class Pair:
    """Both caches on the same work at the same time."""

    def __init__(self, stack: ExitStack, pool_tokens: int, model: Path = ARITH) -> None:
        arms = [Arm(cache, pool_tokens, model) for cache in CACHES]
        self.arms = [stack.enter_context(arm) for arm in arms]

    def __call__(self, do: str, **arguments: Any) -> tuple[dict[str, float], dict[str, float]]:
        with ThreadPoolExecutor(2) as pool:
            ours, default = pool.map(lambda arm: arm(do, **arguments), self.arms)
        return ours, default


def rate(result: dict[str, float]) -> float:
    return result["generated_tokens"] / result["seconds"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The median's, at 96 % for 9 values: from the second smallest to the second largest."""
    ordered = sorted(values)
    return (ordered[1], ordered[-2]) if len(ordered) >= 9 else (ordered[0], ordered[-1])


def pressure(figures: dict[str, float]) -> None:
    """No pressure: what the backend costs when nothing is evicted; also the size of a tree."""
    with ExitStack() as stack:
        pair = Pair(stack, AMPLE_TOKENS)
        pair("grow", trees=16, seed=1000)
        results = [pair("grow", trees=TREES, seed=seed) for seed in range(9)]
    ratios = [rate(default) / rate(ours) for ours, default in results]
    figures["overhead_ratio"] = statistics.median(ratios)
    figures["overhead_ratio_low"], figures["overhead_ratio_high"] = interval(ratios)
    figures["tree_tokens"] = statistics.mean(ours["unique_tokens"] for ours, _ in results)


def churn(figures: dict[str, float]) -> None:
    """A pool of 1.5 times the trees, and 10 times the pool of other prompts through it."""
    pool_tokens = int(1.5 * TREES * figures["tree_tokens"])
    with ExitStack() as stack:
        pair = Pair(stack, pool_tokens)
        pair("grow", trees=16, seed=1000)  # the grower learns how large trees get
        results = [
            pair("grow", trees=TREES, seed=seed, background_tokens=10 * pool_tokens)
            for seed in range(5)
        ]
    for at, cache in enumerate(CACHES):
        shares = [result[at]["branch_share"] for result in results]
        figures[f"cached_share_{cache}"] = statistics.median(shares)
    ratios = [rate(ours) / rate(default) for ours, default in results]
    figures["throughput_ratio"] = statistics.median(ratios)
    figures["throughput_ratio_low"], figures["throughput_ratio_high"] = interval(ratios)
    figures["churn_refilled_tokens"] = sum(ours["refilled_tokens"] for ours, _ in results)


def audit(figures: dict[str, float]) -> None:
    """Warm against cold, within the engine's own spread over batch sizes 1 to 32."""
    with Arm("ibtree", AMPLE_TOKENS) as arm:
        result = arm("spread", prefixes=32, seed=0)
    figures["audit_warm_cold_nats"] = result["warm_cold"]
    figures["audit_batch_spread_nats"] = result["batch_spread"]


def updates(figures: dict[str, float]) -> None:
    """50 weight updates while trees grow."""
    with Arm("ibtree", AMPLE_TOKENS) as arm:
        result = arm("updates", count=50, trees=16, seed=0)
    figures["cross_version_hits"] = result["cross_version_hits"]
    figures["updates_prefixes_probed"] = result["probed"]
    figures["updates_audits"] = result["audits"]
    figures["updates_max_difference_nats"] = result["max_difference"]
    figures["updates_load_ms"] = result["load_ms"]


def chaos(figures: dict[str, float]) -> None:
    """10,000 trees opened, cancelled and expired, 1,000 of them really grown, in a small pool."""
    with Arm("ibtree", 6000) as arm:
        arm("chaos", messages=900, grown=100, seed=1)
        result = arm("chaos", messages=9000, grown=1000, seed=0)
        arm("grow", trees=4, seed=0)  # it still serves: no leak check ended the scheduler
    figures["chaos_open_trees_left"] = result["open_trees"]
    figures["chaos_protected_tokens_left"] = result["protected_tokens"]
    figures["chaos_grown"], figures["chaos_cancelled"] = result["kept"], result["cancelled"]
    figures["chaos_memory_growth"] = result["rss_mb_after"] / result["rss_mb_before"]


def shortage(figures: dict[str, float]) -> None:
    """A pool of 0.3 times the trees, 512-token prompts, a random model of 50 M parameters."""
    from shortage_model import make_model

    work = {"prompt_tokens": 512, "max_new_tokens": 32}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        with Arm("ibtree", AMPLE_TOKENS, model) as arm:
            tree_tokens = arm("grow", trees=4, seed=0, **work)["unique_tokens"]
        with ExitStack() as stack:
            pair = Pair(stack, int(0.3 * TREES * tree_tokens), model)
            ours, default = pair("grow", trees=TREES, seed=0, **work)
    figures["shortage_share_ibtree"] = ours["branch_share"]
    figures["shortage_share_default"] = default["branch_share"]
    figures["shortage_wall_ratio"] = ours["seconds"] / default["seconds"]


PARTS: list[Callable[[dict[str, float]], None]] = [
    pressure,
    churn,
    audit,
    updates,
    chaos,
    shortage,
]


def main() -> None:
    wanted = sys.argv[1:] or [part.__name__ for part in PARTS]
    figures: dict[str, float] = {}
    if OUT.exists() and sys.argv[1:]:
        figures = json.loads(OUT.read_text())
    for part in PARTS:
        if part.__name__ in wanted:
            part(figures)
            OUT.write_text(json.dumps(figures, indent=2) + "\n")
    show("radix backend `ibtree` beside SGLang's default cache", figures, OUT)


if __name__ == "__main__":
    main()
