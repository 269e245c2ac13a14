"""Runs in every Python process of a server under the soak: its wall clock is shifted, and its disk
slowed down, by what a small mapped file says (soak/control.py writes it).

time.time and time.time_ns are shifted, which is what the server and SGLang read. Not for gRPC's
Python, whose deadlines its core compares with the real clock: a clock that steps takes both along.
SQLite's own fsync is not slowed down.
"""

import mmap
import os
import struct
import sys
import time
import types

_FORMAT = "dd"  # shift of the wall clock [s], how long an fsync takes at least [s]

if "IBTPO_SOAK_CONTROL" in os.environ:
    with open(os.environ["IBTPO_SOAK_CONTROL"], "rb") as _file:  # noqa: PTH123  pathlib is not up yet
        _control = mmap.mmap(_file.fileno(), 0, access=mmap.ACCESS_READ)
    _time, _time_ns, _fsync = time.time, time.time_ns, os.fsync

    def _shift_s(caller: types.FrameType) -> float:
        name = caller.f_globals.get("__name__", "")
        return 0.0 if name.startswith("grpc") else struct.unpack_from(_FORMAT, _control)[0]

    def _shifted() -> float:
        return _time() + _shift_s(sys._getframe(1))

    def _shifted_ns() -> int:
        return _time_ns() + int(_shift_s(sys._getframe(1)) * 1e9)

    def _slow_fsync(fd: int) -> None:
        time.sleep(struct.unpack_from(_FORMAT, _control)[1])
        _fsync(fd)

    time.time, time.time_ns, os.fsync = _shifted, _shifted_ns, _slow_fsync
