"""Runs in every Python process of a server under the soak: its wall clock is shifted, and its disk
slowed down, by what a small mapped file says (soak/control.py writes it).

Only time.time and time.time_ns are shifted, which is what the server and SGLang read; SQLite's own
fsync is not slowed down.
"""

import mmap
import os
import struct
import time

_FORMAT = "dd"  # shift of the wall clock [s], how long an fsync takes at least [s]

if "IBTPO_SOAK_CONTROL" in os.environ:
    with open(os.environ["IBTPO_SOAK_CONTROL"], "rb") as _file:  # noqa: PTH123  pathlib is not up yet
        _control = mmap.mmap(_file.fileno(), 0, access=mmap.ACCESS_READ)
    _time, _time_ns, _fsync = time.time, time.time_ns, os.fsync

    def _shifted() -> float:
        return _time() + struct.unpack_from(_FORMAT, _control)[0]

    def _shifted_ns() -> int:
        return _time_ns() + int(struct.unpack_from(_FORMAT, _control)[0] * 1e9)

    def _slow_fsync(fd: int) -> None:
        time.sleep(struct.unpack_from(_FORMAT, _control)[1])
        _fsync(fd)

    time.time, time.time_ns, os.fsync = _shifted, _shifted_ns, _slow_fsync
