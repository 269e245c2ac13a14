"""`ibtpo-learner`: parses the command line and trains."""

from __future__ import annotations

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

        from ibtpo_settings.logs import log_to_stderr
        from ibtree.errors import FieldError, IbtpoError
        from learner.dist.process_group import joined
        from learner.loop import serve_leader, train

    log_to_stderr()
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
