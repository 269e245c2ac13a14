"""The server process: a start in three acts, and a stop that is the same list backwards.

prepare   all that can fail in a second: settings, ports, model folder, journal, weight store, what
          SGLang makes of its arguments
engine    it loads; the newest weights, a first token
serve     services, producer; health says SERVING
   signal ─▶ health says NOT_SERVING, nothing new is taken, what has begun may end (stopping.py)
          ─▶ engine down ─▶ store, journal, folder, ports closed
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar
from wsgiref.simple_server import WSGIServer

import grpc

from ibtpo_settings.folder import alone_in
from ibtree.errors import FieldError
from ibtree.tree.options import SamplingOptions, TreeOptions, changed, options_from
from ibtree.weights.manifest import TensorSpec
from ibtree.weights.model_folder import checkpoint_specs, model_identity
from ibtree.wire.messages import prompt_from_bytes
from ibtree.wire.trees import tree_to_bytes
from server_ext import logs, supervisor
from server_ext.cache.audit import Auditor
from server_ext.cache.names import FRACTION_VARIABLE
from server_ext.config import ServerConfig
from server_ext.engine.arguments import Resolved, server_arguments
from server_ext.engine.pulse import Pulse
from server_ext.engine.sglang import SglangEngine
from server_ext.errors import EngineError, NoReplyError, RestartNeededError
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
from server_ext.services.channel import OTHER_CALLS, grpc_server, keep_message_memory
from server_ext.services.health import Health, serve_health
from server_ext.services.metrics import Metrics, serve_metrics
from server_ext.services.queue import QueueService
from server_ext.services.queue_metrics import QueueMetrics
from server_ext.services.reflection import add_reflection, check_installed
from server_ext.services.sampling import SamplingService
from server_ext.services.weights import WeightsService
from server_ext.stopping import Signals, drain
from server_ext.trees.forest import Forest, check_job_names
from server_ext.trees.limits import Limits
from server_ext.trees.text import Tokenizer
from server_ext.weights.store import WeightStore
from server_ext.weights.updater import WeightUpdater

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Prepared:
    """What the first act leaves: all of it checked, opened or bound."""

    graders: Graders
    defaults: TreeOptions
    limits: Limits
    model_id: str
    specs: dict[str, TensorSpec]
    tokenizer: Tokenizer
    server: grpc.aio.Server
    health: Health
    metrics: Metrics
    queue_metrics: QueueMetrics
    addresses: str
    journal: JournalThread
    store: WeightStore
    arguments: Resolved


async def serve(config: ServerConfig, sglang_arguments: Sequence[str]) -> None:
    """Runs the server until SIGTERM or SIGINT. Raises FieldError for bad settings,
    RestartNeededError when a new process is needed."""
    async with AsyncExitStack() as stack:  # whatever was started is shut down, newest first
        signals = Signals()
        signals.exit_on_signal()
        prepared = _prepare(config, sglang_arguments, stack)
        engine, updater = await _load(config, prepared, signals, stack)
        signals.take()
        await _serve(config, prepared, engine, updater, signals)


def _prepare(
    config: ServerConfig, sglang_arguments: Sequence[str], stack: AsyncExitStack
) -> _Prepared:
    """All that can fail in a second, before the minutes that loading takes. Raises FieldError."""
    if config.reflection:
        check_installed()
    metrics = Metrics()
    queue_metrics = QueueMetrics(metrics.registry)
    graders = _graders(config, stack, queue_metrics.zeroed)
    defaults = changed(options_from(config), separators=(config.separator,))
    check_job_names(defaults, graders, config.grader)
    limits = Limits(
        config.limit_trajectories,
        config.limit_new_tokens,
        config.limit_temperature,
        config.limit_deadline_s,
    )
    limits.applied(defaults)

    # two servers on one journal would each grow what the other is growing
    stack.enter_context(alone_in(config.data_dir, "data_dir", "server"))
    journal = JournalThread(partial(_journal, config))
    stack.callback(journal.close)
    keep_message_memory()
    most_calls = config.max_calls + config.max_waiting_calls + OTHER_CALLS
    server = grpc_server(most_calls, config.message_timeout_s)
    port = _bind("port", config, partial(_add_port, server))
    health = Health(config.stuck_after_s)
    health_server, health_port = _bind("health_port", config, partial(serve_health, health))
    stack.callback(lambda: health_server.stop(0).wait())
    web, web_port = _bind("web_port", config, partial(serve_metrics, metrics))
    stack.callback(_close, web)

    model_id, specs = model_identity(config.model), checkpoint_specs(config.model)
    tokenizer = Tokenizer(config.model)
    tokenizer.segmenter(config.separator)  # or the start is refused
    store = WeightStore(config.data_dir / "weights", model_id, config.keep_weights)
    server_args = server_arguments(
        str(config.model),
        config.device,
        config.dtype,
        SglangEngine.backend,
        sglang_arguments,
        {spec.name: spec.dtype for spec in specs.values()},
    )
    arguments = Resolved(server_args)
    logs.begin()
    check_context(config, arguments.context_tokens)
    return _Prepared(
        graders,
        defaults,
        limits,
        model_id,
        specs,
        tokenizer,
        server,
        health,
        metrics,
        queue_metrics,
        f"{config.host}:{port} (health {health_port}, web {web_port})",
        journal,
        store,
        arguments,
    )


async def _load(
    config: ServerConfig, prepared: _Prepared, signals: Signals, stack: AsyncExitStack
) -> tuple[SglangEngine, WeightUpdater]:
    """The engine, which has generated a token with the weights that served last."""
    engine = _engine(config, prepared.arguments)
    stack.callback(engine.shutdown)
    logs.begin()
    updater = WeightUpdater(
        engine,
        prepared.store,
        config.model,
        prepared.specs,
        prepared.model_id,
        config.push_idle_timeout_s,
    )
    await engine.generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)
    signals.exit_on_signal()  # with its first request SGLang takes them for itself
    await updater.restore()
    return engine, updater


async def _serve(
    config: ServerConfig,
    prepared: _Prepared,
    engine: SglangEngine,
    updater: WeightUpdater,
    signals: Signals,
) -> None:
    server, health, metrics = prepared.server, prepared.health, prepared.metrics
    cache = await engine.trees.state()  # also: the radix backend answers
    forest = Forest(
        engine,
        prepared.tokenizer,
        prepared.graders,
        model_id=prepared.model_id,
        defaults=prepared.defaults,
        default_grader=config.grader,
        limits=prepared.limits,
        max_open_trees=config.max_open_trees,
        max_calls=config.max_calls,
        max_waiting_calls=config.max_waiting_calls,
        max_rollouts=config.max_rollouts or await engine.most_running(),
        call_share=config.call_share,
        cache_tokens=cache.capacity_tokens or None,
        ended=metrics.tree,
        account_lost=prepared.queue_metrics.account_lost,
    )
    auditor = Auditor(engine, forest.open_prefixes, metrics.audit)
    journal, queue_metrics = prepared.journal, prepared.queue_metrics
    producer, sampling = _add_services(server, config, forest, journal, updater, queue_metrics)
    CacheService(engine.trees, auditor).add_to(server)
    health.add_to(server)
    if config.reflection:
        add_reflection(server)
    settle()
    await server.start()
    health.serving(True)
    print(f"ibtpo-server: serving on {prepared.addresses}", flush=True)
    supervisor.serving()
    background = [
        producer.run(),
        engine.trees.keep_open(),
        metrics.watch(engine.trees.state),
        queue_metrics.watch(lambda: journal(Journal.counts)),
        _raise_when(updater.broken),
        _watch(engine.pulse, health, config.stuck_after_s),
    ]
    if config.audit_every_s:
        background.append(auditor.run(config.audit_every_s))
    tasks = {asyncio.ensure_future(work) for work in background}
    asked = asyncio.ensure_future(signals.asked.wait())
    try:
        done, _ = await asyncio.wait({*tasks, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {asked}:
            signals.at_once.set()  # what grows may have no engine any more
            task.result()  # to end is an error, whatever the reason
    finally:
        _log.info("stopping")
        await drain(server, health, producer, sampling, config.shutdown_grace_s, signals.at_once)
        await sampling.stop()
        for task in {*tasks, asked}:
            task.cancel()
        await asyncio.wait({*tasks, asked})


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


def check_context(config: ServerConfig, context_tokens: int) -> None:
    """Raises FieldError for limits that no prompt could reach in the model's context; a default
    that nobody set gives way to it instead (Forest.check)."""
    longest = context_tokens - 2  # one token of the prompt, and the engine keeps one free
    allowed = f"at most {longest}: the model's context is {context_tokens} tokens"
    for field in ("limit_new_tokens", "max_new_tokens"):
        value = getattr(config, field)
        if field in config.model_fields_set and value is not None and value > longest:
            raise FieldError(field, f"got {value}", allowed)


def _engine(config: ServerConfig, arguments: Resolved) -> SglangEngine:
    # both are read by the engine's processes
    os.environ[FRACTION_VARIABLE] = str(config.tree_cache_fraction)
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    return SglangEngine(
        str(config.model),
        config.device,
        config.dtype,
        config.drain_timeout_s,
        arguments,
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
) -> tuple[Producer, SamplingService]:
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
    return producer, sampling


def _add_port(server: Any, address: str) -> int:
    return int(server.add_insecure_port(address))


def _bind(field: str, config: ServerConfig, bind: Callable[[str], T]) -> T:
    """Binds before the engine loads: a port in use must not cost minutes."""
    port = getattr(config, field)
    try:
        return bind(f"{config.host}:{port}")
    except RuntimeError as error:
        raise FieldError(field, f"port {port} cannot be listened on", "a free port") from error


def _close(web: WSGIServer) -> None:
    web.shutdown()
    web.server_close()


async def _watch(pulse: Pulse, health: Health, stuck_after_s: float) -> None:
    """Tells health each time the engine's work was seen to move, for ever."""
    while True:
        try:
            async with asyncio.timeout(stuck_after_s):
                await pulse.beat()
            health.beat()
        except (TimeoutError, EngineError, NoReplyError) as error:
            _log.error("nothing moves in the engine (%s %s)", type(error).__name__, error)
        await asyncio.sleep(stuck_after_s / 4)


async def _raise_when(broken: asyncio.Event) -> NoReturn:
    await broken.wait()
    raise RestartNeededError("the engine may hold a mix of weights; the server has to be restarted")
