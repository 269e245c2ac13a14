"""The training loop: lease → step → checkpoint → ack → publish, read top to bottom.

Exactly-once effect: the ledger of trained tree ids is part of the checkpoint, and trees are acked
only after that checkpoint is durable. A run that is killed anywhere resumes from it; trees it had
in hand come back, those in the ledger are acked without being trained on again.
"""

from __future__ import annotations

import json
import math
import signal
import uuid
from types import FrameType

import torch

from ibtree.client import Client
from ibtree.errors import FieldError
from ibtree.evaluate import evaluate
from ibtree.messages import Prompt, TreeLease
from ibtree.options import options_from
from ibtree.questions import Question
from learner.checkpoint import Checkpoints, TrainState
from learner.config import LearnerConfig
from learner.intake import Intake
from learner.model import load_policy, pick_device
from learner.prompts import PromptStream, questions_of
from learner.publish import Publisher
from learner.report import Figures, Reporter, staleness, tree_figures
from learner.trainer import Trainer


def train(config: LearnerConfig) -> None:
    """Runs `config.steps` optimiser steps, or until SIGTERM or SIGINT (the step in hand ends).

    Raises FieldError and PreconditionError for settings that do not fit, RpcFailed and QueueDry
    when the server stays away.
    """
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    stop = _stop_on_signals()
    device = pick_device(config.device)
    questions = questions_of(config.prompts, config)
    held_out = questions_of(config.eval_prompts, config) if config.eval_prompts else []
    with Client(config.server) as client:
        publisher = Publisher(client, config.model, config.out_dir, config.patience_s)
        policy = load_policy(config.model, device, config.dtype)
        reference = load_policy(config.model, device, config.dtype) if config.kl_weight else None
        trainer = Trainer(policy, reference, config, device)
        checkpoints = Checkpoints(config.out_dir / "checkpoints", config.keep_checkpoints)
        state = _resume(checkpoints, trainer, config)
        stream = PromptStream(questions, config.seed, _run_id(config))
        intake = Intake(client, stream, config, state)
        intake.give_back_from_before()
        publisher.align(policy, state)
        with Reporter(config.out_dir, config.steps) as report:
            if state.step == 0:
                _evaluate(config, held_out, state, report)
            try:
                while not _done(config, state) and not stop:
                    _step(config, intake, trainer, checkpoints, publisher, state, report)
                    every = config.eval_every_steps
                    if _done(config, state) or (every and state.step % every == 0):
                        _evaluate(config, held_out, state, report)
            finally:
                intake.give_back("the learner stops")


def _step(
    config: LearnerConfig,
    intake: Intake,
    trainer: Trainer,
    checkpoints: Checkpoints,
    publisher: Publisher,
    state: TrainState,
    report: Reporter,
) -> None:
    with report.phase("sample"):
        intake.submit_ahead(state.step)
        leases = intake.lease_step()
    fresh, stale = _fresh(leases, state.version, config.max_staleness)
    with report.phase("learn"):
        figures = trainer.step([lease.tree for lease in fresh], state.version)
    intake.keep_alive()
    state.trained += [lease.tree.tree_id for lease in leases]
    state.tokens += sum(lease.tree.ledger.generated_tokens for lease in leases)
    state.step += 1
    means: Figures = figures.means() | {
        **tree_figures([lease.tree for lease in leases], state.version),
        "stale_trees": float(stale),
        "version": float(state.version),
        "tokens": float(state.tokens),
    }
    with report.phase("publish"):
        state.version += 1
        publisher.stage(trainer.policy, state)
    with report.phase("checkpoint"):
        if _done(config, state) or state.step % config.checkpoint_every_steps == 0:
            checkpoints.save(trainer.policy, trainer.optimizer, state)
            intake.ack()
    with report.phase("publish"):
        means["pause_s"] = publisher.push()
    report.step(state.step, means)
    if not math.isfinite(figures.grad_norm):
        report.say(f"warning: step {state.step}: the gradient is not finite; weights unchanged")
    if means["log_prob_gap_mean"] > config.log_prob_gap_alarm:
        report.say(f"warning: engine and trainer differ by {means['log_prob_gap_mean']:.3g} nats")


def _done(config: LearnerConfig, state: TrainState) -> bool:
    limit = config.max_tokens
    return state.step >= config.steps or (limit is not None and state.tokens >= limit)


def _fresh(leases: list[TreeLease], version: int, bound: int | None) -> tuple[list[TreeLease], int]:
    fresh = [one for one in leases if bound is None or staleness(one.tree, version) <= bound]
    return fresh, len(leases) - len(fresh)


def _resume(checkpoints: Checkpoints, trainer: Trainer, config: LearnerConfig) -> TrainState:
    if config.resume == "never" and checkpoints:
        problem = f"{config.out_dir} holds checkpoints of another run"
        raise FieldError("out_dir", problem, "a folder of its own, or --resume auto")
    return checkpoints.load(trainer.policy, trainer.optimizer) or TrainState()


def _run_id(config: LearnerConfig) -> str:
    """Names the run's prompts on the server; kept, so that a resumed run knows its own."""
    path = config.out_dir / "run.json"
    config.out_dir.mkdir(parents=True, exist_ok=True)
    if config.resume == "never" or not path.is_file():
        path.write_text(json.dumps({"run_id": uuid.uuid4().hex[:12]}))
    return str(json.loads(path.read_text())["run_id"])


def _evaluate(
    config: LearnerConfig, held_out: list[Question], state: TrainState, report: Reporter
) -> None:
    if held_out:
        prompts = [Prompt(q.prompt, "", q.answer, config.grader) for q in held_out]
        with report.phase("evaluate"):
            accuracy = evaluate(config.server, prompts, options_from(config))
        report.accuracy(state.step, accuracy)


def _stop_on_signals() -> list[int]:
    """Grows when SIGTERM or SIGINT comes; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received
