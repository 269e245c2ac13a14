"""The training loop of rank 0, `train`: lease → step → checkpoint → ack → publish, read top to
bottom; and that of the other ranks, `serve_leader`, which take part where rank 0 calls them.

Exactly-once effect: the ledger of trained tree ids is part of the checkpoint, and trees are acked
only after that checkpoint is durable. A run that is killed anywhere resumes from it; trees it had
in hand come back, those in the ledger are acked without being trained on again, and the others
meet in the same batches as before (learner/io/leases.py).
"""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

from ibtree.messages import TreeLease
from ibtree.weights.manifest import Canary
from learner.config import LearnerConfig
from learner.dist.process_group import Ranks
from learner.dist.state import read_shards, weights_of, write_shards
from learner.errors import NotFiniteError
from learner.io.canary import canary_of
from learner.io.held_out import evaluate_held_out
from learner.io.report import staleness, tree_figures
from learner.run import Run, new_trainer, started
from learner.train.trainer import StepFigures


def train(config: LearnerConfig, ranks: Ranks) -> None:
    """Runs `config.steps` steps, or until SIGTERM or SIGINT (the step in hand ends).

    Raises FieldError and PreconditionError for settings that do not fit, RpcFailed and QueueDry
    when the server stays away, NotFiniteError, WriteError and RankLostError when training can not
    go on.
    """
    with started(config, ranks) as run:
        _evaluate(run)
        while not (_done(run) or run.stop):
            _step(run)
            _evaluate(run)
        run.publisher.wait()
        if run.checkpoints.newest() < run.state.step:  # told to stop between two
            _save(run)
        run.exports.write("last", run.state)


def _step(run: Run) -> None:
    config, tree_leases, state, report = run.config, run.tree_leases, run.state, run.report
    if config.max_staleness == 0 or not config.prompts_ahead_steps:
        with report.phase("publish"):  # only trees of the newest version are wanted
            run.publisher.wait()
    with report.phase("sample"):
        tree_leases.submit_ahead()
        leases = tree_leases.lease_step()
    if run.stop:  # told to while waiting: the trees go back
        return
    fresh, stale = _fresh(leases, state.version, config.max_staleness)
    with report.phase("learn"):
        figures = run.trainer.step([lease.tree for lease in fresh], state.version, state.updates)
    tree_leases.keep_alive()
    state.figures = figures.means() | {
        **tree_figures([lease.tree for lease in leases], state.version),
        "stale_trees": float(stale),
        "refused_trees": float(len(tree_leases.refused)),
        "version": float(state.version),
    }
    tree_leases.settle(leases)
    state.step += 1
    state.updates += figures.updates
    state.bad_steps = _bad_steps(state.bad_steps, figures)
    state.tokens += sum(lease.tree.ledger.generated_tokens for lease in leases)
    state.figures |= {"tokens": float(state.tokens), "bad_steps": float(state.bad_steps)}
    with report.phase("publish"):
        state.version += 1
        run.publisher.stage(run.trainer.policy, state, _canary(run, fresh))
    with report.phase("checkpoint"):
        if _done(run) or state.step % config.checkpoint_every_steps == 0:
            _save(run)
    run.publisher.push_later()  # the next step does not wait for it
    seconds = {"pause_s": run.publisher.pause_s, "seconds_compute": figures.seconds_compute}
    report.step(state.step, state.figures | seconds)
    _warn(run, figures)


def _canary(run: Run, fresh: list[TreeLease]) -> Canary | None:
    """What the policy gives tokens of the step's first tree."""
    tolerance = run.config.canary_tolerance
    if not tolerance or not fresh or run.ranks.mesh is not None:  # shards are of no use here
        return None
    return canary_of(run.trainer.policy, fresh[0].tree, tolerance, run.publisher.dtype)


def _save(run: Run) -> None:
    """Makes the steps so far durable; only then their trees are acked."""
    run.checkpoints.save(run.trainer.policy, run.trainer.optimizer, run.state)
    run.tree_leases.ack()


def _warn(run: Run, figures: StepFigures) -> None:
    """Says what is wrong with a step. Raises NotFiniteError after too many bad ones in a row."""
    step, gap = run.state.step, run.state.figures["log_prob_gap_mean"]
    if figures.bad:
        run.report.say(
            f"warning: step {step}: loss {figures.loss} and gradient {figures.grad_norm} are not "
            "finite; weights unchanged"
        )
    if not figures.trained_trees:  # a run without any reward would stay as it is for ever
        stale, reward = (run.state.figures[name] for name in ("stale_trees", "reward"))
        run.report.say(
            f"warning: step {step}: no tree to train on, {stale:.0f} too old, the others of one "
            f"reward each (mean {reward:.3g}); weights unchanged"
        )
    if run.config.strategy != "independent" and run.state.figures["steps_median"] <= 1:
        run.report.say(
            f"warning: step {step}: half of the trajectories have a single step, so trees branch "
            "from the prompt alone; --step-rule auto finds lines and sentences, --separators other "
            "texts, --max-step-tokens a greatest length"
        )
    if gap > run.config.log_prob_gap_alarm:
        run.report.say(f"warning: engine and trainer differ by {gap:.3g} nats")
    if run.state.bad_steps >= run.config.max_bad_steps:
        raise NotFiniteError(
            f"{run.state.bad_steps} steps in a row without a finite loss and gradient, the last of "
            f"them step {step}; the weights are those from before. Look at the log-probabilities "
            "and lower --lr, or raise --max-bad-steps"
        )


def _bad_steps(before: int, figures: StepFigures) -> int:
    """Bad steps in a row; one that trained on nothing is neither good nor bad."""
    if figures.bad:
        return before + 1
    return 0 if figures.updates else before


def _done(run: Run) -> bool:
    limit, state = run.config.max_tokens, run.state
    return state.step >= run.config.steps or (limit is not None and state.tokens >= limit)


def _fresh(leases: list[TreeLease], version: int, bound: int | None) -> tuple[list[TreeLease], int]:
    fresh = [lease for lease in leases if bound is None or staleness(lease.tree, version) <= bound]
    return fresh, len(leases) - len(fresh)


def _evaluate(run: Run) -> None:
    """Evaluates before the first step, every `eval_every_steps` and at the end; not again after a
    restart."""
    config, state, report = run.config, run.state, run.report
    every = config.eval_every_steps
    due = not state.step or _done(run) or (every and state.step % every == 0)
    if not run.held_out or not due or report.evaluated(state.step):
        return
    run.publisher.wait()
    with report.phase("evaluate"):
        accuracy = evaluate_held_out(
            config, run.held_out, state.step, report.say, run.tree_leases.keep_alive, run.stop
        )
    if accuracy is None:  # told to stop: a resumed run goes on with it
        return
    if accuracy.mean > report.best_accuracy():
        run.exports.write("best", state)
    report.accuracy(state.step, accuracy)


def serve_leader(config: LearnerConfig, ranks: Ranks) -> None:
    """Does what rank 0 commands until it ends the run; rank 0 alone hears signals.

    Raises RankLostError, FieldError.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    trainer = new_trainer(config, ranks)
    for command in ranks.commands():
        match command.name:
            case "step":
                trainer.step(command.trees, **command.facts)
            case "weights":
                weights_of(trainer.policy, ranks)
            case "save":
                with suppress(OSError):  # every rank has it, rank 0 says so
                    write_shards(
                        Path(command.facts["folder"]), trainer.policy, trainer.optimizer, ranks
                    )
            case "load":
                read_shards(Path(command.facts["folder"]), trainer.policy, trainer.optimizer, ranks)
