"""Growing trees: prompts checked, rollouts sampled, cut into steps, graded, branched."""
