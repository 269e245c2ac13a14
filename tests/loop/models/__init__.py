"""Models that SGLang takes in the place of its own (SGLANG_EXTERNAL_MODEL_PACKAGE)."""
