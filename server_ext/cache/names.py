"""What the server and SGLang's processes both know the backend by; imports nothing."""

BACKEND = "ibtree"
"""Name of the radix cache backend in SGLang's registry."""
FRACTION_VARIABLE = "IBTREE_CACHE_FRACTION"
"""Environment variable by which the engine's processes learn the fraction of the KV pool in which
open trees are protected."""
DEFAULT_FRACTION = 0.75
