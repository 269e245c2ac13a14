"""The server's gRPC port: its options and limits, and the memory that its messages take."""

from __future__ import annotations

import ctypes

import grpc

from ibtree.wire.calls import LARGE_BYTES, METHODS
from server_ext.services.arrival import Arrival

SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not take some of its calls
    # refused as soon as its length is known; arrival.py has less for most methods
    ("grpc.max_receive_message_length", LARGE_BYTES),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),  # a connection that says nothing
    # a caller whose machine is gone would keep what its call holds until the deadline
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # weights come in at twice the rate in large frames; the window is what of them may lie in
    # memory, and without these it grows
    ("grpc.http2.max_frame_size", 256 * 1024),
    ("grpc.http2.lookahead_bytes", 512 * 1024),
    ("grpc.http2.bdp_probe", 0),
]

OTHER_CALLS = 256
"""Calls at once besides those of SampleTree: beyond, they end with RESOURCE_EXHAUSTED."""


def grpc_server(
    most_calls: int, message_timeout_s: float, options: list[tuple[str, int]] | None = None
) -> grpc.aio.Server:
    """A server for `most_calls` at once, whose messages have to arrive within
    `message_timeout_s`."""
    limits = {method.path: method.most_bytes for method in METHODS}
    return grpc.aio.server(
        interceptors=[Arrival(message_timeout_s, limits)],
        options=SERVER_OPTIONS if options is None else options,
        maximum_concurrent_rpcs=most_calls,
    )


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_message_memory() -> None:
    """Has glibc keep the memory of large messages: else it gives each one's back and faults it in
    again for the next, and weights come in at half the rate."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # other C libraries have none
        mallopt(_M_TRIM_THRESHOLD, 64 * 1024 * 1024)
        mallopt(_M_MMAP_THRESHOLD, 4 * 1024 * 1024)
