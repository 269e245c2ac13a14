"""Held-out accuracy through a server, for the learner and the `ibtpo` command."""
