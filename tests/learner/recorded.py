"""A server without an engine: the real queue, journal, producer and weights over gRPC, and
recorded trees.

It runs on a thread of the test's process; the learner is a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import grpc
import pytest
import torch

from ibtree.messages import Prompt
from ibtree.tree import Tree
from ibtree.tree.options import TreeOptions
from ibtree.weights.model_folder import checkpoint_specs, model_identity
from ibtree.wire.messages import prompt_from_proto
from ibtree.wire.trees import tree_to_proto
from ibtree.wire.v1 import (
    queue_pb2_grpc,
    sampling_pb2,
    sampling_pb2_grpc,
    tree_pb2,
    weights_pb2_grpc,
)
from learner.__main__ import main
from learner.train.model import load_policy
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import Producer
from server_ext.services.queue import QueueService
from server_ext.services.weights import WeightsService
from server_ext.weights.store import WeightStore
from server_ext.weights.updater import WeightUpdater
from tests import ROOT
from tests.learner.tiny import causal_lm, flat_tree, random_pair
from tests.server_ext.fakes import FakeEngine

RUN_ID = "recorded"
# `python -m learner` under a limit; not preexec_fn: gRPC's threads do not survive a plain fork
_LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("learner", run_name="__main__")
"""


def write_model(folder: Path) -> Path:
    """A tiny random model as a Hugging Face folder."""
    causal_lm().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}')
    return folder


def record(model_dir: Path, trees: int, per_step: int, seed: int = 0) -> list[Tree]:
    """Random trees of this model, by the number of their prompt; some are stale or uniform. The
    log-probabilities are not the model's, so ratios are far from 1."""
    rng, recording = random.Random(seed), []
    for number in range(trees):
        tree = random_pair(rng, levels=rng.choice([1, 2, 2, 3, 3])).fast
        tree.model_id = model_identity(model_dir)
        version = max(number // per_step - rng.choice([0, 0, 0, 1, 5]), 0)
        tree.steps[1:] = [
            replace(step, versions=(version,) * len(step.token_ids)) for step in tree.steps[1:]
        ]
        recording.append(tree)
    return recording


class ModelEngine(FakeEngine):
    """Computes with the weights that it was given, in float32."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__()
        self._model = load_policy(model_dir, torch.device("cpu"), "float32")
        self.off = 0.0
        """Added to what it computes [nats]."""

    async def try_out(self, prefix: Sequence[int], token: int) -> float:
        self.tried.append(self.version)
        self._model.load_state_dict(self.weights, strict=False)
        with torch.no_grad():
            logits = self._model(torch.tensor([list(prefix)])).logits[0, -1]
        return self.off + float(torch.log_softmax(logits, -1)[token])


class RecordedForest:
    """Stands in for the server's Forest: a prompt's tree is the recorded one, after a while that
    differs from server to server; a tree without an id has one rollout, of the reward that
    `rewards` gives the served weight version."""

    def __init__(self, recording: list[Tree], seed: int, served: Callable[[], int]) -> None:
        self.permits, self.defaults = asyncio.Semaphore(4), TreeOptions()
        self._recording, self._rng, self._served = recording, random.Random(seed), served
        self.rewards: dict[int, float] = {}

    async def off_loop(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)

    async def wants_tree(self) -> None:
        """It always does; `permits` are the limit."""

    def expect(self, rollouts: int) -> None:
        pass

    def check(self, prompt: Prompt) -> Prompt:
        return prompt

    async def grow(self, prompt: Prompt, *_: Any) -> Tree:
        if not prompt.id:
            return flat_tree([((1,), self.rewards[self._served()])])
        tree = deepcopy(self._recording[int(prompt.id.rpartition("/")[2])])
        tree.tree_id = prompt.id
        await asyncio.sleep(self._rng.uniform(0, 0.03))
        return tree


class RecordedSampling(sampling_pb2_grpc.TreeSamplingServiceServicer):
    """Stands for server_ext.services.sampling.SamplingService, whose checks need an engine."""

    def __init__(self, forest: RecordedForest, journal: JournalThread, producer: Producer) -> None:
        self._forest, self._journal, self._producer = forest, journal, producer

    async def SampleTree(self, request: Any, context: Any) -> Any:
        tree = await self._forest.grow(prompt_from_proto(request.prompt, TreeOptions()))
        yield sampling_pb2.SampleTreeResponse(tree=tree_to_proto(tree))

    async def SubmitPrompts(self, request: Any, context: Any) -> Any:
        prompts = [(p.id, p.SerializeToString(deterministic=True)) for p in request.prompts]
        accepted, known = await self._journal(Journal.submit, prompts)
        self._producer.notify()
        return sampling_pb2.SubmitPromptsResponse(accepted=accepted, known=known)


class _Calls(grpc.aio.ServerInterceptor):
    """Runs `action` when the next `left` calls have come."""

    def __init__(self) -> None:
        self.left, self.action = -1, lambda: None

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.action()
        return await continuation(details)


class RecordedServer:
    """Use as a context manager. `spoil` maps prompt numbers to what is done to their trees on the
    wire; times of growth follow from `seed`."""

    def __init__(
        self,
        folder: Path,
        model_dir: Path,
        recording: list[Tree],
        seed: int = 0,
        returns: int = 99,
        shared_dir: Path | None = None,
    ) -> None:
        self.folder, self._model_dir, self._recording = folder, model_dir, recording
        self._seed, self._returns, self._shared_dir = seed, returns, shared_dir
        self.spoil: dict[int, Callable[[tree_pb2.Tree], None]] = {}
        self._up, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._down.set)
        self._thread.join(30)

    def after_calls(self, count: int, delay_s: float, action: Callable[[], None]) -> None:
        """Runs `action` `delay_s` after the count-th call from now."""
        self._calls.action = partial(self._loop.call_later, delay_s, action)
        self._calls.left = count

    def reward(self, version: int, reward: float) -> None:
        """What a held-out rollout of this weight version gets."""
        self.forest.rewards[version] = reward

    def trees(self) -> dict[str, str]:
        """State of each prompt's tree by its id."""
        return self._ask("SELECT id, state FROM trees")

    def reasons(self) -> dict[str, str]:
        """Why trees were given back, as the journal keeps it."""
        return self._ask("SELECT id, reasons FROM trees WHERE reasons != '[]'")

    def _ask(self, query: str) -> dict[str, str]:
        def ask(journal: Journal) -> dict[str, str]:
            return dict(journal.database.connection.execute(query).fetchall())

        return asyncio.run_coroutine_threadsafe(self._journal(ask), self._loop).result(30)

    def _encode(self, tree: Tree) -> bytes:
        message = tree_to_proto(tree)
        self.spoil.get(int(tree.tree_id.rpartition("/")[2]), lambda _: None)(message)
        return message.SerializeToString()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._down, self._calls = asyncio.get_running_loop(), asyncio.Event(), _Calls()
        model_id = model_identity(self._model_dir)
        store = WeightStore(self.folder / "weights", model_id)
        specs = checkpoint_specs(self._model_dir)
        engine = ModelEngine(self._model_dir)
        self.updater = WeightUpdater(engine, store, self._model_dir, specs, model_id)
        self.forest = RecordedForest(
            self._recording, self._seed, lambda: self.updater.serving.version
        )
        self._journal = JournalThread(
            partial(Journal, self.folder / "journal.sqlite", max_returns=self._returns)
        )
        producer = Producer(
            self._journal,
            self.forest,  # type: ignore[arg-type]
            lambda data: prompt_from_proto(sampling_pb2.Prompt.FromString(data), TreeOptions()),
            self._encode,
        )
        server = grpc.aio.server(interceptors=[self._calls])
        sampling = RecordedSampling(self.forest, self._journal, producer)
        sampling_pb2_grpc.add_TreeSamplingServiceServicer_to_server(sampling, server)
        queue = QueueService(self._journal, producer, 60.0, lambda: 0)
        queue_pb2_grpc.add_TreeQueueServiceServicer_to_server(queue, server)
        weights = WeightsService(self.updater, self._shared_dir)
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights, server)
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        producing = asyncio.create_task(producer.run())
        self._up.set()
        await self._down.wait()
        await server.stop(0)
        producing.cancel()
        await asyncio.wait({producing})
        self._journal.close()


