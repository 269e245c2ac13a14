"""Growing trees: segmenting rollouts into steps, strategies, the grower. No gRPC, no SGLang."""
