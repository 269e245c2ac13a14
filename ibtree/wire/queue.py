"""What an operator asks of the queue, and large trees in parts <-> the nouns of ibtree.messages."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

from google.protobuf.message import DecodeError

from ibtree.errors import FieldError
from ibtree.messages import TreeChoice, TreeEntry, TreeLease
from ibtree.wire.trees import tree_from_bytes
from ibtree.wire.v1 import queue_pb2 as pb

_STATE = "TREE_STATE_"
STATES = tuple(name.removeprefix(_STATE).lower() for name in pb.TreeState.keys()[1:])
"""Names of the states, in the order of a tree's life."""


def state_to_proto(state: str | None) -> pb.TreeState.ValueType:
    """Unspecified for None. Raises FieldError for a state that there is not."""
    if state is None:
        return pb.TREE_STATE_UNSPECIFIED
    if state not in STATES:
        raise FieldError("state", f"no state {state!r}", " | ".join(STATES))
    return pb.TreeState.Value(_STATE + state.upper())


def state_from_proto(number: int) -> str | None:
    """None for unspecified. Raises FieldError for a number without a state."""
    if number == pb.TREE_STATE_UNSPECIFIED:
        return None
    if number not in pb.TreeState.values():
        raise FieldError("state", f"no state {number}", f"0 to {max(pb.TreeState.values())}")
    return pb.TreeState.Name(pb.TreeState.ValueType(number)).removeprefix(_STATE).lower()


def entry_to_proto(entry: TreeEntry) -> pb.TreeEntry:
    return pb.TreeEntry(**(asdict(entry) | {"state": state_to_proto(entry.state)}))


def entries_from_proto(response: pb.ListTreesResponse) -> tuple[list[TreeEntry], bool]:
    """The entries, and whether more follow."""
    return [_entry_from_proto(entry) for entry in response.trees], response.more


def _entry_from_proto(message: pb.TreeEntry) -> TreeEntry:
    values = {f.name: getattr(message, f.name) for f in fields(TreeEntry)}
    for name in ("rests_s", "lease_left_s", "version"):
        if not message.HasField(name):
            values[name] = None
    values["state"] = state_from_proto(message.state) or ""
    values["reasons"] = tuple(message.reasons)
    return TreeEntry(**values)


def choice_to_proto(choice: TreeChoice) -> pb.TreeChoice:
    return pb.TreeChoice(ids=choice.ids, run=choice.run, all=choice.all)


def choice_from_proto(message: pb.TreeChoice) -> TreeChoice:
    run = message.run if message.HasField("run") else None
    return TreeChoice(tuple(message.ids), run, message.all)


def lease_read(lease: TreeLease, data: bytes) -> TreeLease:
    """The lease with the tree that was read; its problem for bytes that are none."""
    try:
        return replace(lease, tree=tree_from_bytes(data), unread_bytes=0)
    except (FieldError, DecodeError) as error:
        return replace(lease, problem=str(error), unread_bytes=0)
