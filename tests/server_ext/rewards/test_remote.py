"""The grader `remote` against a real reward service on loopback, and without one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import grpc
import pytest

from ibtree.errors import Fault, FieldError
from ibtree.messages import QueueStats, Submission
from ibtree.wire.messages import prompt_to_proto
from ibtree.wire.v1 import reward_pb2, reward_pb2_grpc, sampling_pb2
from server_ext.errors import BadRewardError, GraderUnavailableError, GradingRefusedError
from server_ext.rewards.remote import RemoteGrader
from tests.server_ext.site import Site, prompt

ONE = Submission("What?", "#### 7", "seven", "tree-1")


class Service(reward_pb2_grpc.RewardServiceServicer):
    """Answers with `reward(trajectory)`s; before that fails `failures` times."""

    def __init__(self) -> None:
        self.reward: Callable[[reward_pb2.Trajectory], list[float]] = lambda _: [0.25]
        self.failures, self.code = 0, grpc.StatusCode.UNAVAILABLE
        self.seen: list[reward_pb2.Trajectory] = []
        self.hangs = False

    async def Grade(self, request, context):
        self.seen += request.trajectories
        if self.failures:
            self.failures -= 1
            await context.abort(self.code, "not now")
        if self.hangs:
            await asyncio.Event().wait()
        return reward_pb2.GradeResponse(
            rewards=[r for sent in request.trajectories for r in self.reward(sent)]
        )


@pytest.fixture
async def service():
    server, service = grpc.aio.server(), Service()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield service
    await server.stop(0)


@pytest.fixture
async def remote(service):
    grader = RemoteGrader(service.address, 10.0)
    yield grader
    await grader.close()


@pytest.fixture
async def site(tmp_path, remote):
    async with Site(tmp_path, graders={"remote": remote}) as site:
        yield site


async def test_the_service_sees_the_trajectory(service, remote):
    remote.check("")
    assert await remote.grade(ONE) == 0.25
    assert service.seen == [
        reward_pb2.Trajectory(tree_id="tree-1", prompt="What?", completion="#### 7", answer="seven")
    ]


async def test_unavailable_is_tried_again(service, remote):
    service.failures = 2
    assert await remote.grade(ONE) == 0.25
    assert len(service.seen) == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_an_outage_is_no_reward(service, remote, code):
    service.failures, service.code = 99, code
    with pytest.raises(GraderUnavailableError, match=f"{service.address}.*{code.name}.*not now"):
        await remote.grade(ONE)
    assert (len(service.seen) > 1) == (code is grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE])
async def test_what_the_service_refuses_is_the_trajectorys_fault(service, remote, code):
    service.failures, service.code = 1, code
    with pytest.raises(GradingRefusedError, match=f"{service.address}.*{code.name}.*not now"):
        await remote.grade(ONE)
    assert GradingRefusedError.fault is Fault.TREE


async def test_a_service_that_hangs_has_a_deadline(service):
    service.hangs = True
    grader = RemoteGrader(service.address, 0.3)
    with pytest.raises(GraderUnavailableError, match="DEADLINE_EXCEEDED"):
        await grader.grade(ONE)
    await grader.close()


async def test_a_service_that_is_not_there_yet_is_waited_for(service):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    absent, patient = RemoteGrader(address, 0.3), RemoteGrader(address, 20.0)
    with pytest.raises(GraderUnavailableError, match=address):
        await absent.grade(ONE)
    grade = asyncio.create_task(patient.grade(ONE))
    done, _ = await asyncio.wait({grade}, timeout=2.0)
    assert not done  # by now, retries alone would have been used up
    server = grpc.aio.server()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    server.add_insecure_port(address)
    await server.start()
    assert await grade == 0.25
    for grader in (absent, patient):
        await grader.close()
    await server.stop(0)


@pytest.mark.parametrize(
    ("rewards", "problem"),
    [
        ([], "0 rewards for 1"),
        ([1.0, 1.0], "2 rewards for 1"),
        ([1.5], "1.5 is not in"),
        ([-0.1], "-0.1 is not in"),
        ([float("nan")], "nan is not in"),
        ([float("inf")], "inf is not in"),
    ],
)
async def test_what_is_no_reward_is_an_error(service, remote, rewards, problem):
    service.reward = lambda _: rewards
    with pytest.raises(BadRewardError, match=f"{service.address}.*{problem}"):
        await remote.grade(ONE)
    assert BadRewardError.fault is Fault.DEPENDENCY


async def test_without_an_address_it_is_refused():
    grader = RemoteGrader("", 1.0)
    with pytest.raises(FieldError, match="reward_address") as caught:
        grader.check("7")
    assert caught.value.field == "grader"
    await grader.close()


async def test_partial_credit_reaches_the_tree(service, site):
    service.reward = lambda sent: [0.1 + 0.3 * int(sent.completion[-1])]
    question = prompt(id="mine", grader="remote")
    *expansions, tree = [e async for e in site.client.sample_events(question)]
    tree.validate()
    for node in tree.end_nodes():
        text = site.tokenizer.decode(tree.prefix(node), special=False)
        assert tree.reward(node) == pytest.approx(0.1 + 0.3 * int(text[-1]))
    total = sum(e.reward for e in expansions)
    assert tree.rewards().sum() == pytest.approx(total) == pytest.approx(tree.reward_sums[0])
    first = [e.reward for e in expansions if e.round == 1]
    assert tree.first_round_reward == pytest.approx(sum(first) / len(first))
    assert {(sent.tree_id, sent.prompt, sent.answer) for sent in service.seen} == {
        ("mine", "What?", "1")
    }


async def status(site: Site) -> tuple[grpc.StatusCode, str]:
    """A call that is not retried."""
    question = sampling_pb2.SampleTreeRequest(prompt=prompt_to_proto(prompt(grader="remote")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in site.raw_sampling.SampleTree(question):
            pass
    return caught.value.code(), caught.value.details()


async def test_an_outage_fails_the_tree_and_later_ones_grow(service, site):
    service.failures, service.code = 1, grpc.StatusCode.INTERNAL
    code, details = await status(site)
    assert code is grpc.StatusCode.UNAVAILABLE and service.address in details
    service.reward = lambda _: [2.0]
    code, details = await status(site)
    assert code is grpc.StatusCode.FAILED_PRECONDITION and service.address in details
    service.reward = lambda _: [0.5]
    tree = await site.client.sample_tree(prompt(grader="remote"))
    assert set(tree.rewards()) == {0.5}


async def test_a_queued_prompt_is_grown_again_after_an_outage(service, site):
    service.failures, service.code = 1, grpc.StatusCode.INTERNAL
    await site.client.submit_prompts([prompt(id="one", grader="remote")])
    (lease,) = await site.client.lease_trees(1, wait_s=10)
    assert set(lease.tree.rewards()) == {0.25}
    assert await site.client.queue_stats() == QueueStats(leased=1)
