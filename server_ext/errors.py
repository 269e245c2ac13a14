"""Errors of the server: each with its gRPC status, whose fault it is, and whether to retry."""

from __future__ import annotations

from ibtree.errors import Fault, IbtpoError, PreconditionError

# ---- the caller's


class ConflictError(IbtpoError, RuntimeError):
    """An id is already known with other content."""

    status, fault = "ALREADY_EXISTS", Fault.CALLER


class TakenUpError(IbtpoError, RuntimeError):
    """The tree of this stream has another stream now, or none any more."""

    status, fault = "ABORTED", Fault.CALLER


class UnknownLeaseError(IbtpoError, LookupError):
    """A lease is unknown or ran out."""

    status, fault = "NOT_FOUND", Fault.CALLER


class BusyError(IbtpoError, RuntimeError):
    """Too much waits already; nothing was taken. Come back after `retry_after_s` seconds."""

    status, fault, retry = "RESOURCE_EXHAUSTED", Fault.CALLER, True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(IbtpoError, RuntimeError):
    """More prompts than may be queued; `excess` have to be grown first."""

    status, fault, retry = "RESOURCE_EXHAUSTED", Fault.CALLER, True

    def __init__(self, queued: int, new: int, most: int) -> None:
        super().__init__(f"{queued} prompts are queued, {new} more do not fit: at most {most}")
        self.excess = queued + new - most


class BrokenPushError(IbtpoError, RuntimeError):
    """A part of a push was lost on its way; the same push may go on from there."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True


class OtherSglangError(PreconditionError):
    """The SGLang that is installed is not the one this is written against."""


class PushEndedError(IbtpoError, RuntimeError):
    """A push was ended while its bytes came: by a newer one, a rollback, or an operator."""

    status, fault = "ABORTED", Fault.CALLER


class CanaryError(PreconditionError):
    """Engine and learner disagree about a version; it is taken back."""


# ---- the tree's


class GrowthError(IbtpoError, RuntimeError):
    """The tree cannot be grown; as it is: no rollout finished before it had to end."""

    status, fault = "DEADLINE_EXCEEDED", Fault.TREE


class GradingRefusedError(IbtpoError, RuntimeError):
    """The reward service refuses this trajectory, and would again."""

    status, fault = "FAILED_PRECONDITION", Fault.TREE


class NotGrowingError(IbtpoError, LookupError):
    """A tree is not growing any more: its prompt was cancelled."""

    status, fault = "NOT_FOUND", Fault.CALLER


# ---- a dependency's


class RolloutLostError(GrowthError):
    """The engine ended a rollout that nobody aborted."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True


class EngineError(IbtpoError, RuntimeError):
    """The engine refused or lost a request, or an update of its weights."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True


class EngineRefusedError(EngineError):
    """The engine takes no such request, however often it is asked."""

    status, fault, retry = "FAILED_PRECONDITION", Fault.TREE, False


class DrainTimeout(EngineError):
    """Rollouts did not end in time for an update; the weights are as they were."""


class RestartNeededError(EngineError):
    """The engine cannot be used any more, whatever is tried in this process: it ends
    (supervisor.CRASHED), and the next one serves the newest version that served."""


class MixedWeightsError(RestartNeededError):
    """An update failed half-way and the old version could not be put back."""


class NoReplyError(IbtpoError, RuntimeError):
    """The radix backend did not answer."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True


class GraderUnavailableError(IbtpoError, RuntimeError):
    """Nobody could grade now: a reward of 0 would be a lie."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True


class StoppingError(IbtpoError, RuntimeError):
    """The server was told to stop before the work had begun; nothing is lost."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True

    def __init__(self) -> None:
        super().__init__("the server is stopping; ask again when it is back")


class BadRewardError(PreconditionError, GraderUnavailableError):
    """A reward service answers with what is no reward."""

    status, fault, retry = "FAILED_PRECONDITION", Fault.DEPENDENCY, False


class DiskFullError(IbtpoError, RuntimeError):
    """There is no room on the journal's disk; nothing was taken. Come back later."""

    status, fault, retry = "RESOURCE_EXHAUSTED", Fault.DEPENDENCY, True
    retry_after_s = 5.0


class JournalAwayError(IbtpoError, RuntimeError):
    """The journal's disk does not answer, or somebody else holds the file."""

    status, fault, retry = "UNAVAILABLE", Fault.DEPENDENCY, True


class JournalDamagedError(IbtpoError, RuntimeError):
    """What the journal's disk returns is not what was written: stop serving."""

    status, fault = "DATA_LOSS", Fault.DEPENDENCY


class StillBusy(TimeoutError):
    """Rollouts did not pass the gate in time; it is open again. Inside the server only."""
