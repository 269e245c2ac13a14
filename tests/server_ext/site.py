"""The three services on a real gRPC server over loopback, with the fake engine."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc
from prometheus_client import CollectorRegistry

from ibtree import AsyncClient, Prompt
from ibtree.tree.options import SamplingOptions, TreeOptions, changed
from ibtree.wire.messages import prompt_from_proto
from ibtree.wire.trees import tree_to_proto
from ibtree.wire.v1 import (
    cache_pb2_grpc,
    queue_pb2_grpc,
    sampling_pb2,
    sampling_pb2_grpc,
    weights_pb2_grpc,
)
from server_ext.cache.audit import Auditor
from server_ext.queue.intake import Intake
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import Producer
from server_ext.rewards.base import Graders
from server_ext.rewards.exact import ExactGrader
from server_ext.services.cache import CacheService
from server_ext.services.channel import SERVER_OPTIONS, grpc_server
from server_ext.services.queue import QueueService
from server_ext.services.queue_metrics import QueueMetrics
from server_ext.services.sampling import SamplingService
from server_ext.services.weights import WeightsService
from server_ext.trees.forest import Forest
from server_ext.trees.limits import Limits
from tests.server_ext.fakes import ToyTokenizer
from tests.server_ext.versions import MODEL_ID, Served

DEFAULTS = TreeOptions(
    init_rollouts=3, rounds=4, sampling=SamplingOptions(max_new_tokens=64, temperature=1.0)
)
CONTEXT, MAX_TRAJECTORIES = 512, 40


def prompt(text: str = "What?", id: str = "", grader: str = "", **options: Any) -> Prompt:
    return Prompt(text, id, "1", grader, changed(DEFAULTS, **options) if options else None)


class Site:
    """`async with Site(folder)`: built like server_ext.app, without the process around it."""

    port = 0
    """To listen on, once entered; 0 takes a free one."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        idle_timeout_s = limits.get("push_idle_timeout_s", 60.0)
        self.weights = Served(
            folder, limits.get("switch", "interrupt"), push_idle_timeout_s=idle_timeout_s
        )
        self._shared_dir = limits.get("shared_dir")
        self._audited = limits.get("audited", lambda _: None)
        self._most_calls = limits.get("most_calls", 1000)
        self._message_timeout_s = limits.get("message_timeout_s", 10.0)
        self.engine, self.updater = self.weights.engine, self.weights.updater
        self.tokenizer = limits.get("tokenizer") or ToyTokenizer()
        open_journal = partial(Journal, folder / "j.sqlite", max_returns=2, max_failures=3)
        self.journal = JournalThread(open_journal)
        self.registry = CollectorRegistry()
        self.queue_metrics = QueueMetrics(self.registry)
        self.forest = Forest(
            self.engine,
            self.tokenizer,
            Graders({"exact": ExactGrader("####"), **limits.get("graders", {})}),
            model_id=MODEL_ID,
            defaults=DEFAULTS,
            default_grader="exact",
            limits=limits.get("limits", Limits(MAX_TRAJECTORIES)),
            max_open_trees=limits.get("max_open_trees", 4),
            max_calls=limits.get("max_calls", 4),
            max_waiting_calls=limits.get("max_waiting_calls", 100),
            max_rollouts=limits.get("max_rollouts", 64),
            call_share=limits.get("call_share", 0.75),
            cache_tokens=limits.get("cache_tokens", 1_000_000),
            ended=limits.get("ended", lambda *_: None),
            account_lost=self.queue_metrics.account_lost,
        )
        self.producer = Producer(
            self.journal,
            self.forest,
            lambda data: prompt_from_proto(sampling_pb2.Prompt.FromString(data), DEFAULTS),
            lambda tree: tree_to_proto(tree).SerializeToString(),
            Intake(
                self.journal,
                limits.get("bounds"),
                lambda: self.updater.serving.version,
                told=self.queue_metrics.held,
            ),
            self.queue_metrics.ended,
        )
        max_queued = limits.get("max_queued", 20_000)
        self.sampling = SamplingService(self.forest, self.journal, self.producer, max_queued)

    async def __aenter__(self) -> Self:
        self.server = grpc_server(self._most_calls, self._message_timeout_s, SERVER_OPTIONS)
        self.sampling.add_to(self.server)
        queue = QueueService(self.journal, self.producer, 60.0, lambda: self.sampling.interactive)
        queue_pb2_grpc.add_TreeQueueServiceServicer_to_server(queue, self.server)
        weights = WeightsService(self.updater, self._shared_dir)
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights, self.server)
        auditor = Auditor(self.engine, self.forest.open_prefixes, self._audited)
        cache = CacheService(self.engine.trees, auditor)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(cache, self.server)
        port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.target = f"127.0.0.1:{port}"
        await self.server.start()
        self.producing = asyncio.create_task(self.producer.run())
        self.client = AsyncClient(self.target, timeout_s=20.0)
        # no retries: what the server says is what the test sees
        self.channel = grpc.aio.insecure_channel(self.target)
        self.raw_sampling = sampling_pb2_grpc.TreeSamplingServiceStub(self.channel)
        self.raw_queue = queue_pb2_grpc.TreeQueueServiceStub(self.channel)
        self.raw_weights = weights_pb2_grpc.WeightsServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.client.close()
        self.producing.cancel()  # before anything may end by itself
        with suppress(asyncio.CancelledError):
            await self.producing
        self.engine.go_on.set()
        self.engine.half_way.set()
        await self.server.stop(0)
        await self.sampling.stop()
        self.journal.close()

    def metric(self, name: str, **labels: str) -> float:
        """A metric of the queue, by its name without `ibtpo_`."""
        value = self.registry.get_sample_value(f"ibtpo_{name}", labels)
        assert value is not None, (name, labels)
        return value

    async def still_serves(self) -> None:
        """A tree grows, and the queue hands one out."""
        tree = await self.client.sample_tree(prompt("Still there?"), timeout_s=20)
        assert tree.trajectories == DEFAULTS.trajectories
        accepted, known = await self.client.submit_prompts([prompt("And the queue?", "still")])
        assert accepted + known == 1
        leased = await self.client.lease_trees(1, wait_s=10)
        assert [lease.tree.tree_id for lease in leased] == ["still"]
        await self.client.nack_trees([leased[0].lease_id], "only looking")
