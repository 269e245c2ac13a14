"""`ibtpo-learner`: parses the command line and trains."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Exits 0 when the run is done or was told to stop; else 1, with one line that says why."""
    from learner.config import LearnerConfig

    config = LearnerConfig.load("ibtpo-learner", sys.argv[1:])

    from ibtree.client import RpcFailed
    from ibtree.errors import FieldError, PreconditionError
    from learner.errors import NotFiniteError, WriteError
    from learner.intake import QueueDry
    from learner.loop import train

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        train(config)
    except FieldError as error:
        sys.exit(f"ibtpo-learner: {error.as_option()}")
    except (PreconditionError, RpcFailed, QueueDry, NotFiniteError, WriteError) as error:
        sys.exit(f"ibtpo-learner: {error}")


if __name__ == "__main__":
    main()
