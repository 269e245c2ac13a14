"""The tree of reasoning steps: a trie in columns, its options, and its scores."""

from ibtree.tree.options import SamplingOptions, TreeOptions
from ibtree.tree.trie import Finish, Floats, Ints, Ledger, Step, StopCause, Tree

__all__ = [
    "Finish",
    "Floats",
    "Ints",
    "Ledger",
    "SamplingOptions",
    "Step",
    "StopCause",
    "Tree",
    "TreeOptions",
]
