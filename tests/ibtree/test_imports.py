"""`import ibtree` is cheap: it is what notebooks, the command line and graders pay."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "sglang", "transformers", "pydantic", "pydantic_settings", "rich", "safetensors"}
HEAVY |= {"pyarrow", "datasets", "pandas", "zstandard"}
SCRIPT = """
import json, sys, time
began = time.process_time()
import ibtree
took = time.process_time() - began
print(json.dumps([took, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def fresh(script: str) -> tuple[float, set[str]]:
    """Seconds the import itself computes (others use the machine too), and the top-level modules
    then loaded."""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    took, modules = json.loads(run.stdout)
    return took, set(modules)


def test_import_is_light_and_fast():
    runs = [fresh(SCRIPT) for _ in range(5)]
    assert "ibtree" in runs[0][1]
    assert not HEAVY & runs[0][1]
    assert min(took for took, _ in runs) <= 0.3


def test_the_client_is_light_too():
    names = ("client", "wire.trees", "tree.score", "weights.delta", "data.questions", "cli")
    imports = ", ".join(f"ibtree.{name}" for name in names)
    _, modules = fresh(SCRIPT.replace("import ibtree\n", f"import {imports}\n"))
    assert "grpc" in modules and not HEAVY & modules
