"""A tree as the model computes it: each token once, attention to ancestors, its loss terms."""
