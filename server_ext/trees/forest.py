"""Every growing tree: checks prompts at the door, admits trees, grows them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from enum import Enum
from typing import TypeVar

from ibtree.errors import FieldError
from ibtree.messages import Chat, Expansion, Progress, Prompt
from ibtree.tree import Tree
from ibtree.tree.options import TreeOptions, changed, check_choice, check_length, completed
from server_ext.cache.audit import OpenPrefix
from server_ext.cache.open_trees import TreeAccount
from server_ext.capacity.admission import Admission
from server_ext.capacity.calls import Calls
from server_ext.capacity.pace import Pace
from server_ext.capacity.shares import Kind, Shares, shares_of
from server_ext.capacity.slots import Slots
from server_ext.engine.port import Engine
from server_ext.errors import GrowthError, NoReplyError
from server_ext.rewards.base import Graders
from server_ext.trees.cutter import StepCutter
from server_ext.trees.grower import SCHEDULES, Grower
from server_ext.trees.job import Job
from server_ext.trees.judge import TreeJudge
from server_ext.trees.limits import Limits
from server_ext.trees.off_loop import OffLoop
from server_ext.trees.remaining import left_s
from server_ext.trees.sampler import SamplerParts, TreeSampler
from server_ext.trees.strategies import strategy_named
from server_ext.trees.text import Tokenizer

T = TypeVar("T")
_log = logging.getLogger(__name__)
_MAX_ID_CHARACTERS = 256
_MAX_ANSWER_CHARACTERS = 65_536
_NO_LIMIT = 2**31


class Outcome(Enum):
    """How the growth of a tree ended."""

    SCORED = "scored"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Forest:
    """Grows trees; whoever grows one holds one of the `permits`, or one that `calls` gave."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        graders: Graders,
        *,
        model_id: str,
        defaults: TreeOptions,
        default_grader: str,
        limits: Limits,
        max_open_trees: int,
        max_calls: int,
        max_waiting_calls: int,
        max_rollouts: int,
        call_share: float = 0.75,
        cache_tokens: int | None,
        ended: Callable[[Tree, Kind, Outcome], None] = lambda *_: None,
        account_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_rollouts` may be in flight at once, and trees of queued prompts are opened until
        they are, at most `max_open_trees` (0: no limit of its own); `call_share`, in (0, 1): what
        calls have of slots and cache while queued prompts want them too; `cache_tokens`: what the
        radix cache can hold for open trees (None: nobody knows); `ended` is told of each tree that
        began to grow, when it has ended, `account_lost` of each whose reuse the cache did not
        tell."""
        self.defaults, self.model_id = defaults, model_id
        shares = shares_of(call_share)
        self.slots = Slots(max_rollouts, Shares(shares))
        self.paces = {kind: Pace() for kind in Kind}
        self._rollouts = OffLoop("rollouts")
        self._sampler_parts = SamplerParts(engine, tokenizer, self.slots, self._rollouts)
        self._engine, self._tokenizer = engine, tokenizer
        self._graders, self._default_grader = graders, default_grader
        self._limits = limits
        self.permits = asyncio.Semaphore(max_open_trees or _NO_LIMIT)
        self.calls = Calls(max_calls, max_waiting_calls, self.paces[Kind.CALL])
        self._admission = Admission(cache_tokens, shares)
        self._ended, self._account_lost = ended, account_lost
        self._open: dict[str, Tree] = {}
        self._samplers: dict[int, tuple[Tree, TreeSampler]] = {}
        """Of the jobs that grow now, by identity."""
        self._since: dict[int, float] = {}
        """When they began, by `time.monotonic`."""
        self._starting = 0
        """Rollouts that trees will want which have a permit and have not begun."""
        self.off_loop = OffLoop("prompts")
        """Tokenises and checks prompts, (de)serialises them and trees."""
        check_job_names(defaults, graders, default_grader)
        limits.applied(defaults)

    async def wants_tree(self) -> None:
        """Returns when there are slots for queued prompts that none of their trees will claim, and
        no such tree waits for room in the cache."""
        kind = Kind.QUEUED
        while self._admission.waiting(kind) or self.slots.unclaimed(kind) <= self._starting:
            await self.slots.changed()

    def expect(self, rollouts: int) -> None:
        """A tree was given a permit that will want so many rollouts at first; negative: it has
        begun, or failed."""
        self._starting += rollouts
        self.slots.tell()

    def progress(self, job: Job, since_s: float) -> Progress:
        """What goes on in the job's tree; `since_s`: when its call came [Unix seconds]."""
        tree, sampler = self._samplers.get(id(job), (Tree(prompt=()), None))
        unfinished = sampler.unfinished_tokens() if sampler else 0
        return Progress(
            rollouts_in_flight=sampler.in_flight if sampler else 0,
            generated_tokens=tree.ledger.generated_tokens + unfinished,
            trajectories=tree.trajectories,
            target_trajectories=job.options.trajectories,
            elapsed_s=max(time.time() - since_s, 0.0),
        )

    def has_begun(self, job: Job) -> bool:
        """Whether the job's tree grows now; one that has ended does not."""
        return id(job) in self._samplers

    def left_s(self, job: Job) -> float | None:
        """Seconds to the end of the job's tree at its pace so far; None: it has none yet."""
        if id(job) not in self._samplers:
            return None
        tree, _ = self._samplers[id(job)]
        return left_s(tree, time.monotonic() - self._since[id(job)])

    def check(self, prompt: Prompt) -> Job:
        """The job of a prompt. Raises FieldError that names the field and what is allowed."""
        check_length("prompt.id", prompt.id, _MAX_ID_CHARACTERS)
        check_length("answer", prompt.answer, _MAX_ANSWER_CHARACTERS)
        options = completed(prompt.options, self.defaults)
        grader = prompt.grader or self._default_grader
        check_job_names(options, self._graders, grader)
        self._graders.check(grader, prompt.answer)
        options = self._limits.applied(options)
        self._check_vocabulary("sampling.stop_token_ids", options.sampling.stop_token_ids)
        self._check_steps(options)
        token_ids = self._token_ids(prompt)
        # the engine keeps room for one more token than it is asked to generate
        room = self._engine.context_tokens - len(token_ids) - 1
        new_tokens = options.sampling.max_new_tokens
        if new_tokens == self.defaults.sampling.max_new_tokens and 1 <= room < new_tokens:
            options = changed(options, max_new_tokens=room)  # a default gives way to the context
        longest = self._engine.context_tokens - options.sampling.max_new_tokens - 1
        if len(token_ids) > longest:
            raise FieldError(
                "prompt",
                f"{len(token_ids)} tokens",
                f"at most {longest}: context {self._engine.context_tokens} minus "
                f"sampling.max_new_tokens {options.sampling.max_new_tokens} minus 1",
            )
        tree_id = prompt.id or uuid.uuid4().hex
        return Job(tree_id, token_ids, prompt.answer, grader, options)

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt.content, str):
            self._check_length(len(prompt.content))
            token_ids = self._tokenizer.encode(prompt.content)
        elif isinstance(prompt.content, Chat):
            _check_chat(prompt.content)
            self._check_length(sum(len(turn.content) for turn in prompt.content.messages))
            token_ids = self._tokenizer.encode_chat(prompt.content)
        else:
            token_ids = tuple(prompt.content)
            self._check_vocabulary("prompt.token_ids", token_ids)
        if not token_ids:
            raise FieldError("prompt", "empty", "text, token_ids or chat of at least one token")
        return token_ids

    def _check_steps(self, options: TreeOptions) -> None:
        try:
            StepCutter(self._tokenizer, options, self.off_loop)
        except FieldError as error:
            raise FieldError("options.separators", error.problem, error.allowed) from error

    def _check_length(self, characters: int) -> None:
        """A text too long for the context however it is tokenised is not tokenised at all."""
        most = self._engine.context_tokens * self._tokenizer.longest_token
        if characters > most:
            problem = f"{characters} characters"
            allowed = f"at most {most}, in a context of {self._engine.context_tokens} tokens"
            raise FieldError("prompt", problem, allowed)

    def _check_vocabulary(self, field: str, token_ids: Sequence[int]) -> None:
        size = self._tokenizer.model_vocabulary
        for token in token_ids:
            if not 0 <= token < size:
                raise FieldError(field, f"no token {token}", f"0 to {size - 1}")

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self._tokenizer.decode(token_ids, special=False)

    async def grow_for_call(
        self, job: Job, emit: Callable[[Expansion], None], arrived_at: float
    ) -> Tree:
        """Grows the tree of a call's job as soon as a permit for calls is free. Raises GrowthError
        if the job's deadline passes before. `arrived_at`: when the call came [Unix seconds]."""
        async with self._in_time(self.calls.permit(), job.until, "a permit (--max-calls)"):
            return await self.grow(job, emit, arrived_at)

    @asynccontextmanager
    async def _in_time(
        self, room: AbstractAsyncContextManager[T], until: float | None, what: str
    ) -> AsyncIterator[T]:
        """The room; raises GrowthError if the deadline comes before there is any."""
        async with AsyncExitStack() as stack:
            timeout_s = None if until is None else until - time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    entered = await stack.enter_async_context(room)
            except TimeoutError as error:
                problem = f"no rollout finished (deadline): the call waited for {what}"
                raise GrowthError(problem) from error
            yield entered

    async def grow(
        self,
        job: Job,
        emit: Callable[[Expansion], None],
        submitted_at: float,
        began: Callable[[], None] = lambda: None,
    ) -> Tree:
        """Grows the job's tree; hold a permit. `submitted_at` is Unix seconds; `began` is told
        when its first rollouts claim their slots."""
        options, pace = job.options, self.paces[job.kind]
        most_tokens = options.trajectories * options.sampling.max_new_tokens
        room = self._admission.reserve(len(job.token_ids), most_tokens, job.kind)
        try:
            with pace.growing():
                async with self._in_time(room, job.until, "room in the cache") as reservation:
                    tree = await self._grow(job, emit, submitted_at, began)
                    self._admission.ended(reservation, tree.unique_tokens)
                pace.ended()
        finally:
            self.slots.tell()  # whether another tree is wanted depends on who waits for room too
        return tree

    async def _grow(
        self,
        job: Job,
        emit: Callable[[Expansion], None],
        submitted_at: float,
        began: Callable[[], None],
    ) -> Tree:
        tree = Tree(
            prompt=job.token_ids,
            tree_id=job.tree_id,
            model_id=self.model_id,
            answer=job.answer,
            options=job.options,
        )
        tree.ledger.queue_s = max(time.time() - submitted_at, 0.0)
        # a prompt may be grown again after a failure while its old requests still die
        name = f"{job.tree_id}/{uuid.uuid4().hex[:8]}"
        seed = random.getrandbits(63) if job.options.seed is None else job.options.seed
        tree.ledger.seed = seed
        sampler = TreeSampler(self._sampler_parts, job, name, seed, began)
        grader = self._graders.named(job.grader)
        judge = TreeJudge(grader, self._tokenizer, job, self._rollouts)

        def tell(event: Expansion) -> None:
            if job.include_text:
                generated = tree.prefix(event.end_node)[tree.depth_tokens(event.start_node) :]
                event = replace(event, text=self.text(generated))
            emit(event)

        self._engine.trees.open(name)
        self._open[name] = tree
        self._samplers[id(job)] = tree, sampler
        outcome = Outcome.FAILED
        self._since[id(job)] = time.monotonic()
        try:
            strategy = strategy_named(job.options.strategy)
            await Grower(tree, strategy, sampler, judge, tell, job.until).grow()
            account = await self._account(name)
            tree.ledger.refilled_tokens = account.refilled
            tree.ledger.protected_tokens = account.protected
            outcome = Outcome.SCORED
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        finally:
            sampler.close()
            del self._open[name], self._samplers[id(job)], self._since[id(job)]
            self._engine.trees.drop(name)
            self._ended(tree, job.kind, outcome)
        return tree

    async def _account(self, name: str) -> TreeAccount:
        """What the tree reused; nothing if that got lost: the tree itself is finished."""
        try:
            return await self._engine.trees.close(name)
        except NoReplyError as error:
            _log.warning("what tree %r reused is not known: %s", name, error)
            self._account_lost()
            return TreeAccount()

    def open_prefixes(self, most: int | None = None) -> list[OpenPrefix]:
        """Prefixes of the trees that grow now: of a prompt, or of a node that has a child. At most
        so many, drawn at random: only those are put together."""
        nodes = [(name, node) for name, tree in self._open.items() for node in tree.inner_nodes()]
        if most is not None:
            nodes = random.sample(nodes, min(most, len(nodes)))
        return [self._open_prefix(name, node) for name, node in nodes]

    def _open_prefix(self, name: str, node: int) -> OpenPrefix:
        tree = self._open[name]
        next_token = tree.steps[tree.children(node)[0]].token_ids[0]
        return OpenPrefix(name, (*tree.prompt, *tree.prefix(node)), next_token)


def _check_chat(chat: Chat) -> None:
    if not chat.messages:
        raise FieldError("prompt.chat.messages", "empty", "at least one")
    for at, turn in enumerate(chat.messages):
        if not turn.role:
            where = f"prompt.chat.messages[{at}].role"
            raise FieldError(where, "empty", "a role of the model's chat template")


def check_job_names(options: TreeOptions, graders: Graders, grader: str) -> None:
    """Raises FieldError for an unknown strategy, schedule or grader."""
    strategy_named(options.strategy)
    check_choice("options.schedule", options.schedule, SCHEDULES)
    graders.named(grader)
