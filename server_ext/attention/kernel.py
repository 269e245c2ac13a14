"""The C++ kernel: built once for this machine, kept in the user's cache folder, called by ctypes.

C++ and not Numba: the same decode in Numba takes 4.6 times as long (2.8 ms against 0.6 ms a layer:
32 sequences of 300 tokens, shapes of Qwen2.5-0.5B), because it has neither bfloat16 dot products
nor control over registers and prefetches. Numba compiles at first use in 1.2 s and is a heavy
dependency; a C++ compiler takes 5 s once for a machine, and torch does the work where there is
none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SOURCES = ("attend.cpp", "plan.cpp")
HEADERS = ("multiply.h", "pack.h", "part.h", "prefetch.h", "softmax.h", "vectors.h", "work.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
COMPILERS = ("c++", "g++", "clang++")
BUILD_TIMEOUT_S = 120


class Call(ctypes.Structure):
    """The arguments of `attend`: the struct of the same name in work.h says what they are."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out", "k", "v", "table", "slot_map")),
        *((name, ctypes.c_void_p) for name in ("runs", "first_query")),
        *((name, ctypes.c_void_p) for name in ("query_token", "query_position")),
        *((name, ctypes.c_int64) for name in ("n_runs", "n_queries")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "out_token", "out_head")),
        *((name, ctypes.c_int64) for name in ("k_slot", "k_head", "v_slot", "v_head")),
        *((name, ctypes.c_int64) for name in ("table_stride", "q_heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("dim", "v_dim", "window", "threads")),
        *((name, ctypes.c_int32) for name in ("q_dtype", "kv_dtype")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
    )


@functools.cache
def library() -> Any:
    """The loaded library, or None where it can not be built (logged once)."""
    try:
        return _load(_built())
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        reason = output.strip().splitlines()[0] if output.strip() else str(error)
        logger.warning("attention runs on torch, slower: its kernel can not be built: %s", reason)
        return None


def _load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.attend.argtypes = [ctypes.POINTER(Call)]
    library.attend.restype = ctypes.c_int
    library.plan_forest.argtypes = [
        pointer, number, pointer, pointer, number, number, number, pointer, pointer,
    ]  # fmt: skip
    library.plan_forest.restype = number
    library.forest_holds.argtypes = [pointer, number, pointer, pointer, pointer, number]
    library.forest_holds.restype = ctypes.c_int
    return library


def _built() -> Path:
    """The library's file. Raises OSError or SubprocessError if there is no way to make it."""
    here = Path(__file__).parent
    compiler = _compiler()
    openmp = _loaded_openmp()
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    for text in (version, *FLAGS, str(openmp), platform.machine(), _cpu_features()):
        digest.update(text.encode() + b"\0")
    name = f"attention-{digest.hexdigest()[:24]}.so"
    for folder in _folders():
        path = folder / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(folder):
                continue
            if path.exists():
                return path
            with tempfile.TemporaryDirectory(dir=folder) as work:
                _build(compiler, here, openmp, Path(work) / name)
                (Path(work) / name).replace(path)  # several processes may build at once
            return path
        except OSError as error:
            logger.debug("attention: no library in %s: %s", folder, error)
    raise OSError("no folder to build in")


def _build(compiler: str, here: Path, openmp: Path | None, to: Path) -> None:
    # linked by path and without -fopenmp: another OpenMP than torch's would have threads of its
    # own, which spin against torch's
    command = [compiler, *FLAGS, "-w", "-c", *(str(here / name) for name in SOURCES)]
    subprocess.run(
        command, cwd=to.parent, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S
    )
    objects = [Path(name).with_suffix(".o").name for name in SOURCES]
    last = [str(openmp)] if openmp else ["-fopenmp"]
    subprocess.run(
        [compiler, "-shared", "-o", to.name, *objects, *last],
        cwd=to.parent, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S,
    )  # fmt: skip


def _compiler() -> str:
    """Raises FileNotFoundError if there is none."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError(f"no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")


def _loaded_openmp() -> Path | None:
    """The OpenMP runtime this process has loaded, which is torch's."""
    import torch  # which loads it

    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {Path(line.rpartition(" ")[2]) for line in maps.read_text().splitlines()}
    loaded = sorted(p for p in paths if p.name.startswith(("libgomp", "libiomp", "libomp")))
    # other wheels bring copies of their own, in folders of their own
    site = Path(torch.__file__).parent.parent
    torchs = [p for p in loaded if p.is_relative_to(site / "torch")]
    torchs += [p for p in loaded if p.is_relative_to(site / "torch.libs")]
    others = [p for p in loaded if not p.is_relative_to(site)]
    return next(iter([*torchs, *others]), None)


def _cpu_features() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a library there."""
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _folders() -> Iterator[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    yield Path(cache) / "ibtpo"
    yield Path(tempfile.gettempdir()) / f"ibtpo-{os.getuid()}"
