"""Trees, calls and weights <-> protobuf; nothing else in ibtree knows both."""
