"""The model, its forward passes over packed trees or trajectories, and the optimiser step."""
