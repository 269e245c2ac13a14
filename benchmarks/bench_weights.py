"""`make bench-weights`: how small, how fast and how disturbing a weight update is.

delta   a step of AdamW at 1e-6: bytes of the delta, rate of encoding and applying it
stream  a gigabyte over gRPC on loopback, against copying and hashing a file; the server's memory
engine  updates under load: the pause, the time to the first token of the new version

`--parts delta,stream` needs no engine; `--parameters` and `--stream-mb` make it shorter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from figures import show
from safetensors.torch import save_file
from weights_load import engine_figures
from weights_model import make_model, train

from ibtree import Client
from ibtree.weights.delta import write_delta
from ibtree.weights.manifest import CHUNK_BYTES
from ibtree.weights.tensor_files import make_manifest, write_file
from learner.dist.process_group import ALONE
from learner.dist.state import weights_of
from server_ext.weights.host_copy import HostCopy
from server_ext.weights.store import WeightStore

HERE = Path(__file__).parent
OUT = HERE / "out" / "weights.json"
REPEATS, PUSHES = 5, 9


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def delta_figures(folder: Path, parameters: float) -> dict[str, float]:
    """Figures of the delta from version 20 to 21."""
    import torch

    model, old, new = make_model(parameters), folder / "20", folder / "21"
    for step, _ in enumerate(train(model, 21, lr=1e-6), start=1):
        if step >= 20:
            half = {n: t.to(torch.bfloat16) for n, t in weights_of(model, ALONE).items()}
            save_file(half, old if step == 20 else new)
    full_bytes, delta = new.stat().st_size, folder / "delta"
    manifest = make_manifest(new, 21, "model")
    encode_s, apply_s = [], []
    for _ in range(REPEATS):
        host = HostCopy(WeightStore(folder / "store", "model"), folder)
        host.read_files([old])
        begin = time.perf_counter()
        write_delta(old, new, delta)
        assert make_manifest(new, 21, "model") == manifest  # hashes what the delta has to give
        encode_s.append(time.perf_counter() - begin)
        apply_s.append(timed(lambda host=host: host.apply_delta(delta)))  # and hashes what it gave
        assert host.digest == manifest.digest, "not the new version to the bit"
    seconds = [a + b for a, b in zip(encode_s, apply_s, strict=True)]
    return {
        "delta_parameters": sum(p.numel() for p in model.parameters()),
        "delta_ratio": delta.stat().st_size / full_bytes,
        "delta_encode_s": statistics.median(encode_s),
        "delta_apply_s": statistics.median(apply_s),
        "delta_mb_per_s": full_bytes / 1e6 / statistics.median(seconds),
    }


def stream_figures(folder: Path, megabytes: int) -> dict[str, float]:
    """Every number is of the same bytes on the same disk, durable at the end."""
    rng = np.random.default_rng(0)
    model = folder / "model"
    model.mkdir()
    file = model / "model.safetensors"
    parts = {f"t{i}": rng.bytes(megabytes * 10**6 // 16) for i in range(16)}
    write_file(file, {n: ("BF16", (len(d) // 2,), d) for n, d in parts.items()})
    del parts
    size_mb = file.stat().st_size / 1e6
    plain_s, push_s, extra = [], [], []
    command = [sys.executable, str(HERE / "weights_sink.py"), str(model), str(folder / "data")]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin and server.stdout
        port = server.stdout.readline().strip()

        def memory() -> tuple[int, int]:
            server.stdin.write("\n")
            server.stdin.flush()
            peak, now = map(int, server.stdout.readline().split())
            return peak, now

        with Client(f"127.0.0.1:{port}") as client:
            for number in range(1, PUSHES + 2):
                manifest = make_manifest(file, number, "model")
                copy = folder / f"copy-{number}"  # beside the one before, as the server has to
                plain_s.append(timed(lambda copy=copy: copy_and_hash(file, copy)))
                (folder / f"copy-{number - 1}").unlink(missing_ok=True)
                _, before = memory()
                push_s.append(timed(lambda m=manifest: client.push_weights(m, file)))
                extra.append(memory()[0] - before)
        server.stdin.close()
        server.kill()
    return {
        "grpc_mb": size_mb,
        # the first push makes the host copy; the others change it in place
        "plain_mb_per_s": size_mb / statistics.median(plain_s[1:]),
        "grpc_mb_per_s": size_mb / statistics.median(push_s[1:]),
        "grpc_rate_ratio": statistics.median(plain_s[1:]) / statistics.median(push_s[1:]),
        "grpc_extra_chunks": max(extra[1:]) / CHUNK_BYTES,
    }


def copy_and_hash(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
        hashlib.file_digest(file, "sha256").digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="delta,stream,engine", help="some of them")
    parser.add_argument("--parameters", type=float, default=100e6, help="of the larger model")
    parser.add_argument("--stream-mb", type=int, default=1000, help="sent over gRPC")
    parser.add_argument("--updates", type=int, default=20, help="under load, of each model")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as name:
        folder = Path(name)
        for part in options.parts.split(","):
            (folder / part).mkdir()
        if "delta" in options.parts:
            figures |= delta_figures(folder / "delta", options.parameters)
        if "stream" in options.parts:
            figures |= stream_figures(folder / "stream", options.stream_mb)
        if "engine" in options.parts:
            figures |= engine_figures(folder / "engine", options.parameters, options.updates)
    show("weight updates", figures, OUT)


if __name__ == "__main__":
    main()