def torchrun(ranks: int) -> list[str]:
    """The command that starts what follows as often as there are ranks on this machine."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*line, f"--nproc-per-node={ranks}"]


class Learner:
    """A learner process; `start` again resumes its run."""

    def __init__(
        self, server: RecordedServer, model_dir: Path, *options: str, out_dir: Path | None = None
    ) -> None:
        self.out_dir = out_dir or server.folder / "run"
        self.out_dir.mkdir(parents=True, exist_ok=True)
        (self.out_dir / "run.json").write_text(f'{{"run_id": "{RUN_ID}"}}')
        prompts = server.folder / "prompts.jsonl"
        prompts.write_text("".join(f'{{"prompt": "q{n}", "answer": "1"}}\n' for n in range(7)))
        self.log = server.folder / "learner.log"
        self._arguments = [
            f"--server={server.target}",
            f"--model={model_dir}",
            f"--prompts={prompts}",
            f"--out-dir={self.out_dir}",
            "--device=cpu",
            "--threads=1",
            "--lease-s=6",
            "--patience-s=60",
            *options,
        ]

    def start(
        self, *more: str, ranks: int = 0, largest_file: int = resource.RLIM_INFINITY
    ) -> subprocess.Popen[bytes]:
        """Starts it; with `ranks`, torchrun and as many learners. `largest_file` [bytes] is a limit
        of the operating system, like a disk that is full."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-c", _LIMITED, str(largest_file), *self._arguments, *more]
        line = [*torchrun(ranks), "--no-python", *line] if ranks else line
        with self.log.open("ab") as file:
            return subprocess.Popen(line, stdout=file, stderr=file, env=environment, cwd=ROOT)

    def run_here(self, *more: str) -> str:
        """Runs to the end in this process, which is faster; its last words, empty if none."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["learner", *self._arguments, *more])
                main()
        except SystemExit as end:
            return str(end.code)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return ""

    def run(self, *, largest_file: int = resource.RLIM_INFINITY) -> SimpleNamespace:
        """Runs to the end: its exit code and what it has said so far."""
        process = self.start(largest_file=largest_file)
        try:
            code = process.wait(240)
        finally:
            process.kill()
        return SimpleNamespace(code=code, said=self.log.read_text())
