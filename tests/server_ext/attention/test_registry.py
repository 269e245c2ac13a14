"""The backend in SGLang's registry, as a process of the engine finds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).parents[3] / "examples" / "arith" / "model"
PROCESS = f"""
import server_ext.engine.cpu as cpu
cpu.select()
from server_ext.engine.arguments import server_arguments

def chosen(*arguments):
    return server_arguments({str(MODEL)!r}, "cpu", "float32", "ibtree", arguments).attention_backend

assert chosen() == "ibtree_cpu"
assert chosen("--attention-backend", "torch_native") == "torch_native"

from sglang.srt.mem_cache import allocation  # before the plug-ins: what it imported is replaced
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.utils.common import support_triton
assert "ibtree_cpu" in ATTENTION_BACKENDS
for asked in (support_triton, allocation.support_triton):
    assert not asked("ibtree_cpu") and not asked("torch_native") and asked("triton")

import torch
table = torch.arange(12).reshape(3, 4)
rows, prefixes = torch.tensor([2, 0, 1]), torch.tensor([3, 0, 4])
allocation.attention_backends = lambda: ("ibtree_cpu", "ibtree_cpu")
assert allocation.get_last_loc(table, rows, prefixes).tolist() == [10, -1, 7]
"""


def test_a_process_of_the_engine():
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
