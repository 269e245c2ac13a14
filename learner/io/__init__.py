"""All that goes in and out: prompts, leased trees, checkpoints, pushed weights, figures."""
