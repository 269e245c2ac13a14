"""Errors that every process of the project reports in the same words.

Each knows its gRPC status, whose fault it is, and whether the same request may go through later.
`server_ext.errors` and `learner.errors` hold those of one daemon alone.
"""

from __future__ import annotations

from enum import Enum

ERROR_KEY = "ibtpo-error"
"""Trailing metadata of a call that the server itself ended with an error: the error's class."""


class Fault(Enum):
    """Who is to blame: only CALLER and TREE count against what was asked for."""

    CALLER = "caller"
    """The request is wrong, or does not fit the server's state."""
    TREE = "tree"
    """The prompt or tree itself: it would fail again."""
    DEPENDENCY = "dependency"
    """The engine, a grader, a disk, another process is away or full."""
    OURS = "ours"
    """A bug, or a state that must not be."""


class IbtpoError(Exception):
    """Base of all errors that are told in one line, without a traceback."""

    status: str = "INTERNAL"
    """Name of the gRPC status."""
    fault: Fault = Fault.OURS
    retry: bool = False
    """Whether the same request, unchanged, may go through later."""


class FieldError(IbtpoError, ValueError):
    """Bad input: which field, what was wrong with it, what is allowed.

    The services turn it into INVALID_ARGUMENT, the command lines into a one-line exit message.
    """

    status, fault = "INVALID_ARGUMENT", Fault.CALLER

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        super().__init__(f"{field}: {problem}; allowed: {allowed}")
        self.field, self.problem, self.allowed = field, problem, allowed

    def as_option(self) -> str:
        """The message with the field's first word as a command-line option; "--" stands for
        SGLang's own arguments."""
        if self.field == "--":
            return str(self)
        name = self.field.partition(" ")[0]  # what follows says where: a path and a line
        return f"--{name.replace('_', '-')}{str(self).removeprefix(name)}"


class PreconditionError(IbtpoError, RuntimeError):
    """The input is well formed but does not fit the server's state."""

    status, fault = "FAILED_PRECONDITION", Fault.CALLER
