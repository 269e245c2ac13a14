"""Errors that every process of the project reports in the same words."""

from __future__ import annotations


class FieldError(ValueError):
    """Bad input: which field, what was wrong with it, what is allowed.

    The services turn it into INVALID_ARGUMENT, the command lines into a one-line exit message.
    """

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        super().__init__(f"{field}: {problem}; allowed: {allowed}")
        self.field, self.problem, self.allowed = field, problem, allowed

    def as_option(self) -> str:
        """The message with the field's first word as a command-line option."""
        name = self.field.partition(" ")[0]  # what follows is a place: a path and a line
        return f"--{name.replace('_', '-')}{str(self).removeprefix(name)}"


class PreconditionError(RuntimeError):
    """The input is well formed but does not fit the server's state (FAILED_PRECONDITION)."""


class ConflictError(RuntimeError):
    """An id is already known with other content (ALREADY_EXISTS)."""


class BusyError(RuntimeError):
    """Too much waits already; nothing was taken (RESOURCE_EXHAUSTED). Come back after
    `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BrokenPushError(RuntimeError):
    """A part of a push was lost on its way; the same push may go on from there (UNAVAILABLE)."""


class UnknownLeaseError(LookupError):
    """A lease is unknown or ran out (NOT_FOUND)."""
