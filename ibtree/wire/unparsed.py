"""A SubmitPromptsRequest whose prompts are still bytes.

While protobuf parses, nothing else of the process runs: a tenth of a second for 10,000 long
prompts. Bytes and a message look alike on the wire, so this one reads the same requests, and each
prompt is parsed when its turn comes.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ibtree.wire.v1 import sampling_pb2

_FIELD = sampling_pb2.SubmitPromptsRequest.DESCRIPTOR.fields_by_name["prompts"]


def _unparsed() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="ibtree/unparsed.proto", package="ibtree.unparsed", syntax="proto3"
    )
    message = file.message_type.add(name="SubmitPromptsRequest")
    kind = descriptor_pb2.FieldDescriptorProto
    message.field.add(
        name="prompts", number=_FIELD.number, type=kind.TYPE_BYTES, label=kind.LABEL_REPEATED
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("ibtree.unparsed.SubmitPromptsRequest")
    )


UnparsedPrompts: Any = _unparsed()
"""`prompts`: serialized prompts, in order."""
