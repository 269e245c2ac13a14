"""Every growing tree: checks prompts at the door, admits trees, joins engine, text and graders."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ibtree.errors import FieldError
from ibtree.messages import Chat, Expansion, Prompt, Submission
from ibtree.options import TreeOptions, check_choice, completed
from ibtree.tree import Finish, Step, Tree
from server_ext.admission import Admission
from server_ext.engine import Completion, Engine
from server_ext.grow.grower import SCHEDULES, Grower, Rollout
from server_ext.grow.segment import Segmenter
from server_ext.grow.stops import stop_length
from server_ext.grow.strategies import strategy_named
from server_ext.rewards.base import Graders, TreeGrader
from server_ext.text import Tokenizer

_MAX_ID_CHARACTERS = 256
_WARM_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """A checked prompt: everything needed to grow its tree."""

    tree_id: str
    token_ids: tuple[int, ...]
    answer: str
    grader: str
    options: TreeOptions
    include_text: bool = False
    """Whether its expansions carry their text."""


@dataclass(frozen=True)
class OpenPrefix:
    """A prefix of a growing tree, and a token that followed it."""

    tree: str
    token_ids: tuple[int, ...]
    next_token: int


class Forest:
    """Grows trees; whoever grows one holds one of the `places` for open trees."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        segmenter: Segmenter,
        graders: Graders,
        *,
        model_id: str,
        defaults: TreeOptions,
        default_grader: str,
        max_trajectories: int,
        max_open_trees: int,
        cache_tokens: int | None,
        ended: Callable[[Tree], None] = lambda _: None,
    ) -> None:
        """`cache_tokens`: what the radix cache can hold for open trees (None: nobody knows);
        `ended` is told of each tree that was grown to its end."""
        self.defaults, self.model_id = defaults, model_id
        self._engine, self._tokenizer, self._segmenter = engine, tokenizer, segmenter
        self._graders, self._default_grader = graders, default_grader
        self._max_trajectories = max_trajectories
        self.places = asyncio.Semaphore(max_open_trees)
        self._admission = Admission(cache_tokens)
        self._ended = ended
        self._open: dict[str, Tree] = {}
        check_job_names(defaults, graders, default_grader)

    def check(self, prompt: Prompt) -> Job:
        """The job of a prompt. Raises FieldError that names the field and what is allowed."""
        if len(prompt.id) > _MAX_ID_CHARACTERS:
            problem = f"{len(prompt.id)} characters"
            raise FieldError("prompt.id", problem, f"at most {_MAX_ID_CHARACTERS}")
        options = completed(prompt.options, self.defaults)
        grader = prompt.grader or self._default_grader
        check_job_names(options, self._graders, grader)
        self._graders.check(grader, prompt.answer)
        if options.trajectories > self._max_trajectories:
            problem = f"the shape asks for {options.trajectories} trajectories"
            allowed = f"at most {self._max_trajectories} (the server's --max-trajectories)"
            raise FieldError("options.rounds", problem, allowed)
        self._check_vocabulary("sampling.stop_token_ids", options.sampling.stop_token_ids)
        token_ids = self._token_ids(prompt)
        # the engine keeps a place for one more token than it is asked to generate
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
            token_ids = self._tokenizer.encode(prompt.content)
        elif isinstance(prompt.content, Chat):
            _check_chat(prompt.content)
            token_ids = self._tokenizer.encode_chat(prompt.content)
        else:
            token_ids = tuple(prompt.content)
            self._check_vocabulary("prompt.token_ids", token_ids)
        if not token_ids:
            raise FieldError("prompt", "empty", "text, token_ids or chat of at least one token")
        return token_ids

    def _check_vocabulary(self, field: str, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if not 0 <= token < len(self._tokenizer):
                raise FieldError(field, f"no token {token}", f"0 to {len(self._tokenizer) - 1}")

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self._tokenizer.decode(token_ids, special=False)

    async def grow(self, job: Job, emit: Callable[[Expansion], None], submitted_at: float) -> Tree:
        """Grows the job's tree; hold one of `places`. `submitted_at` is Unix seconds."""
        options = job.options
        most_tokens = options.trajectories * options.sampling.max_new_tokens
        async with self._admission.place(len(job.token_ids), most_tokens) as place:
            tree = await self._grow(job, emit, submitted_at)
            self._admission.ended(place, tree.unique_tokens)
        self._ended(tree)
        return tree

    async def _grow(self, job: Job, emit: Callable[[Expansion], None], submitted_at: float) -> Tree:
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
        sampler = _TreeSampler(
            self._engine, self._tokenizer, self._segmenter, self._graders, job, name
        )

        def tell(event: Expansion) -> None:
            if job.include_text:
                generated = tree.prefix(event.end_node)[tree.depth_tokens(event.start_node) :]
                event = replace(event, text=self.text(generated))
            emit(event)

        self._engine.trees.open(name)
        self._open[name] = tree
        try:
            await Grower(tree, strategy_named(job.options.strategy), sampler, tell).grow()
            account = await self._engine.trees.close(name)
        finally:
            sampler.close()
            del self._open[name]
            self._engine.trees.drop(name)
        tree.ledger.refilled_tokens = account.refilled
        tree.ledger.protected_tokens = account.protected
        return tree

    def open_prefixes(self) -> list[OpenPrefix]:
        """Of every tree that grows now: the prompt, and each node that has a child."""
        return [
            OpenPrefix(name, (*tree.prompt, *tree.prefix(node)), tree.steps[child].token_ids[0])
            for name, tree in self._open.items()
            for node in range(len(tree))
            for child in tree.children(node)[:1]
        ]


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


class _TreeSampler:
    """The grower's sampler for one tree; request ids are `<name>/<rollout>`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        segmenter: Segmenter,
        graders: Graders,
        job: Job,
        name: str,
    ) -> None:
        self._engine, self._tokenizer, self._segmenter = engine, tokenizer, segmenter
        self._job, self._grader, self._name = job, graders.named(job.grader), name
        self._prompt_text = tokenizer.decode(job.token_ids, special=False)
        self._in_flight: set[str] = set()
        self._aborted = False
        self._warming: asyncio.Task[None] | None = None
        self._votes: dict[tuple[int, ...], str] = {}
        self._voters: dict[int, str] = {}
        """Votes by the node that the trajectory ends with."""

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        if start == 0 and len(tree.prompt) >= _WARM_TOKENS:
            await self._warmed(tree)
            if self._aborted:
                return Rollout([], Finish.NONE, 0, 0)
        prefix = tree.prefix(start)
        left = tree.options.sampling.max_new_tokens - len(prefix)
        completion = await self._generate(tree, str(number), prefix, left)
        finish, generated = completion.finish, len(completion.token_ids)
        stops = tree.options.sampling.stop
        stopped = stop_length(self._tokenizer.decode, prefix, completion.token_ids, stops)
        if stopped and finish is not Finish.NONE:
            finish, completion = Finish.STOP, completion.head(stopped)
        return Rollout(
            self._steps(completion),
            finish,
            completion.prefix_tokens,
            completion.cached_tokens,
            generated - len(completion.token_ids),
        )

    async def _warmed(self, tree: Tree) -> None:
        """Computes the prompt once: requests that start together would each compute it."""

        async def warm() -> None:
            completion = await self._generate(tree, "prompt", (), 1)
            tree.ledger.generated_tokens += len(completion.token_ids)
            tree.ledger.prefix_tokens += completion.prefix_tokens
            tree.ledger.cached_tokens += completion.cached_tokens

        if self._warming is None:
            self._warming = asyncio.create_task(warm())
        await asyncio.shield(self._warming)

    async def _generate(
        self, tree: Tree, number: str, prefix: tuple[int, ...], max_new_tokens: int
    ) -> Completion:
        rid = f"{self._name}/{number}"
        self._in_flight.add(rid)
        try:
            sampling, token_ids = tree.options.sampling, (*tree.prompt, *prefix)
            return await self._engine.generate(rid, token_ids, sampling, max_new_tokens)
        finally:
            self._in_flight.discard(rid)

    def _steps(self, completion: Completion) -> list[Step]:
        steps, at = [], 0
        for length in self._segmenter.lengths(completion.token_ids):
            span = slice(at, at + length)
            steps.append(
                Step(
                    completion.token_ids[span], completion.logprobs[span], completion.versions[span]
                )
            )
            at += length
        return steps

    async def grade(self, tree: Tree, token_ids: tuple[int, ...]) -> float:
        completion = self._tokenizer.decode(token_ids, special=False)
        job = self._job
        submission = Submission(self._prompt_text, completion, job.answer, job.tree_id)
        if isinstance(self._grader, TreeGrader):
            self._votes[token_ids] = self._grader.vote(submission)
            return 0.0  # until it is inserted
        return await self._grader.grade(submission)

    def regraded(self, tree: Tree, end: int, token_ids: tuple[int, ...]) -> dict[int, float]:
        if not isinstance(self._grader, TreeGrader):
            return {}
        self._voters[end] = self._votes[token_ids]
        # a split may have merged two nodes: one trajectory, one vote
        said = {tree.alive(node): vote for node, vote in self._voters.items()}
        votes = [(vote, tree.ends[node]) for node, vote in said.items()]
        return dict(zip(said, self._grader.rewards(votes), strict=True))

    def abort(self, tree: Tree) -> None:
        self._aborted = True
        for rid in list(self._in_flight):
            self._engine.abort(rid)

    def close(self) -> None:
        """Nobody rolls any more."""
        if self._warming:
            self._warming.cancel()
