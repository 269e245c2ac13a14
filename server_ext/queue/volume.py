"""What the journal's volume is, and how much room it has.

SQLite's write-ahead log needs memory that all who open the file share, and locks that hold:
neither is there on a network file system (sqlite.org/wal.html), where a journal is damaged sooner
or later. So the start refuses one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from ibtree.errors import FieldError

_NETWORK = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x564C: "NCP",
    0x5346414F: "AFS",
    0x73757245: "Coda",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0xAAD7AAEA: "PanFS",
    0x20030528: "OrangeFS",
}
"""f_type of statfs (linux/magic.h and the file systems' own headers)."""
_FUSE = 0x65735546
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL_FUSE = {"", "fuseblk", "fuse-overlayfs", "overlayfs", "virtiofs", "ntfs-3g", "bindfs"}
"""Kinds of FUSE whose files are on this machine's own disks; the others are networks."""


def check_volume(folder: Path) -> None:
    """Raises FieldError for a folder on a network file system."""
    kind = network_name(_statfs_type(folder), folder)
    if kind:
        problem = f"{folder} is on {kind}, a network file system; the journal would be damaged"
        raise FieldError("data_dir", problem, "a folder on a disk of this machine")


def network_name(f_type: int | None, folder: Path) -> str:
    """The name of a network file system by its type, empty for others and for None."""
    if f_type == _FUSE:
        kind = _fuse_kind(folder)
        return "" if kind in _LOCAL_FUSE else f"FUSE ({kind})"
    return _NETWORK.get(f_type or 0, "")


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def _statfs_type(folder: Path) -> int | None:
    """f_type, the first word of what statfs(2) fills in; None where there is no such call."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    filled = (ctypes.c_long * 64)()
    if libc.statfs(os.fsencode(folder), ctypes.byref(filled)):
        return None
    return int(filled[0]) & 0xFFFFFFFF


def _fuse_kind(folder: Path) -> str:
    """The kind of the FUSE mount that holds the folder: `sshfs` of `fuse.sshfs`."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    where, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = left.split()[4].encode().decode("unicode_escape")
        inside = Path(folder).resolve().is_relative_to(mount)
        if inside and len(mount) >= len(where):  # the deepest, and of those the newest
            where, kind = mount, right.split()[0]
    return kind.removeprefix("fuse.") if kind != "fuse" else "unnamed"
