"""What the other ranks do: what rank 0 calls for."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

from learner.config import LearnerConfig
from learner.ranks import Ranks
from learner.run import new_trainer
from learner.shards import read_shards, weights_of, write_shards


def follow(config: LearnerConfig, ranks: Ranks) -> None:
    """Until rank 0 ends the run, which alone hears signals. Raises RankLostError, FieldError."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    trainer = new_trainer(config, ranks)
    for order in ranks.orders():
        match order.name:
            case "step":
                trainer.step(order.trees, **order.facts)
            case "weights":
                weights_of(trainer.policy, ranks)
            case "save":
                with suppress(OSError):  # every rank has it, rank 0 says so
                    write_shards(
                        Path(order.facts["folder"]), trainer.policy, trainer.optimizer, ranks
                    )
            case "load":
                read_shards(Path(order.facts["folder"]), trainer.policy, trainer.optimizer, ranks)
