"""What a run is made of, put together at the start: everything before the loop."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType

import torch

from ibtpo_settings.folder import alone_in
from ibtree.client import Client
from ibtree.data.questions import Question
from ibtree.errors import FieldError
from learner.config import LearnerConfig
from learner.dist.process_group import Ranks
from learner.errors import writing
from learner.io.checkpoint import Checkpoints, TrainState
from learner.io.export import Exports
from learner.io.leases import TreeLeases
from learner.io.prompts import PromptStream, questions_of
from learner.io.publish import Publisher
from learner.io.report import Reporter
from learner.io.validate import tree_problem
from learner.train.model import compute_dtype_of, load_policy, vocabulary_of
from learner.train.names import check_architecture, check_names
from learner.train.trainer import Trainer


@dataclass
class Run:
    """The parts of a run, each of them one file of this package; `stop` grows when SIGTERM or
    SIGINT comes."""

    config: LearnerConfig
    state: TrainState
    held_out: list[Question]
    tree_leases: TreeLeases
    trainer: Trainer
    checkpoints: Checkpoints
    publisher: Publisher
    exports: Exports
    report: Reporter
    stop: list[int]
    ranks: Ranks


@contextmanager
def started(config: LearnerConfig, ranks: Ranks) -> Iterator[Run]:
    """The run, new or resumed from its newest checkpoint; the server serves its weights. At the end
    the trees in hand are given back.

    Raises FieldError and PreconditionError for settings that do not fit, RpcFailed, RankLostError.
    """
    stop: list[int] = []
    questions = questions_of(config.prompts, config)
    held_out = questions_of(config.eval_prompts, config) if config.eval_prompts else []
    with _folder(config), Client(config.server) as client:
        checkpoints = Checkpoints(config.out_dir / "checkpoints", config.keep_checkpoints, ranks)
        run_id = run_id_of(checkpoints, config)
        publisher = Publisher(
            client,
            config.model,
            config.out_dir,
            config.patience_s,
            ranks,
            config.shared_dir,
            run_id=run_id,
            take_over=config.take_over,
        )
        trainer = new_trainer(config, ranks)
        policy = trainer.policy
        state = checkpoints.load(policy, trainer.optimizer) or TrainState()
        stream = PromptStream(questions, config.seed, run_id)
        vocab_size = vocabulary_of(policy)
        problem_of = partial(tree_problem, model_id=publisher.model_id, vocab_size=vocab_size)
        tree_leases = TreeLeases(client, stream, config, state, problem_of, trainer.prepare, stop)
        tree_leases.give_back_from_before()
        publisher.align(policy, state)
        exports = Exports(config.model, config.out_dir, publisher.staged, publisher.dtype)
        _note_signals(stop)  # until here they end the process: nothing is in hand yet
        with Reporter(config.out_dir, config.steps, state) as report:
            try:
                yield Run(
                    config=config,
                    state=state,
                    held_out=held_out,
                    tree_leases=tree_leases,
                    trainer=trainer,
                    checkpoints=checkpoints,
                    publisher=publisher,
                    exports=exports,
                    report=report,
                    stop=stop,
                    ranks=ranks,
                )
            finally:
                publisher.settle()
                tree_leases.give_back("the learner stops")


@contextmanager
def _folder(config: LearnerConfig) -> Iterator[None]:
    """Locks the folder: two runs in one would train on each other's trees. Raises FieldError,
    WriteError."""
    with ExitStack() as stack:
        with writing("the run", config.out_dir):
            stack.enter_context(alone_in(config.out_dir, "out_dir", "learner"))
        yield


def new_trainer(config: LearnerConfig, ranks: Ranks) -> Trainer:
    """This rank's trainer, with torch set up. Raises FieldError for a model that does not fit."""
    torch.manual_seed(config.seed + ranks.rank)
    if config.threads:
        torch.set_num_threads(config.threads)
    # shards move to the ranks' devices layer by layer: a whole model may not fit there
    device = ranks.device if ranks.mesh is None else torch.device("cpu")
    check_architecture(config.model)
    compute = config.compute_dtype or compute_dtype_of(config.model)
    policy, reference = load_policy(config.model, device, config.dtype), None
    check_names(policy, config.model)
    if config.kl_weight or config.local_reference == "reference":
        frozen = config.reference_model or config.model
        reference = load_policy(frozen, device, compute)
    chosen = config.model_copy(update={"compute_dtype": compute})
    return Trainer(policy, reference, chosen, ranks.device, ranks)


def run_id_of(checkpoints: Checkpoints, config: LearnerConfig) -> str:
    """The name of the run's prompts and weights on the server; kept, so that a resumed run knows
    its own. Raises FieldError if the folder is another run's."""
    if config.resume == "never" and checkpoints.newest():
        problem = f"{config.out_dir} holds checkpoints of another run"
        raise FieldError("out_dir", problem, "a folder of its own, or --resume auto")
    path = config.out_dir / "run.json"
    if config.resume == "never" or not path.is_file():
        fresh = path.with_suffix(".new")
        with writing("run.json", config.out_dir):
            fresh.write_text(json.dumps({"run_id": uuid.uuid4().hex[:12]}))
            fresh.rename(path)
    return str(json.loads(path.read_text())["run_id"])


def _note_signals(received: list[int]) -> None:
    """Appends to `received` when SIGTERM or SIGINT comes; a second one ends the process at once."""

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
