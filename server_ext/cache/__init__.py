"""The radix cache `ibtree`: open trees' prefixes stay, and no weights serve another's KV."""
