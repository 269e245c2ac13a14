"""The `ibtpo` command: what a client can ask of a server, in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ibtree import __version__
from ibtree.cli import evaluation, sample, state, trees, weights
from ibtree.client import DEFAULT_TARGET, RpcFailed
from ibtree.errors import FieldError
from ibtree.extras import required
from ibtree.text import printable


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: {printable(message)}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Exits 1 with one line for bad input, or when the server refuses or cannot be reached; 130
    when it is interrupted."""
    parser = _Parser(prog="ibtpo", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ibtpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = (sample, state, trees, weights, evaluation)
    for name, text, run, add_options in (entry for group in groups for entry in group.COMMANDS):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--server", default=DEFAULT_TARGET, help="address of its gRPC port")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        add_options(command)
        command.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    shows = () if arguments.json else ("rich",)  # told before anything is asked of the server
    try:
        with required("ibtpo", "cli", shows):
            arguments.run(arguments)
    except KeyboardInterrupt:
        print("ibtpo: interrupted", file=sys.stderr)
        sys.exit(130)
    except (RpcFailed, FieldError, OSError, UnicodeError) as error:
        sys.exit(f"ibtpo: {printable(str(error))}")
