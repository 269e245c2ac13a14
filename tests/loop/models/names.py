"""Names that tests and engines share, without SGLang."""

FAILURES_VARIABLE = "IBTPO_TEST_LOADER_FAILURES"
"""Names a file with a letter for each load to come: x fails, others and what follows do not."""
MODELS = "tests.loop.models"
"""The package of models."""
