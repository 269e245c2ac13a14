"""Generates ibtree/wire/v1 from protos/ibtree/v1: `python protos/generate.py [FOLDER]`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent
STUBS = PROTOS.parent / "ibtree/wire/v1"


def generate(folder: Path) -> None:
    """Writes the stubs into `folder`, whose generated files it replaces."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "grpc_python")]
        typed = [f"--{kind}_out=quiet:{scratch}" for kind in ("mypy", "mypy_grpc")]
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
                *(*outputs, *typed, *sorted(PROTOS.glob("ibtree/v1/*.proto"))),
            ],
            check=True,
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        )
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*_pb2*"):
            old.unlink()
        for path in Path(scratch, "ibtree/v1").iterdir():
            # protoc names Python modules after the proto files' own folder
            moved = re.sub(
                r"(from |')ibtree\.v1(?= import|\.\w+_pb2')", r"\1ibtree.wire.v1", path.read_text()
            )
            (folder / path.name).write_text(moved)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else STUBS)
