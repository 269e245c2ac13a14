"""The server process: builds every part, serves until a signal, shuts down in order.

ports bound ─▶ engine loads ─▶ newest weights ─▶ first token ─▶ SERVING ─▶ signal ─▶ drained
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc

from ibtpo_settings.folder import alone_in
from ibtree.errors import FieldError
from ibtree.tree.options import SamplingOptions, changed, options_from
from ibtree.weights.model_folder import checkpoint_specs, model_identity
from ibtree.wire.messages import prompt_from_bytes
from ibtree.wire.trees import tree_to_bytes
from server_ext.cache.audit import Auditor
from server_ext.cache.names import FRACTION_VARIABLE
from server_ext.config import ServerConfig
from server_ext.engine.sglang import SglangEngine
from server_ext.interpreter import settle
from server_ext.queue.intake import Bounds, Intake
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import Producer
from server_ext.queue.retention import Retention
from server_ext.rewards.base import Grader, Graders, TreeGrader
from server_ext.rewards.exact import ExactGrader
from server_ext.rewards.installed import installed_graders
from server_ext.rewards.math import MathGrader
from server_ext.rewards.pool import GradingPool, Zero
from server_ext.rewards.regex import RegexGrader
from server_ext.rewards.remote import RemoteGrader
from server_ext.rewards.self_consistency import SelfConsistencyGrader
from server_ext.services.cache import CacheService
from server_ext.services.channel import SERVER_OPTIONS, keep_message_memory
from server_ext.services.health import Health, serve_health
from server_ext.services.metrics import Metrics, serve_metrics
from server_ext.services.queue import QueueService
from server_ext.services.queue_metrics import QueueMetrics
from server_ext.services.sampling import SamplingService
from server_ext.services.weights import WeightsService
from server_ext.trees.forest import Forest, check_job_names
from server_ext.trees.limits import Limits
from server_ext.trees.text import Tokenizer
from server_ext.weights.store import WeightStore
from server_ext.weights.updater import WeightUpdater

_log = logging.getLogger(__name__)
T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(config: ServerConfig, sglang_arguments: Sequence[str]) -> None:
    """Runs the server until SIGTERM or SIGINT. Raises FieldError for bad settings."""
    async with AsyncExitStack() as stack:  # whatever was started is shut down, newest first
        _exit_on_signal()
        model_id = model_identity(config.model)
        metrics = Metrics()
        queue_metrics = QueueMetrics(metrics.registry)
        graders = _graders(config, stack, queue_metrics.zeroed)
        defaults = changed(options_from(config), separators=(config.separator,))
        check_job_names(defaults, graders, config.grader)

        # two servers on one journal would each grow what the other is growing
        stack.enter_context(alone_in(config.data_dir, "data_dir", "server"))
        journal = JournalThread(partial(_journal, config))
        stack.callback(journal.close)
        keep_message_memory()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        port = _bind("port", config, partial(_add_port, server))
        health = Health()
        health_server, health_port = _bind("health_port", config, partial(serve_health, health))
        stack.callback(lambda: health_server.stop(0).wait())
        web, web_port = _bind("web_port", config, partial(serve_metrics, metrics))
        stack.callback(web.server_close)
        stack.callback(web.shutdown)
        tokenizer = Tokenizer(config.model)
        tokenizer.segmenter(config.separator)  # or the start is refused
        try:
            engine = _engine(config, sglang_arguments)
        except FieldError:
            del server  # the traceback would keep it until gRPC itself is gone, and crash the exit
            raise
        stack.callback(engine.shutdown)
        store = WeightStore(config.data_dir / "weights", model_id, config.keep_weights)
        specs = checkpoint_specs(config.model)
        updater = WeightUpdater(engine, store, config.model, specs, model_id)
        await engine.generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)
        await updater.restore()
        cache = await engine.trees.state()  # also: the radix backend answers
        stopping = _take_signals_back()

        forest = Forest(
            engine,
            tokenizer,
            graders,
            model_id=model_id,
            defaults=defaults,
            default_grader=config.grader,
            limits=Limits(
                config.limit_trajectories,
                config.limit_new_tokens,
                config.limit_temperature,
                config.limit_deadline_s,
            ),
            max_open_trees=config.max_open_trees,
            max_calls=config.max_calls,
            max_waiting_calls=config.max_waiting_calls,
            max_rollouts=config.max_rollouts or await engine.most_running(),
            cache_tokens=cache.capacity_tokens or None,
            ended=metrics.tree,
            account_lost=queue_metrics.account_lost,
        )
        auditor = Auditor(engine, forest.open_prefixes)
        producer = _add_services(server, config, forest, journal, updater, queue_metrics)
        CacheService(engine.trees, auditor).add_to(server)
        health.add_to(server)
        settle()
        await server.start()
        health.serving(True)
        print(
            f"ibtpo-server: serving on {config.host}:{port} (health {health_port}, web {web_port})",
            flush=True,
        )
        background = [
            producer.run(),
            engine.trees.keep_open(),
            metrics.watch(engine.trees.state),
            queue_metrics.watch(lambda: journal(Journal.counts)),
            _raise_when(updater.broken),
        ]
        if config.audit_every_s:
            background.append(auditor.run(config.audit_every_s, metrics.audit))
        await _until(stopping, server, health, config, *background)


async def _until(
    stopping: asyncio.Event,
    server: grpc.aio.Server,
    health: Health,
    config: ServerConfig,
    *background: Coroutine[Any, Any, None],
) -> None:
    """Serves until the signal, or until something in the background fails; then drains."""
    works = (*background, _beat(health), stopping.wait())
    tasks = {asyncio.ensure_future(work) for work in works}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # anything but the signal is an error
    finally:
        health.serving(False)
        _log.info("shutting down")
        await server.stop(config.shutdown_grace_s)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _graders(
    config: ServerConfig, stack: AsyncExitStack, zeroed: Callable[[Zero], None] = lambda _: None
) -> Graders:
    """Built-in names win over those of installed packages."""
    marker = config.answer_marker
    pool = GradingPool(config.grader_workers, config.grade_timeout_s, zeroed)
    stack.callback(pool.close)
    remote = RemoteGrader(config.reward_address, config.reward_timeout_s)
    stack.push_async_callback(remote.close)
    if config.grader == "remote":
        remote.check("")
    built_in: dict[str, Grader | TreeGrader] = {
        "exact": ExactGrader(marker),
        "math": MathGrader(pool, marker),
        "regex": RegexGrader(pool, marker),
        "self_consistency": SelfConsistencyGrader(marker),
        "remote": remote,
    }
    return Graders(installed_graders(pool) | built_in)


def _engine(config: ServerConfig, sglang_arguments: Sequence[str]) -> SglangEngine:
    # both are read by the engine's processes
    os.environ[FRACTION_VARIABLE] = str(config.tree_cache_fraction)
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    return SglangEngine(
        str(config.model),
        config.device,
        config.dtype,
        config.drain_timeout_s,
        sglang_arguments,
        config.weight_switch,
    )


def _journal(config: ServerConfig) -> Journal:
    return Journal(
        config.data_dir / "journal.sqlite",
        max_returns=config.max_returns,
        max_failures=config.max_failures,
        retention=Retention(config.keep_acked, config.keep_dead_bytes),
    )


def _add_services(
    server: grpc.aio.Server,
    config: ServerConfig,
    forest: Forest,
    journal: JournalThread,
    updater: WeightUpdater,
    metrics: QueueMetrics,
) -> Producer:
    bounds = Bounds(config.min_free_bytes, config.max_graded, config.max_weight_lag)
    intake = Intake(journal, bounds, lambda: updater.serving.version, told=metrics.held)
    producer = Producer(
        journal,
        forest,
        lambda prompt: prompt_from_bytes(prompt, forest.defaults),
        tree_to_bytes,
        intake,
        metrics.ended,
    )
    sampling = SamplingService(forest, journal, producer, config.max_queued_prompts)
    queue = QueueService(journal, producer, config.lease_s, lambda: sampling.interactive)
    sampling.add_to(server)
    queue.add_to(server)
    WeightsService(updater, config.shared_dir).add_to(server)
    return producer


def _add_port(server: Any, address: str) -> int:
    return int(server.add_insecure_port(address))


def _bind(field: str, config: ServerConfig, bind: Callable[[str], T]) -> T:
    """Binds before the engine loads: a port in use must not cost minutes."""
    port = getattr(config, field)
    try:
        return bind(f"{config.host}:{port}")
    except RuntimeError as error:
        raise FieldError(field, f"port {port} cannot be listened on", "a free port") from error


def _exit_on_signal() -> None:
    """Lets a signal unwind the stack until the engine is up: what was started is shut down."""

    def leave(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, leave)


def _take_signals_back() -> asyncio.Event:
    """Replaces the SIGTERM handler that SGLang installs with its first request."""
    stopping = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


async def _beat(health: Health) -> None:
    while True:
        health.beat()
        await asyncio.sleep(1.0)


async def _raise_when(broken: asyncio.Event) -> NoReturn:
    await broken.wait()
    raise RuntimeError("the engine may hold a mix of weights; start the server again")
