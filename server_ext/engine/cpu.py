"""What SGLang 0.5.21 needs on a CPU without its own kernels.

Imported at the top of the server's main module: SGLang's child processes are spawned, re-import
that module and so get the same stand-ins before they import sglang.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any, NoReturn

import ibtpo_torchvision
from ibtree.errors import FieldError
from server_ext.attention.names import ATTENTION_BACKEND

ENGINE_VARIABLE = "SGLANG_USE_CPU_ENGINE"

SERVER_ARGUMENTS = [
    "--device=cpu",
    f"--attention-backend={ATTENTION_BACKEND}",
    "--grammar-backend=none",
    "--disable-overlap-schedule",
    "--mem-fraction-static=0.3",
    "--max-total-tokens=262144",
    "--sleep-on-idle",
]
"""Defaults under which SGLang runs on any CPU; what the operator passes after `--` comes later.

Without a limit a small model gets a pool of millions of tokens, and the engine spends a third of
its time on copying the list of free ones. An idle engine that polls takes a core from the learner.
"""


class _KernelStandIn(types.ModuleType):
    """`sgl_kernel`: imported by modules the CPU engine loads, never called in the paths we use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

        return missing


class _KernelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `sgl_kernel` as a stand-in; its submodules stay missing, which SGLang copes with."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name == "sgl_kernel" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _KernelStandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Installs the stand-ins if this process or an ancestor asked for the CPU engine."""
    if os.environ.get(ENGINE_VARIABLE) != "1":
        return
    if not any(isinstance(finder, _KernelFinder) for finder in sys.meta_path):
        sys.meta_path.append(_KernelFinder())  # last: a real sgl_kernel wins
    ibtpo_torchvision.install()


def select() -> None:
    """Chooses the CPU engine for this process and its children."""
    os.environ[ENGINE_VARIABLE] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # with a CUDA build of torch, SGLang would open NCCL for the ranks of --tp-size on the CPU
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "none on a CPU")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's: slots lie all over the KV pool
    install()


def resolved_device(name: str) -> str:
    """`cpu` or `cuda` for `auto`. Raises FieldError for a GPU that is not there."""
    if name == "cpu":
        return name
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise FieldError("device", "cuda is not available here", "auto | cpu")
    return "cuda" if there else "cpu"


install()
