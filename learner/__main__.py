"""`ibtpo-learner`: parses the command line and trains."""

from __future__ import annotations

import logging
import sys

from ibtree.extras import required

NEEDED = (
    "pydantic_settings", "yaml", "torch", "transformers", "safetensors", "rich", "tensorboard",
    "zstandard",
)  # fmt: skip
"""What the learner imports, sooner or later, beyond what a client needs."""


def main() -> None:
    """Exits 0 when the run is done or was told to stop; else 1, with one line that says why."""
    with required("ibtpo-learner", "learner", NEEDED):
        from learner.config import LearnerConfig

        config = LearnerConfig.load("ibtpo-learner", sys.argv[1:])

        from ibtree.errors import FieldError, IbtpoError
        from learner.dist.process_group import joined
        from learner.loop import serve_leader, train

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        with joined(config) as ranks:
            run = train if ranks.leads else serve_leader
            run(config, ranks)
    except FieldError as error:
        sys.exit(f"ibtpo-learner: {error.as_option()}")
    except IbtpoError as error:
        sys.exit(f"ibtpo-learner: {error}")


if __name__ == "__main__":
    main()
