"""Metrics say what is so: counters of all that happened, gauges of now, nothing that is unknown."""

from __future__ import annotations

import asyncio
import math

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ibtree.client import RpcFailed
from ibtree.messages import CacheAudit, CacheState
from server_ext.errors import EngineError, NoReplyError
from server_ext.services import metrics as metrics_module
from server_ext.services.metrics import Metrics
from tests import ROOT
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt

STATE = CacheState(
    pool_tokens=100, capacity_tokens=75, evicted_tokens=7, prefill_passes=8, joined_requests=9
)


def families(metrics: Metrics) -> dict[str, str]:
    """The type of each family of metrics."""
    text = generate_latest(metrics.registry).decode()
    return {family.name: family.type for family in text_string_to_metric_families(text)}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"ibtpo_{name}", labels)


def test_what_is_unknown_is_absent():
    """`ranks_agree` was 0, which says "restart the server", while it was loading."""
    metrics = Metrics()
    names = [*metrics_module._GAUGES, *metrics_module._COUNTERS]
    assert not [name for name in families(metrics) if name.removeprefix("ibtpo_") in names]
    metrics.cache(STATE)
    assert value(metrics, "cache_ranks_agree") == 1.0
    assert set(names) <= {name.removeprefix("ibtpo_") for name in families(metrics)}
    metrics.cache(None)
    assert value(metrics, "cache_ranks_agree") is None


async def test_a_cache_that_does_not_answer_is_unknown_again(monkeypatch):
    monkeypatch.setattr(metrics_module, "_LOOK_EVERY_S", 0.01)
    metrics, answers = Metrics(), [STATE]

    async def state() -> CacheState:
        if not answers:
            raise NoReplyError("the radix cache did not answer")
        return answers[0]

    watching = asyncio.create_task(metrics.watch(state))
    await until(lambda: value(metrics, "cache_capacity_tokens") == 75)
    answers.clear()
    await until(lambda: value(metrics, "cache_capacity_tokens") is None)
    answers.append(STATE)
    await until(lambda: value(metrics, "cache_capacity_tokens") == 75)
    watching.cancel()


def test_what_only_grows_is_a_counter():
    metrics = Metrics()
    metrics.cache(STATE)
    types = families(metrics)
    growing = ("evicted", "passes", "joined", "trees", "generated", "prefix", "refilled", "audit")
    for name, kind in types.items():
        now = "open" in name or "protected" in name
        if not now and any(word in name for word in growing):
            assert kind in ("counter", "histogram"), name
    for name, seen in (("cache_evicted_tokens", 7), ("prefill_passes", 8), ("joined_requests", 9)):
        assert value(metrics, f"{name}_total") == seen


async def test_trees_count_however_they_end(tmp_path):
    metrics = Metrics()
    async with Site(tmp_path, ended=metrics.tree) as site:
        tree = await site.client.sample_tree(prompt())
        assert value(metrics, "trees_total", kind="call", outcome="scored") == 1
        spent = tree.ledger.generated_tokens
        assert value(metrics, "generated_tokens_total") == spent

        site.engine.go_on.clear()
        call = asyncio.create_task(site.client.sample_tree(prompt()))
        await until(lambda: len(site.engine.running) == DEFAULTS.init_rollouts)
        call.cancel()
        await until(lambda: value(metrics, "trees_total", kind="call", outcome="cancelled") == 1)
        spent += 3 * DEFAULTS.init_rollouts  # what the fake engine says of each in flight
        assert value(metrics, "generated_tokens_total") == spent
        site.engine.go_on.set()

        written = site.engine.write

        def fail(ids, number):
            if number == 4:
                raise EngineError("lost")
            return written(ids, number)

        site.engine.write = fail
        with pytest.raises(RpcFailed):
            site.client.patience_s = 0.0
            await site.client.sample_tree(prompt())
        failed = value(metrics, "trees_total", kind="call", outcome="failed")
        assert failed and failed >= 1
        now = value(metrics, "generated_tokens_total")
        assert now and now > spent, "four rollouts were generated"
        site.engine.write = written
        await site.client.submit_prompts([prompt(id="a")])
        assert await site.client.lease_trees(1, wait_s=10)
        assert value(metrics, "trees_total", kind="queued", outcome="scored") == 1


async def test_every_audit_counts(tmp_path):
    """Those that somebody asks for too."""
    metrics = Metrics()
    async with Site(tmp_path, audited=metrics.audit) as site:
        await site.client.audit_cache(4)
        assert value(metrics, "audits_total") == 0
        assert value(metrics, "audit_difference_nats_count") == 0, "nothing was compared"
        site.engine.go_on.clear()
        written = site.engine.write
        site.engine.write = lambda ids, number: written(ids, number)
        growing = asyncio.create_task(site.client.sample_tree(prompt(init_rollouts=1)))
        await until(lambda: site.engine.running)
        growing.cancel()
    metrics.audit(CacheAudit(samples=3, stale_tokens=2, max_difference=0.02))
    metrics.audit(CacheAudit(samples=1, max_difference=math.inf))
    assert value(metrics, "audits_total") == 4
    assert value(metrics, "audit_stale_tokens_total") == 2
    assert value(metrics, "audit_difference_nats_bucket", le="0.01") == 0
    assert value(metrics, "audit_difference_nats_bucket", le="0.1") == 1
    assert value(metrics, "audit_difference_nats_bucket", le="+Inf") == 2


def test_every_metric_is_documented():
    metrics = Metrics()
    metrics.cache(STATE)
    text = (ROOT / "docs/design.md").read_text()
    missing = []
    for name, kind in families(metrics).items():
        shown = f"`{name}_total" if kind == "counter" else f"`{name}"
        missing += [] if shown in text else [shown]
    assert not missing
