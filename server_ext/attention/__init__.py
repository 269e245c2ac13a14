"""Attention of SGLang on a CPU, `ibtree_cpu`: a whole batch in one pass, shared prefixes once."""
