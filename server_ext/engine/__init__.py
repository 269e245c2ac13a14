"""The inference engine: a port, and SGLang behind it."""
