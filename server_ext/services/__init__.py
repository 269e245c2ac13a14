"""The gRPC services, one file each: messages in, one call, messages out."""
