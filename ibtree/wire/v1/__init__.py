"""Generated from protos/ibtree/v1 by `make protos`; never edited."""
