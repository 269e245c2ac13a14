"""Nothing that grows with its input holds up the event loop: who works on which thread."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Sequence

import pytest

from ibtree.tree import Finish
from ibtree.wire.messages import prompt_to_proto
from ibtree.wire.unparsed import UnparsedPrompts
from ibtree.wire.v1 import sampling_pb2
from server_ext import interpreter
from server_ext.trees.off_loop import OffLoop
from tests.server_ext.fakes import ToyTokenizer
from tests.server_ext.site import Site, prompt


class WatchedTokenizer(ToyTokenizer):
    """Notes the threads that decode many tokens, or rollouts in many pieces."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def decode(self, token_ids: Sequence[int], *, special: bool = True) -> str:
        if len(token_ids) > 64:
            self.threads.add(threading.current_thread().name)
        return super().decode(token_ids, special=special)


async def test_one_thread_takes_its_work_in_order():
    off_loop, threads = OffLoop("rollouts"), []
    done = []

    def work(number: int) -> int:
        threads.append(threading.current_thread().name)
        done.append(number)
        return number

    assert await asyncio.gather(*(off_loop(work, n) for n in range(50))) == list(range(50))
    assert done == list(range(50)) and len({*threads}) == 1 and threads[0].startswith("rollouts")


async def test_few_tokens_stay_on_the_loop():
    off_loop, here = OffLoop("rollouts"), threading.get_ident()
    assert await off_loop.of_tokens(10, threading.get_ident) == here
    assert await off_loop.of_tokens(10_000, threading.get_ident) != here


async def test_failures_come_back():
    with pytest.raises(ZeroDivisionError):
        await OffLoop("rollouts")(lambda: 1 // 0)


@pytest.mark.parametrize("rule", ["text", "auto"])
async def test_long_rollouts_are_cut_and_decoded_beside_the_loop(tmp_path, rule):
    """Steps, the unit of the rule `auto`, stop strings and what is graded; all of it."""
    tokenizer = WatchedTokenizer()
    async with Site(tmp_path, tokenizer=tokenizer) as site:
        site.engine.context_tokens = 4096
        site.engine.write = lambda ids, number: "Some words. " * 100 + f"STOP #### {number}"
        wanted = prompt(rounds=1, step_rule=rule, max_new_tokens=2000, stop=("STOP",))
        tree = await site.client.sample_tree(wanted, timeout_s=60)
        assert {tree.finishes[end] for end in tree.end_nodes()} == {Finish.STOP}
        assert tokenizer.threads == {"rollouts_0"}


def test_bytes_and_prompts_are_alike_on_the_wire():
    prompts = [prompt_to_proto(prompt(f"{n}?", f"p{n}")) for n in range(3)]
    message = sampling_pb2.SubmitPromptsRequest(prompts=prompts)
    unparsed = UnparsedPrompts.FromString(message.SerializeToString())
    assert [sampling_pb2.Prompt.FromString(data) for data in unparsed.prompts] == prompts


async def test_a_submission_lets_others_have_their_turn(tmp_path):
    """Ten thousand prompts come in slices; a tree that is asked for meanwhile does not wait."""
    async with Site(tmp_path) as site:
        site.producing.cancel()
        many = [prompt("What?", f"p{n}") for n in range(5000)]
        submitting = asyncio.create_task(site.client.submit_prompts(many, timeout_s=60))
        slices = 0
        while not slices and not submitting.done():
            await asyncio.sleep(0.001)
            slices = site.forest.off_loop._executor._work_queue.qsize()
        turn = await site.forest.off_loop(threading.get_ident)
        assert turn and not submitting.done()
        assert await submitting == (5000, 0)


async def test_a_prompt_that_is_no_message_is_named(tmp_path):
    async with Site(tmp_path) as site:
        good = prompt_to_proto(prompt("What?", "good")).SerializeToString()
        request = UnparsedPrompts(prompts=[good, b"\xff\xff"])
        call = site.channel.unary_unary("/ibtree.v1.TreeSamplingService/SubmitPrompts")
        response = call(request.SerializeToString())
        assert (await response.code()).name == "INVALID_ARGUMENT"
        assert "prompts[1]" in await response.details()
        assert not any(vars(await site.client.queue_stats()).values())


def test_what_lasts_is_no_longer_collected():
    before, interval = gc.get_freeze_count(), sys.getswitchinterval()
    lasting = [[n] for n in range(10_000)]
    try:
        interpreter.settle()
        assert gc.get_freeze_count() >= before + len(lasting)
        assert sys.getswitchinterval() < interval
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)
