"""Errors that end a run besides bad settings and a server that stays away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ibtree.errors import Fault, IbtpoError


class NotFiniteError(IbtpoError, RuntimeError):
    """Several steps in a row had no finite loss and gradient."""


class WriteError(IbtpoError, RuntimeError):
    """A file of the run could not be written: the disk is full, or a quota or limit is reached."""

    status, fault = "RESOURCE_EXHAUSTED", Fault.DEPENDENCY


class QueueDry(IbtpoError, RuntimeError):
    """No tree came within the learner's patience."""

    status, fault = "DEADLINE_EXCEEDED", Fault.DEPENDENCY


class RankLostError(IbtpoError, RuntimeError):
    """The ranks could not go on together: another one died, stalled or failed."""

    status, fault = "UNAVAILABLE", Fault.DEPENDENCY


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Raises WriteError where writing `what` below `folder` fails inside."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{what} could not be written to {folder}: {error}") from error
