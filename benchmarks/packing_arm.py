"""One way through the model, in a process of its own, that does what bench_packing.py says.

Reads commands as JSON lines on standard input, answers each with one JSON line.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from packing_trees import flat_tokens, packed_tokens, synthetic_tree

from learner.config import LearnerConfig
from learner.train.model import load_policy
from learner.train.trainer import Trainer


class Arm:
    """A trainer whose steps leave the weights as they are."""

    def __init__(self, model: str, threads: int, forward: Any, micro_batch_tokens: int) -> None:
        torch.set_num_threads(threads)
        config = LearnerConfig(
            model=Path(model),
            prompts="none",
            forward=forward,
            micro_batch_tokens=micro_batch_tokens,
            kl_weight=0.0,
            temperature=1.0,
            lr=1e-30,
            grad_clip=1e30,
        )
        device = torch.device("cpu")
        self.trainer = Trainer(load_policy(config.model, device, "float32"), None, config, device)
        self.vocabulary = self.trainer.policy.config.vocab_size

    def step(self, seed: int, prompt: int, tokens: int, step: int) -> dict[str, float]:
        """One step on a tree: seconds, of the clock and of the processor, how far memory rose above
        what was held before, and the tokens of all trajectories over the tree's."""
        shape = {"prompt": prompt, "tokens": tokens, "step": step, "vocabulary": self.vocabulary}
        tree = synthetic_tree(random.Random(seed), **shape)
        self.trainer.optimizer.zero_grad(set_to_none=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory_mb("VmRSS")
        began, began_cpu = time.perf_counter(), time.process_time()
        self.trainer.step([tree], version=0)
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - began_cpu,
            "peak_mb": memory_mb("VmHWM") - before,
            "token_ratio": flat_tokens(tree) / packed_tokens(tree),
        }

    def gradient(self, file: str, **shape: int) -> dict[str, float]:
        """The gradient of such a step, written to a file."""
        self.step(**shape)
        whole = torch.cat([w.grad.flatten() for w in self.trainer.policy.parameters()])
        torch.save(whole, file)
        return {"norm": float(whole.norm())}


def memory_mb(name: str) -> float:
    """VmRSS or VmHWM of this process [MB]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    arm = Arm(**json.loads(sys.argv[1]))
    print("READY", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print("RESULT " + json.dumps(getattr(arm, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
