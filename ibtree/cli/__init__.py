"""The `ibtpo` command: what a client can ask of a server, in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ibtree.client import DEFAULT_TARGET, Client, RpcFailed
from ibtree.errors import FieldError
from ibtree.evaluate import evaluate
from ibtree.messages import Prompt
from ibtree.options import TreeOptions, changed
from ibtree.questions import read_questions


def main() -> None:
    """Exits 1 with one line when the server refuses or cannot be reached."""
    parser = argparse.ArgumentParser(prog="ibtpo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("queue", _queue, "trees by state: queued, growing, graded, leased, acked, dead"),
        ("weights", _weights, "the weight version that is served"),
        ("cache", _cache, "how full the radix cache is, and of what"),
        ("audit-cache", _audit, "compare cached prefixes of growing trees with computed ones"),
        ("eval", _evaluate, "accuracy on a JSONL file of prompts and answers"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--server", default=DEFAULT_TARGET, help="address of its gRPC port")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=run)
        if name == "eval":
            _add_evaluation(command)
        if name == "audit-cache":
            command.add_argument("--samples", type=int, default=32, help="prefixes, 1 to 1,024")
    arguments = parser.parse_args()
    try:
        figures = arguments.run(arguments)
    except (RpcFailed, FieldError, OSError) as error:
        sys.exit(f"ibtpo: {error}")
    if arguments.json:
        print(json.dumps(figures))
    else:
        _print_table(figures)


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompts", type=Path, required=True, help="JSONL: prompt, answer")
    command.add_argument("--grader", default="", help="grader by name; default: the server's")
    command.add_argument("--temperature", type=float, default=0.7, help="sampling temperature")
    command.add_argument("--max-new-tokens", type=int, default=2048, help="per rollout [tokens]")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus mass")
    command.add_argument("--top-k", type=int, default=-1, help="tokens kept; -1: all")


def _queue(arguments: argparse.Namespace) -> dict[str, object]:
    with Client(arguments.server) as client:
        return asdict(client.queue_stats())


def _weights(arguments: argparse.Namespace) -> dict[str, object]:
    with Client(arguments.server) as client:
        served = client.get_weights()
    return asdict(served) | {"digest": served.digest.hex()}


def _cache(arguments: argparse.Namespace) -> dict[str, object]:
    with Client(arguments.server) as client:
        return asdict(client.cache_state())


def _audit(arguments: argparse.Namespace) -> dict[str, object]:
    with Client(arguments.server) as client:
        return asdict(client.audit_cache(arguments.samples))


def _evaluate(arguments: argparse.Namespace) -> dict[str, object]:
    questions = read_questions(arguments.prompts)
    prompts = [Prompt(q.prompt, "", q.answer, arguments.grader) for q in questions]
    options = changed(
        TreeOptions(),
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
    )
    return asdict(evaluate(arguments.server, prompts, options))


def _print_table(figures: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
