"""What the server and SGLang's processes both know the backend by; imports nothing."""

ATTENTION_BACKEND = "ibtree_cpu"
"""Name of the attention backend in SGLang's registry."""
