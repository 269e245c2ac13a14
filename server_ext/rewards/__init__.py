"""Graders: outcome rewards in [0, 1] of finished trajectories."""
