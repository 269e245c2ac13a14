"""A grown tree as the last messages of a SampleTree stream: one, or parts of one that is large.

gRPC's default limit of a received message is 4 MiB, in every language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ibtree.tree import Tree
from ibtree.wire.trees import tree_from_bytes, tree_to_proto
from ibtree.wire.v1 import sampling_pb2

PART_BYTES = 3 * 1024 * 1024
"""Most bytes of a tree in one message."""


def tree_messages(tree: Tree, text: Callable[[tuple[int, ...]], str] | None = None) -> list[bytes]:
    """Serialized SampleTreeResponses, in order. `text` decodes a step's ids, for callers who asked
    for `texts`."""
    message = tree_to_proto(tree, text)
    if message.ByteSize() <= PART_BYTES:
        return [sampling_pb2.SampleTreeResponse(tree=message).SerializeToString()]
    data = message.SerializeToString()
    return [
        sampling_pb2.SampleTreeResponse(tree_part=data[at : at + PART_BYTES]).SerializeToString()
        for at in range(0, len(data), PART_BYTES)
    ]


def joined(parts: Sequence[bytes]) -> Tree:
    """The tree of these parts. Raises FieldError as `tree_from_proto` does."""
    return tree_from_bytes(b"".join(parts))
