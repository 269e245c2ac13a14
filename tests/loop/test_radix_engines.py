"""The backend in real engines: a stock SGLang server, two tensor-parallel ranks, a bad start."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_radix import Arm
from processes import MODEL, Process

from server_ext.engine.cpu import SERVER_ARGUMENTS

STOCK = Path(__file__).parent / "stock"
START_S = 180.0


@pytest.fixture(scope="module")
def alone(server) -> Iterator[None]:
    """The session's engine makes room: one engine at a time."""
    server.stop()
    try:
        yield
    finally:
        server.start()


class Stock:
    """`python -m sglang.launch_server` with the backend, over HTTP."""

    def __init__(self, folder: Path, attention: str = "ibtree_cpu", **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = ["--radix-cache-backend=ibtree", f"--model-path={MODEL}", f"--port={self.port}"]
        of_cpu = [word.replace("ibtree_cpu", attention) for word in SERVER_ARGUMENTS]
        self.log = folder / "stock.log"
        command = [sys.executable, "-m", "sglang.launch_server", *arguments, *of_cpu]
        path = f"{STOCK}{os.pathsep}{Path.cwd()}"
        variables = {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        env = ["env", *(f"{k}={v}" for k, v in (variables | environment).items())]
        self.process = Process([*env, *command, "--dtype=float32"], self.log)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def wait(self) -> None:
        until = time.monotonic() + START_S
        while True:
            assert self.process.running(), self.process.last_words()
            assert time.monotonic() < until, self.process.last_words()
            try:
                self.generate([1])
            except OSError:
                time.sleep(0.5)
            else:
                return

    def generate(self, ids: list[int]) -> Any:
        sampling = {"max_new_tokens": 4, "temperature": 0}
        out = self.post("generate", input_ids=ids, sampling_params=sampling)
        return out["meta_info"]["cached_tokens"], out["output_ids"]


def test_stock_server(alone, tmp_path):
    """Chosen with a flag; a weight update needs no flush: the old prefix is not hit, and a label
    used twice is no way around that."""
    stock = Stock(tmp_path)
    try:
        stock.wait()
        prompt = list(range(20, 60))
        first, ids = stock.generate(prompt)
        again, same = stock.generate(prompt)
        assert (first, again) == (0, len(prompt) - 1) and ids == same
        for label in ("1", "1"):
            answer = stock.post(
                "update_weights_from_disk",
                model_path=str(MODEL),
                flush_cache=False,
                weight_version=label,
            )
            assert answer["success"]
            cached, same = stock.generate(prompt)
            assert cached == 0 and ids == same
            assert stock.generate(prompt)[0] == len(prompt) - 1
    finally:
        stock.process.stop()


def test_a_plugin_that_did_not_load_fails_the_start(alone, tmp_path):
    # the attention backend would not be known either, and is asked for first
    stock = Stock(tmp_path, "torch_native", SGLANG_PLUGINS="another")
    try:
        with pytest.raises(AssertionError):
            stock.wait()
        assert "--radix-cache-backend='ibtree' is not registered" in stock.log.read_text()
    finally:
        stock.process.stop()


def test_two_ranks_decide_the_same(alone, monkeypatch):
    """Over evictions, releases, expiries and updates."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    with Arm("ibtree", 1500, arguments=["--tp-size=2"], admission=False) as arm:
        result = arm("chaos", messages=300, grown=40, seed=0)
        assert result["protected_tokens"] == result["open_trees"] == 0
        updated = arm("updates", count=3, trees=8, seed=0)
        assert updated["cross_version_hits"] == 0 and updated["probed"] > 0
        assert updated["max_difference"] < 1e-4
        state = arm("state")
        assert state["ranks_agree"] and state["evicted_tokens"] > 0
