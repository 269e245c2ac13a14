"""Packages of an extra that are not installed: one line that says which, and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

_NOTES = {"gpu": " (without a GPU: README.md, 'A server without a GPU')"}


@contextmanager
def required(prog: str, extra: str, modules: Sequence[str] = ()) -> Iterator[None]:
    """Exits with one line if one of these modules, which the extra brings, is not installed, or
    another package that the block imports."""
    missing = [name for name in modules if not installed(name)]
    if missing:
        sys.exit(_line(prog, extra, missing))
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or installed(package):
            raise  # a part of it is missing: the extra is of no help
        sys.exit(_line(prog, extra, [package]))


def installed(module: str) -> bool:
    """Whether there is such a top-level module; it is not imported."""
    return module in sys.modules or find_spec(module) is not None


def _line(prog: str, extra: str, missing: Sequence[str]) -> str:
    """From a checkout, by its path: the bare name is nobody's on PyPI, and could be anybody's."""
    names = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    remedy = f"pip install '.[{extra}]' in the checkout of ibtpo"
    return f"{prog}: {names}; run {remedy}{_NOTES.get(extra, '')}"
